"""Batch prediction on a Ray cluster: images in, Parquet of all tasks' answers out, part by part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.distributed.cluster import Workplace, check_shared, fetched, room
from addenda.distributed.parts import (
    Manifest,
    PartWriter,
    PredictionJob,
    choose,
    contents,
    kept,
    paths_digest,
    read_manifest,
)
from addenda.exceptions import AddendaError
from addenda.registry import Registry

if TYPE_CHECKING:
    import ray

PART_SIZE = 1000
"""Images in a part, unless told."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Question:
    """What is asked about the images."""

    refs: Sequence[str] = ()  # the tasks; none means all that are active when the folder's manifest is written
    top: int | None = None  # as `CombinedModel.predict` takes it
    exact: bool = True
    part_size: int = PART_SIZE
    skip_bad: bool = False  # whether images that cannot be read are left out, rather than end the run


@dataclass(frozen=True)
class Crew:
    """The workers of a run: how many at most (None: as many as there is room for), and what each takes.

    Each computes on as many threads as it has CPUs; with a part of a GPU several share one.
    """

    workers: int | None = None
    cpus: int = 1
    gpus: float = 0.0


@dataclass(frozen=True)
class Summary:
    """What lies in the folder when a run is over, in numbers."""

    images: int
    left_out: int  # images that could not be read
    tasks: int
    exact: bool
    rows: int  # labels given
    size_bytes: int
    parts: int
    computed_parts: int  # by this run, of `computed_images`, on `nodes`, in `seconds`
    computed_images: int
    nodes: int
    seconds: float
    folder: str

    @property
    def images_per_second(self) -> float:
        """Images that this run computed, by its time, the start of its workers included."""
        return self.computed_images / self.seconds


def predict_many(
    images: Sequence[Path],
    folder: Path,
    registry: Registry,
    place: Workplace,
    question: Question,
    crew: Crew,
    report: Report | None = None,
) -> Summary:
    """Answers tasks about many images, on the cluster that this process is connected to.

    The images, sorted, are cut into parts; each becomes `part-00000.parquet` and so on, of the columns image, task,
    ref, label and probability, as `CombinedModel.predict` gives them, bit for bit. In a row with `left_out` stands why
    an image could not be read. `manifest.json` says what the parts are of: a run that was cut short goes on with the
    parts that are missing, with the same tasks, and is refused where anything differs. All nodes see the images and the
    folder at the same paths.
    """
    import ray

    started, folder = time.perf_counter(), folder.absolute()
    paths = sorted({str(path.absolute()) for path in images})
    check_shared(registry)
    places, before = room(crew.cpus, crew.gpus), read_manifest(folder)
    if not places:
        nodes, gpus = sum(node["Alive"] for node in ray.nodes()), f" and {crew.gpus:g} GPUs" if crew.gpus else ""
        raise AddendaError(f"None of the cluster's {nodes} nodes has the {crew.cpus} CPUs{gpus} of a worker.")
    refs = question.refs or (() if before is None else tuple(before.tasks))
    if refs:
        place = replace(place, backbone=registry.record(refs[0]).backbone)
    choosing = ray.remote(num_cpus=crew.cpus, num_gpus=crew.gpus)(choose)  # this node may have no GPU
    asked = Manifest(
        images=len(paths),
        images_sha256=paths_digest(paths),
        part_size=question.part_size,
        top=question.top,
        **fetched(choosing.remote(place, refs, question.exact, crew.cpus)),
    )
    manifest = kept(folder, before, asked)
    missing = manifest.missing(folder, paths)
    computed, at_work = 0, set[str]()
    earlier = len(paths) - sum(len(part["images"]) for part in missing)
    place = replace(place, backbone=manifest.backbone)
    job = PredictionJob(folder, place, manifest, crew.cpus, question.skip_bad)
    for outcome in _outcomes(job, missing, crew, crew.workers or places):
        if outcome["problem"]:
            raise AddendaError(f"{outcome['problem'].rstrip('.')}. What is done stays done: the same again goes on.")
        computed += outcome["images"]
        at_work.add(outcome["node"])
        if report is not None:
            report("predicting", earlier + computed, len(paths))
    return Summary(
        images=len(paths),
        tasks=len(manifest.tasks),
        exact=manifest.exact,
        parts=manifest.num_parts,
        computed_parts=len(missing),
        computed_images=computed,
        nodes=len(at_work),
        folder=str(folder),
        **contents(folder, manifest),
        seconds=time.perf_counter() - started,
    )


def _outcomes(job: PredictionJob, parts: list[dict[str, Any]], crew: Crew, workers: int) -> Iterator[dict[str, Any]]:
    """What the workers say of each part, as they finish it."""
    import ray

    if not parts:
        return
    worker: Any = _Worker  # Ray's types know of functions only
    hidden = (ray.put(job),)  # its text would be shown, and a registry's URL has a password
    with _quiet():
        # One part in a block, and one block at a worker: a worker that dies has lost one part.
        pool = ray.data.ActorPoolStrategy(size=min(workers, len(parts)), max_tasks_in_flight_per_actor=1)
        items = ray.data.from_items(parts, override_num_blocks=len(parts))
        asked = items.map(worker, fn_constructor_args=hidden, compute=pool, num_cpus=crew.cpus, num_gpus=crew.gpus)
        yield from asked.iter_rows()


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data says what it does in its log file alone, and draws no bars."""
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
    """A `PartWriter` as Ray Data's actors hold it."""

    def __init__(self, job: ray.ObjectRef[PredictionJob]) -> None:
        self._job = job

    @cached_property
    def _parts(self) -> PartWriter:
        import ray

        return PartWriter(ray.get(self._job))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes a part; an error is told as text, since Ray's would have a traceback around it."""
        import ray

        part, images, problem = int(row["part"]), [str(image) for image in row["images"]], ""
        try:
            self._parts.write(part, images)
        except (AddendaError, OSError) as error:
            problem = str(error)
        return {"images": len(images), "node": ray.get_runtime_context().get_node_id(), "problem": problem}
