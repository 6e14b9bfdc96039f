"""A folder of predictions: its manifest, written before the first part file, and the workers that write part files."""

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
"""Metadata key of a part file: canonical JSON that makes its predictions traceable and counts its images."""
COLUMNS = ("image", "task", "ref", "label", "probability", "left_out")
MAX_NAMED = 5
"""Most differences that an error message names."""


@dataclass(frozen=True)
class Manifest:
    """Everything that determines the bytes of the part files in a folder."""

    images: int  # number of images
    images_sha256: str  # over their paths in order
    part_size: int  # images per part file; the last file has the remainder
    top: int | None  # as in `CombinedModel.predict`
    exact: bool  # whether a task's bits depend only on image, task, backbone and numerics
    backbone: str  # its fingerprint
    tasks: Mapping[str, str]  # sha256 of each predicted task by its reference, in order
    numerics: Mapping[str, Any]
    numerics_fingerprint: str
    generation: int  # of the registry when the tasks were selected; informational

    @property
    def num_parts(self) -> int:
        """Number of part files in the finished folder."""
        return -(-self.images // self.part_size)

    def missing(self, folder: Path, paths: Sequence[str]) -> list[dict[str, Any]]:
        """The part files that do not exist yet, each with its share of `paths`."""
        return [
            {"part": part, "images": paths[part * self.part_size : (part + 1) * self.part_size]}
            for part in range(self.num_parts)
            if not (folder / PART.format(part)).exists()
        ]


def paths_digest(paths: Sequence[str]) -> str:
    """sha256 of the paths in order."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(path.encode() + b"\0")
        except UnicodeEncodeError as error:
            raise DataError(f"The image path {path!r} is not UTF-8, so Parquet cannot store it; rename it.") from error
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """Reads the manifest of a folder; None if the folder has neither a manifest nor part files."""
    path = folder / FILE
    if not path.exists():
        if next(folder.glob("part-*"), None) is not None:
            raise DataError(
                f"The folder {str(folder)!r} has part files but no {FILE}, so it cannot be resumed; use another --out."
            )
        return None
    try:
        return Manifest(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{str(path)!r} is not a manifest of predictions ({error}); choose another --out.") from error


def ensure_manifest(folder: Path, before: Manifest | None, now: Manifest) -> Manifest:
    """Writes the manifest of a new folder, or checks that an existing one equals it.

    The generation may differ. The numerics are compared instead of their fingerprint, so that a message can name the
    difference.
    """
    if before is None:
        folder.mkdir(parents=True, exist_ok=True)
        with written(folder / FILE) as unfinished:
            unfinished.write_text(json.dumps(asdict(now), indent=2, ensure_ascii=False))
        return now
    old, new = (asdict(manifest) | {"generation": 0, "numerics_fingerprint": ""} for manifest in (before, now))
    if differences := _differences(old, new):
        raise DataError(
            f"The folder {str(folder)!r} holds predictions of another run: {differences}. Repeat that run's options, "
            "or choose another --out."
        )
    return before


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first few differences between two mappings as text; empty if they are equal."""
    differences = list(_each_difference(before, now))
    more = f" and {len(differences) - MAX_NAMED} more" if len(differences) > MAX_NAMED else ""
    return "; ".join(differences[:MAX_NAMED]) + more


def _each_difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _each_difference(old, new, f"{prefix}{key} ")
        elif old != new:
            yield f"{prefix}{key} was {_shortened(old)}, now {_shortened(new)}"


def _shortened(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 64 else f"{text[:12]}…"


@dataclass(frozen=True)
class PredictionJob:
    """What every worker receives."""

    folder: Path
    workplace: Workplace
    manifest: Manifest
    threads: int
    skip_bad: bool


def resolve_tasks(workplace: Workplace, refs: Sequence[str], exact: bool, threads: int) -> dict[str, Any]:
    """The manifest's fields on tasks and numerics; without `refs`, all active tasks. Runs the self-test."""
    torch.set_num_threads(threads)
    with workplace.opened() as (registry, backbone):
        generation, active = registry.current(backbone)
        tasks = [registry.get(ref) for ref in refs or [record.ref for record in active]]
    if not tasks:
        raise DataError("The registry has no active task; add one with `addenda learn`.")
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
    """Computes the predictions of a part and writes its file atomically.

    Ray Data's `write_parquet` names its files anew in each run and writes them in place, so parts could be duplicated
    or truncated.
    """

    def __init__(self, job: PredictionJob) -> None:
        self._job, manifest = job, job.manifest
        torch.set_num_threads(job.threads)
        with job.workplace.opened() as (registry, backbone):
            tasks = [registry.get(ref) for ref in manifest.tasks]
        for task in tasks:
            if task.sha256 != manifest.tasks[task.ref]:
                raise IntegrityError(
                    f"Task {task.ref!r} in the registry is not the one in the manifest (sha256); use another --out."
                )
        described = numerics(backbone)
        if numerics_fingerprint(described) != manifest.numerics_fingerprint:
            raise ExactnessError(
                f"The numerics of node {platform.node()!r} differ from the manifest's, so its bits would differ: "
                f"{_differences(manifest.numerics, described)}. Use nodes of one kind."
            )
        self._model = CombinedModel(backbone, tasks, manifest.exact)

    def write(self, part: int, images: Sequence[str]) -> None:
        """Computes part number `part` and writes its file; a repeated call writes the same bytes."""
        import pyarrow
        from pyarrow import parquet

        torch.set_num_threads(self._job.threads)  # a per-thread setting, and Ray may call from another thread
        manifest, size = self._job.manifest, self._model.micro_batch
        types = (*[pyarrow.string()] * 4, pyarrow.float32(), pyarrow.string())
        schema = pyarrow.schema(zip(COLUMNS, types, strict=True))
        left_out: dict[str, str] = {}
        batches = []
        for files in read_files(self._model.backbone, images, size, self._job.skip_bad):
            left_out |= files.bad
            batches.append(pyarrow.RecordBatch.from_pylist(list(self._rows(files)), schema))
        about: dict[str, Any] = {"images": len(images), "left_out": len(left_out)}
        about |= {key: getattr(manifest, key) for key in ("backbone", "exact", "generation", "numerics_fingerprint")}
        table = pyarrow.Table.from_batches(batches, schema).replace_schema_metadata({METADATA: canonical_json(about)})
        with written(self._job.folder / PART.format(part)) as unfinished:
            parquet.write_table(table, unfinished, compression="zstd")

    def _rows(self, files: Files[str]) -> Iterator[dict[str, Any]]:
        """One row per predicted label; for an unreadable image, one row with the reason."""
        predictions = self._model.predict_images(files.images, self._job.manifest.top) if files.paths else {}
        by_image = {name: dict(zip(files.paths, labels, strict=True)) for name, labels in predictions.items()}
        for image in files.asked:
            if image in files.bad:
                yield {"image": image, "left_out": files.bad[image]}
            for name, labels_of in by_image.items():
                ref = self._model.tasks[name].ref
                for label, probability in labels_of.get(image, ()):
                    yield {"image": image, "task": name, "ref": ref, "label": label, "probability": probability}


def finish_folder(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Deletes the unfinished files of killed workers; returns unreadable images, rows and bytes of the part files."""
    from pyarrow import parquet

    left_out = rows = size_bytes = 0
    for part in range(manifest.num_parts):
        path = folder / PART.format(part)
        if not path.exists():
            raise DataError(
                f"{str(path)!r} was written by a worker but is missing on this node; put --out on storage that all "
                "nodes share."
            )
        footer = parquet.read_metadata(path)
        left_out += json.loads(footer.metadata[METADATA.encode()])["left_out"]
        rows += footer.num_rows
        size_bytes += path.stat().st_size
    for path in folder.iterdir():
        if is_unfinished(path, PART_FORM):
            path.unlink(missing_ok=True)
    return {"left_out": left_out, "rows": rows - left_out, "size_bytes": size_bytes}
