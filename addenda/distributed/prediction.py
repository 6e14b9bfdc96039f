"""Batch prediction on a Ray cluster: reads images and writes the predictions of all tasks as Parquet part files."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from addenda.backbones import Files, read_files
from addenda.combined import CombinedModel, numerics, numerics_fingerprint
from addenda.distributed.cluster import Workplace, check_shared, fetch, worker_capacity
from addenda.exceptions import AddendaError, DataError, ExactnessError, IntegrityError
from addenda.files import is_unfinished, written
from addenda.learner.context import Report, silent
from addenda.registry import Registry, canonical_json
from addenda.text import differences

if TYPE_CHECKING:
    import ray

PART_SIZE = 1000
"""Default number of images per part file."""
FILE = "manifest.json"
PART, PART_FORM = "part-{:05d}.parquet", r"part-\d{5,}\.parquet"
METADATA = "addenda"
"""Metadata key of a part file: canonical JSON that makes its predictions traceable and counts its images."""
COLUMNS = ("image", "task", "ref", "label", "probability", "left_out")
MAX_NAMED = 5
"""Most differences that an error message names."""


@dataclass(frozen=True)
class PredictionJob:
    """What the workers predict, and their number and resources."""

    workplace: Workplace
    refs: Sequence[str] = ()  # the tasks; empty: all tasks active when the manifest is written
    top: int | None = None  # as in `CombinedModel.predict`
    min_probability: float | None = None  # as well
    exact: bool = True
    part_size: int = PART_SIZE
    skip_bad: bool = False  # whether to skip unreadable images instead of ending the run
    workers: int | None = None  # at most; None: as many as the cluster can hold
    cpus: int = 1  # of each worker, and its threads
    gpus: float = 0.0  # of each worker; below 1 several share a GPU


@dataclass(frozen=True)
class Manifest:
    """Everything that determines the bytes of the part files in a folder, written before the first of them."""

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
    min_probability: float | None = None  # as in `CombinedModel.predict`; not in manifests of earlier versions


@dataclass(frozen=True)
class Summary:
    """Counts of a finished folder and of the run that finished it."""

    images: int
    left_out: int  # unreadable images
    tasks: int
    exact: bool
    rows: int  # predicted labels
    size_bytes: int
    parts: int
    computed_parts: int  # by this run, as are the following
    computed_images: int
    nodes: int
    seconds: float
    folder: str

    @property
    def images_per_second(self) -> float:
        """Throughput of this run, including the start of its workers."""
        return self.computed_images / self.seconds


def predict_many(
    job: PredictionJob, images: Sequence[Path], folder: Path, registry: Registry, report: Report = silent
) -> Summary:
    """Predicts many images on the cluster that this process is connected to.

    The images are sorted and divided into `part-00000.parquet` and so on, with the columns image, task, ref, label and
    probability; the values are those of `CombinedModel.predict`, bit for bit. For an unreadable image, `left_out` holds
    the reason. `manifest.json` records what the files depend on: an interrupted run is resumed with the same tasks and
    computes only the missing files; a run that differs is refused. All nodes need the images and the folder at the same
    paths.
    """
    import ray

    started, folder = time.perf_counter(), folder.absolute()
    paths = sorted({str(path.absolute()) for path in images})
    check_shared(registry)
    capacity, before = worker_capacity("worker", job.cpus, job.gpus), read_manifest(folder)
    refs = job.refs or (() if before is None else tuple(before.tasks))
    if refs:
        job = replace(job, refs=refs, workplace=replace(job.workplace, backbone=registry.record(refs[0]).backbone))
    resolve: Any = ray.remote(num_cpus=job.cpus, num_gpus=job.gpus)(resolve_tasks)  # this node may have no GPU
    manifest = Manifest(
        images=len(paths),
        images_sha256=_digest(paths),
        part_size=job.part_size,
        top=job.top,
        min_probability=job.min_probability,
        **fetch(resolve.remote(job)),
    )
    manifest = _ensure_manifest(folder, before, manifest)
    job = replace(job, workplace=replace(job.workplace, backbone=manifest.backbone))
    parts: list[dict[str, Any]] = [
        {"file": str(folder / PART.format(number)), "images": paths[start : start + job.part_size]}
        for number, start in enumerate(range(0, len(paths), job.part_size))
    ]
    missing = [part for part in parts if not Path(part["file"]).exists()]
    computed, nodes_used = 0, set[str]()
    done_before = len(paths) - sum(len(part["images"]) for part in missing)
    for outcome in _outcomes(job, manifest, missing, capacity):
        if outcome["problem"]:
            raise AddendaError(
                f"{outcome['problem'].rstrip('.')}. Finished part files are kept; repeat the command to continue."
            )
        computed += outcome["images"]
        nodes_used.add(outcome["node"])
        report("predicting", done_before + computed, len(paths))
    return Summary(
        images=len(paths),
        tasks=len(manifest.tasks),
        exact=manifest.exact,
        parts=len(parts),
        computed_parts=len(missing),
        computed_images=computed,
        nodes=len(nodes_used),
        folder=str(folder),
        **_finish(folder, [Path(part["file"]) for part in parts]),
        seconds=time.perf_counter() - started,
    )


def resolve_tasks(job: PredictionJob) -> dict[str, Any]:
    """The manifest's fields on tasks and numerics; without `refs`, all active tasks. Runs the self-test."""
    torch.set_num_threads(job.cpus)
    with job.workplace.opened() as (registry, backbone):
        generation, active = registry.current(backbone)
        tasks = [registry.get(ref) for ref in job.refs or [record.ref for record in active]]
    if not tasks:
        raise DataError("The registry has no active task; add one with `addenda learn`.")
    described = numerics(backbone)
    return {
        "exact": CombinedModel(backbone, tasks, job.exact).exact,
        "backbone": backbone.fingerprint,
        "tasks": {task.ref: task.sha256 for task in tasks},
        "numerics": described,
        "numerics_fingerprint": numerics_fingerprint(described),
        "generation": generation,
    }


def _outcomes(
    job: PredictionJob, manifest: Manifest, parts: list[dict[str, Any]], capacity: int
) -> Iterator[dict[str, Any]]:
    """The outcome of each part, as the workers finish them."""
    import ray.data

    if not parts:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # Ray Data also has a log file
            handler.setLevel(logging.ERROR)
    writer: Any = PartWriter  # Ray's annotations accept functions only
    # A reference: Ray would show the job's text, and a registry URL may have a password.
    arguments = (ray.put((job, manifest)),)
    # One part per block and one block per worker, so that a worker that dies loses one part.
    size = min(job.workers or capacity, len(parts))
    pool = ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
    items = ray.data.from_items(parts, override_num_blocks=len(parts))
    outcomes = items.map(writer, fn_constructor_args=arguments, compute=pool, num_cpus=job.cpus, num_gpus=job.gpus)
    yield from outcomes.iter_rows()


class PartWriter:
    """Computes the predictions of a part and writes its file atomically; an actor of Ray Data.

    Ray Data's `write_parquet` names its files anew in each run and writes them in place, so parts could be duplicated
    or truncated.
    """

    def __init__(self, arguments: ray.ObjectRef[tuple[PredictionJob, Manifest]]) -> None:
        import ray

        self._job, self._manifest = ray.get(arguments)
        self._node = ray.get_runtime_context().get_node_id()

    @cached_property
    def _model(self) -> CombinedModel:
        return open_model(self._job, self._manifest)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """Writes a part. Returns an error as text, because Ray would wrap an exception in a traceback."""
        images, problem = [str(image) for image in part["images"]], ""
        try:
            self._write(Path(part["file"]), images)
        except (AddendaError, OSError) as error:
            problem = str(error)
        return {"images": len(images), "node": self._node, "problem": problem}

    def _write(self, file: Path, images: Sequence[str]) -> None:
        """Computes a part and writes its file; a repeated call writes the same bytes."""
        import pyarrow
        from pyarrow import parquet

        torch.set_num_threads(self._job.cpus)  # a per-thread setting, and Ray may call from another thread
        types = (*[pyarrow.string()] * 4, pyarrow.float32(), pyarrow.string())
        schema = pyarrow.schema(zip(COLUMNS, types, strict=True))
        left_out: dict[str, str] = {}
        batches = []
        for files in read_files(self._model.backbone, images, self._model.micro_batch, self._job.skip_bad):
            left_out |= files.bad
            batches.append(pyarrow.RecordBatch.from_pylist(list(self._rows(files)), schema))
        keys = ("backbone", "exact", "generation", "numerics_fingerprint")
        about = {key: getattr(self._manifest, key) for key in keys} | {"images": len(images), "left_out": len(left_out)}
        table = pyarrow.Table.from_batches(batches, schema).replace_schema_metadata({METADATA: canonical_json(about)})
        with written(file) as unfinished:
            parquet.write_table(table, unfinished, compression="zstd")

    def _rows(self, files: Files[str]) -> Iterator[dict[str, Any]]:
        """One row per predicted label; for an unreadable image, one row with the reason."""
        top, least = self._manifest.top, self._manifest.min_probability
        predictions = self._model.predict_images(files.images, top, None, least) if files.paths else {}
        by_image = {name: dict(zip(files.paths, labels, strict=True)) for name, labels in predictions.items()}
        for image in files.asked:
            if image in files.bad:
                yield {"image": image, "left_out": files.bad[image]}
            for name, labels_of in by_image.items():
                ref = self._model.tasks[name].ref
                for label, probability in labels_of.get(image, ()):
                    yield {"image": image, "task": name, "ref": ref, "label": label, "probability": probability}


def open_model(job: PredictionJob, manifest: Manifest) -> CombinedModel:
    """The model of a worker; raises an error if its tasks or its numerics differ from the manifest's."""
    torch.set_num_threads(job.cpus)
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
    return CombinedModel(backbone, tasks, manifest.exact)


def _digest(paths: Sequence[str]) -> str:
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


def _ensure_manifest(folder: Path, before: Manifest | None, now: Manifest) -> Manifest:
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
    """The first few differences between two nested mappings as text; empty if they are equal."""
    found = [f"{key} was {_shortened(old)}, now {_shortened(new)}" for key, old, new in differences(before, now, " ")]
    return "; ".join(found[:MAX_NAMED]) + (f" and {len(found) - MAX_NAMED} more" if found[MAX_NAMED:] else "")


def _shortened(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 64 else f"{text[:12]}…"


def _finish(folder: Path, files: Sequence[Path]) -> dict[str, int]:
    """Deletes the unfinished files of killed workers; returns unreadable images, rows and bytes of the part files."""
    from pyarrow import parquet

    left_out = rows = size_bytes = 0
    for file in files:
        if not file.exists():
            raise DataError(
                f"{str(file)!r} was written by a worker but is missing on this node; put --out on storage that all "
                "nodes share."
            )
        footer = parquet.read_metadata(file)
        left_out += json.loads(footer.metadata[METADATA.encode()])["left_out"]
        rows += footer.num_rows
        size_bytes += file.stat().st_size
    for path in folder.iterdir():
        if is_unfinished(path, PART_FORM):
            path.unlink(missing_ok=True)
    return {"left_out": left_out, "rows": rows - left_out, "size_bytes": size_bytes}
