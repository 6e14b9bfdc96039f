"""Batch prediction on a Ray cluster: reads images and writes the predictions of all tasks as Parquet part files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.distributed.cluster import Workplace, check_shared, fetch, worker_capacity
from addenda.distributed.parts import (
    Manifest,
    PartWriter,
    PredictionJob,
    ensure_manifest,
    finish_folder,
    paths_digest,
    read_manifest,
    resolve_tasks,
)
from addenda.exceptions import AddendaError
from addenda.registry import Registry

if TYPE_CHECKING:
    import ray

PART_SIZE = 1000
"""Default number of images per part file."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Question:
    """What to predict."""

    refs: Sequence[str] = ()  # the tasks; empty: all tasks active when the manifest is written
    top: int | None = None  # as in `CombinedModel.predict`
    exact: bool = True
    part_size: int = PART_SIZE
    skip_bad: bool = False  # whether to skip unreadable images instead of ending the run


@dataclass(frozen=True)
class Crew:
    """The workers of a run and their resources."""

    workers: int | None = None  # at most; None: as many as the cluster can hold
    cpus: int = 1  # of each worker, and its threads
    gpus: float = 0.0  # of each worker; below 1 several share a GPU


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
    images: Sequence[Path],
    folder: Path,
    registry: Registry,
    workplace: Workplace,
    question: Question,
    crew: Crew,
    report: Report | None = None,
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
    capacity, before = worker_capacity(crew.cpus, crew.gpus), read_manifest(folder)
    if not capacity:
        nodes, gpus = sum(node["Alive"] for node in ray.nodes()), f" and {crew.gpus:g} GPUs" if crew.gpus else ""
        raise AddendaError(
            f"A worker needs {crew.cpus} CPUs{gpus}, which none of the cluster's {nodes} nodes has; lower --cpus or "
            "--gpus."
        )
    refs = question.refs or (() if before is None else tuple(before.tasks))
    if refs:
        workplace = replace(workplace, backbone=registry.record(refs[0]).backbone)
    resolve: Any = ray.remote(num_cpus=crew.cpus, num_gpus=crew.gpus)(resolve_tasks)  # this node may have no GPU
    requested = Manifest(
        images=len(paths),
        images_sha256=paths_digest(paths),
        part_size=question.part_size,
        top=question.top,
        **fetch(resolve.remote(workplace, refs, question.exact, crew.cpus)),
    )
    manifest = ensure_manifest(folder, before, requested)
    missing = manifest.missing(folder, paths)
    computed, nodes_used = 0, set[str]()
    done_before = len(paths) - sum(len(part["images"]) for part in missing)
    workplace = replace(workplace, backbone=manifest.backbone)
    job = PredictionJob(folder, workplace, manifest, crew.cpus, question.skip_bad)
    for outcome in _outcomes(job, missing, crew, crew.workers or capacity):
        if outcome["problem"]:
            raise AddendaError(
                f"{outcome['problem'].rstrip('.')}. Finished part files are kept; repeat the command to continue."
            )
        computed += outcome["images"]
        nodes_used.add(outcome["node"])
        if report is not None:
            report("predicting", done_before + computed, len(paths))
    return Summary(
        images=len(paths),
        tasks=len(manifest.tasks),
        exact=manifest.exact,
        parts=manifest.num_parts,
        computed_parts=len(missing),
        computed_images=computed,
        nodes=len(nodes_used),
        folder=str(folder),
        **finish_folder(folder, manifest),
        seconds=time.perf_counter() - started,
    )


def _outcomes(job: PredictionJob, parts: list[dict[str, Any]], crew: Crew, workers: int) -> Iterator[dict[str, Any]]:
    """The outcome of each part, as the workers finish them."""
    import ray

    if not parts:
        return
    worker: Any = _Worker  # Ray's annotations accept functions only
    arguments = (ray.put(job),)  # a reference: Ray would show the job's text, and a registry URL may have a password
    with _quiet():
        # One part per block and one block per worker, so that a worker that dies loses one part.
        pool = ray.data.ActorPoolStrategy(size=min(workers, len(parts)), max_tasks_in_flight_per_actor=1)
        items = ray.data.from_items(parts, override_num_blocks=len(parts))
        outcomes = items.map(
            worker, fn_constructor_args=arguments, compute=pool, num_cpus=crew.cpus, num_gpus=crew.gpus
        )
        yield from outcomes.iter_rows()


@contextmanager
def _quiet() -> Iterator[None]:
    """Restricts Ray Data to its log file, without progress bars."""
    from ray.data import DataContext

    context = DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    handlers = logging.getLogger("ray.data").handlers
    levels = {handler: handler.level for handler in handlers if isinstance(handler, logging.StreamHandler)}
    for handler in levels:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        for handler, level in levels.items():
            handler.setLevel(level)


class _Worker:
    """A `PartWriter` in an actor of Ray Data."""

    def __init__(self, job: ray.ObjectRef[PredictionJob]) -> None:
        self._job = job

    @cached_property
    def _writer(self) -> PartWriter:
        import ray

        return PartWriter(ray.get(self._job))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes a part. Returns an error as text, because Ray would wrap an exception in a traceback."""
        import ray

        part, images, problem = int(row["part"]), [str(image) for image in row["images"]], ""
        try:
            self._writer.write(part, images)
        except (AddendaError, OSError) as error:
            problem = str(error)
        return {"images": len(images), "node": ray.get_runtime_context().get_node_id(), "problem": problem}
