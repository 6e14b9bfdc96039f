"""A folder of predictions: its manifest, which is written before the first part, and the workers that write parts."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from addenda.backbones import Files, read_files
from addenda.combined import CombinedModel, numerics, numerics_fingerprint
from addenda.distributed.cluster import Workplace
from addenda.exceptions import DataError, ExactnessError, IntegrityError
from addenda.files import is_unfinished, written
from addenda.registry import canonical_json

FILE = "manifest.json"
PART, PART_FORM = "part-{:05d}.parquet", r"part-\d{5,}\.parquet"
METADATA = "addenda"
"""Of a part's file, in canonical JSON: what makes its answers traceable, and how many images it is about."""
COLUMNS = ("image", "task", "ref", "label", "probability", "left_out")
NAMED = 5
"""How many differences a message names."""


@dataclass(frozen=True)
class Manifest:
    """All that the bytes of a folder's parts depend on."""

    images: int  # how many are asked about
    images_sha256: str  # over their paths in order
    part_size: int  # images in a part; the last has what is left
    top: int | None  # as `CombinedModel.predict` takes it
    exact: bool  # whether a task's bits depend on nothing but image, task, backbone and numerics
    backbone: str  # its fingerprint
    tasks: Mapping[str, str]  # sha256 of each that is answered, by its reference, in order
    numerics: Mapping[str, Any]
    numerics_fingerprint: str
    generation: int  # the registry's, when the tasks were chosen; it only tells

    @property
    def num_parts(self) -> int:
        """Files that there are when all is done."""
        return -(-self.images // self.part_size)

    def missing(self, folder: Path, paths: Sequence[str]) -> list[dict[str, Any]]:
        """The parts whose files are not there, each with its images of all."""
        return [
            {"part": part, "images": paths[part * self.part_size : (part + 1) * self.part_size]}
            for part in range(self.num_parts)
            if not (folder / PART.format(part)).exists()
        ]


def paths_digest(paths: Sequence[str]) -> str:
    """sha256 over paths in order."""
    found = hashlib.sha256()
    for path in paths:
        try:
            found.update(path.encode() + b"\0")
        except UnicodeEncodeError as error:
            raise DataError(f"The name of image {path!r} is not UTF-8, which Parquet cannot hold.") from error
    return found.hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is neither one nor anything that it could be of."""
    path = folder / FILE
    if not path.exists():
        if next(folder.glob("part-*"), None) is not None:
            raise DataError(f"The folder {str(folder)!r} has parts and no {FILE}: give another --out.")
        return None
    try:
        return Manifest(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{str(path)!r} is not a manifest of predictions ({error}): give another --out.") from error


def kept(folder: Path, before: Manifest | None, now: Manifest) -> Manifest:
    """The manifest of a folder: a new folder's is written, and another's must say the same.

    The generation may differ, and the fingerprint of numerics, which says less than they do.
    """
    if before is None:
        folder.mkdir(parents=True, exist_ok=True)
        with written(folder / FILE) as unfinished:
            unfinished.write_text(json.dumps(asdict(now), indent=2, ensure_ascii=False))
        return now
    one, other = (asdict(each) | {"generation": 0, "numerics_fingerprint": ""} for each in (before, now))
    found = _differences(one, other)
    if found:
        raise DataError(
            f"The folder {str(folder)!r} holds other predictions: {found}. Ask for the same, or give another --out."
        )
    return before


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two descriptions, in words that name a few."""
    found = list(_differing(before, now))
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return "; ".join(found[:NAMED]) + more


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for key in dict.fromkeys((*before, *now)):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differing(one, other, f"{within}{key} ")
        elif one != other:
            yield f"{within}{key} was {_shown(one)}, now {_shown(other)}"


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 64 else f"{text[:12]}…"


@dataclass(frozen=True)
class PredictionJob:
    """What every worker is told: what it opens, and on how many threads it writes parts of which folder."""

    folder: Path
    place: Workplace
    manifest: Manifest
    threads: int
    skip_bad: bool


def choose(place: Workplace, refs: Sequence[str], exact: bool, threads: int) -> dict[str, Any]:
    """What a manifest says of the tasks, all active ones where none is named, and of numerics; the self-test is run."""
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
    """

    def __init__(self, job: PredictionJob) -> None:
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
                f"others: {_differences(manifest.numerics, found)}."
            )
        self._model = CombinedModel(backbone, tasks, manifest.exact)

    def write(self, part: int, images: Sequence[str]) -> None:
        """Computes a part of a number and writes its file; done again, that has the same bytes."""
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
        told: dict[str, Any] = {"images": len(images), "left_out": len(left_out)}
        told |= {key: getattr(manifest, key) for key in ("backbone", "exact", "generation", "numerics_fingerprint")}
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


def contents(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Images left out, rows and bytes of a folder's parts; what killed workers left half written goes."""
    from pyarrow import parquet

    left_out = rows = size_bytes = 0
    for part in range(manifest.num_parts):
        path = folder / PART.format(part)
        if not path.exists():
            raise DataError(f"{str(path)!r} was written and is not there: do all nodes see that folder?")
        footer = parquet.read_metadata(path)
        left_out += json.loads(footer.metadata[METADATA.encode()])["left_out"]
        rows += footer.num_rows
        size_bytes += path.stat().st_size
    for path in folder.iterdir():
        if is_unfinished(path, PART_FORM):
            path.unlink(missing_ok=True)
    return {"left_out": left_out, "rows": rows - left_out, "size_bytes": size_bytes}
