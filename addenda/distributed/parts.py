"""What a worker of a batch prediction does: it holds the model and writes the answers about one part of the images."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from addenda.backbones import Files, read_files
from addenda.combined import CombinedModel, numerics, numerics_fingerprint
from addenda.distributed.cluster import Workplace
from addenda.distributed.manifest import PART, Manifest, differences, named
from addenda.exceptions import DataError, ExactnessError, IntegrityError
from addenda.files import written
from addenda.registry import canonical_json

METADATA = "addenda"
"""Of a part's file, in canonical JSON: what makes its answers traceable, and how many images it is about."""
COLUMNS = ("image", "task", "ref", "label", "probability", "left_out")


@dataclass(frozen=True)
class Job:
    """What every worker is told: what it opens, and on how many threads it writes which parts of a folder.

    The folder is the same on every node. With `skip_bad`, images that cannot be read are left out.
    """

    folder: Path
    place: Workplace
    manifest: Manifest
    threads: int
    skip_bad: bool


def choose(place: Workplace, refs: Sequence[str], exact: bool, threads: int) -> dict[str, Any]:
    """The tasks that are to be answered, all active ones where none is named; the self-test is run.

    Returns:
        The manifest's generation, exact, backbone, tasks, numerics and numerics_fingerprint.

    Raises:
        AddendaError: there is no such task, or none at all; or this machine cannot answer them.
    """
    torch.set_num_threads(threads)
    with place.opened() as (registry, backbone):
        generation, active = registry.current(backbone)
        tasks = [registry.get(ref) for ref in refs or [record.ref for record in active]]
    if not tasks:
        raise DataError("The registry holds no active task. `addenda learn` adds one.")
    model = CombinedModel(backbone, tasks, exact)
    described = numerics(backbone)
    return {
        "exact": model.exact,
        "backbone": backbone.fingerprint,
        "tasks": {task.ref: task.sha256 for task in tasks},
        "numerics": described,
        "numerics_fingerprint": numerics_fingerprint(described),
        "generation": generation,
    }


class PartWriter:
    """Answers parts of the images, and writes each of them whole or not at all.

    Ray Data's `write_parquet` names its files anew in each run and writes them in place: a part would be there twice,
    or half.

    Raises:
        ExactnessError: this machine's bits would be others than the manifest's.
        IntegrityError: the registry has other content under a reference than the manifest says.
        AddendaError: as `Workplace.opened` and `CombinedModel` raise it.
    """

    def __init__(self, job: Job) -> None:
        self._job, manifest = job, job.manifest
        torch.set_num_threads(job.threads)
        with job.place.opened() as (registry, backbone):
            tasks = [registry.get(ref) for ref in manifest.tasks]
        for task in tasks:
            if task.sha256 != manifest.tasks[task.ref]:
                raise IntegrityError(f"Task {task.ref!r} is in the registry with other content than in the manifest.")
        found = numerics(backbone)
        if numerics_fingerprint(found) != manifest.numerics_fingerprint:
            raise ExactnessError(
                f"The node {platform.node()!r} computes with other numerics than the manifest's, so its bits would be "
                f"others: {named(differences(manifest.numerics, found))}."
            )
        self._model = CombinedModel(backbone, tasks, manifest.exact)

    def write(self, part: int, images: Sequence[str]) -> None:
        """Computes a part of a number and writes its file; done again, that has the same bytes.

        Raises:
            DataError: an image cannot be read, and none is to be left out.
        """
        import pyarrow
        from pyarrow import parquet

        torch.set_num_threads(self._job.threads)  # a setting of the thread, and Ray may call from another one
        manifest, size = self._job.manifest, self._model.micro_batch
        types = (*[pyarrow.string()] * 4, pyarrow.float32(), pyarrow.string())
        schema = pyarrow.schema(zip(COLUMNS, types, strict=True))
        left_out: dict[str, str] = {}
        batches = []
        for files in read_files(self._model.backbone, images, size, self._job.skip_bad):
            left_out |= files.bad
            batches.append(pyarrow.RecordBatch.from_pylist(list(self._rows(files)), schema))
        told = {
            "backbone": manifest.backbone,
            "exact": manifest.exact,
            "generation": manifest.generation,
            "images": len(images),
            "left_out": len(left_out),
            "numerics_fingerprint": manifest.numerics_fingerprint,
        }
        table = pyarrow.Table.from_batches(batches, schema).replace_schema_metadata({METADATA: canonical_json(told)})
        with written(self._job.folder / PART.format(part)) as unfinished:
            parquet.write_table(table, unfinished, compression="zstd")

    def _rows(self, files: Files[str]) -> Iterator[dict[str, Any]]:
        """The rows of some images: a label each, or why an image was left out."""
        found = self._model.predict_images(files.images, self._job.manifest.top) if files.paths else {}
        answers = {name: dict(zip(files.paths, best, strict=True)) for name, best in found.items()}
        for image in files.asked:
            if image in files.bad:
                yield {"image": image, "left_out": files.bad[image]}
            for name, of_images in answers.items():
                ref = self._model.tasks[name].ref
                for label, probability in of_images.get(image, ()):
                    yield {"image": image, "task": name, "ref": ref, "label": label, "probability": probability}
