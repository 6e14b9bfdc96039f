"""Batch prediction on a Ray cluster: images in, Parquet of all tasks' answers out, part by part."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.distributed.cluster import Workplace, check_shared, fetched, room
from addenda.distributed.manifest import (
    PART,
    PART_FORM,
    Manifest,
    check_same,
    paths_digest,
    read_manifest,
    write_manifest,
)
from addenda.distributed.parts import METADATA, Job, PartWriter, choose
from addenda.exceptions import AddendaError, DataError
from addenda.files import is_unfinished
from addenda.registry import Registry

if TYPE_CHECKING:
    import ray

PART_SIZE = 1000
"""Images in a part, unless told."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Question:
    """What is asked about the images.

    Attributes:
        refs: the tasks to answer; none means all that are active when the folder's manifest is written.
        top: most labels of each image and task, as `CombinedModel.predict` takes it.
        exact: as `CombinedModel` takes it.
        part_size: images in a part.
        skip_bad: whether images that cannot be read are left out, rather than end the run.
    """

    refs: Sequence[str] = ()
    top: int | None = None
    exact: bool = True
    part_size: int = PART_SIZE
    skip_bad: bool = False


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
    """What lies in the folder when a run is over, in numbers.

    Attributes:
        left_out: images that could not be read.
        exact: whether the tasks' bits depend on nothing but image, task, backbone and numerics.
        rows: labels given.
        computed_parts: parts that this run computed, of `computed_images`, on `nodes`, in `seconds`.
    """

    images: int
    left_out: int
    tasks: int
    exact: bool
    rows: int
    size_bytes: int
    parts: int
    computed_parts: int
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
    question: Question | None = None,
    crew: Crew | None = None,
    report: Report | None = None,
) -> Summary:
    """Answers tasks about many images, on the cluster that this process is connected to.

    The images, sorted, are cut into parts; each becomes `part-00000.parquet` and so on, of the columns image, task,
    ref, label and probability, as `CombinedModel.predict` gives them, bit for bit. In a row with `left_out` stands why
    an image could not be read. `manifest.json` says what the parts are of: a run that was cut short goes on with the
    parts that are missing, with the same tasks, and is refused where anything differs.

    Args:
        images: files that all nodes see at the same paths.
        folder: where the parts go; so too.
        registry: that of the workplace.
        place: what each worker opens.
        question: what is asked.
        crew: who answers.
        report: told of the progress in images.

    Raises:
        DataError: the folder holds other predictions.
        RegistryError: a task is not there, or the registry is not seen by all machines.
        AddendaError: no node has room for a worker; or a part could not be computed: an image cannot be read, a node
            computes with other numerics.
    """
    import ray

    started, question, crew = time.perf_counter(), question or Question(), crew or Crew()
    folder = folder.absolute()
    paths = sorted({str(path.absolute()) for path in images})
    check_shared(registry)
    places, before = _room(crew), read_manifest(folder)
    refs = question.refs or (() if before is None else tuple(before.tasks))
    if refs:
        place = replace(place, backbone=registry.record(refs[0]).backbone)
    choosing = ray.remote(num_cpus=crew.cpus, num_gpus=crew.gpus)(choose)  # this node may have no GPU
    manifest = Manifest(
        images=len(paths),
        images_sha256=paths_digest(paths),
        part_size=question.part_size,
        top=question.top,
        **fetched(choosing.remote(place, refs, question.exact, crew.cpus)),
    )
    if before is None:
        write_manifest(folder, manifest)
    else:
        check_same(folder, before, manifest)
        manifest = before
    missing: list[dict[str, Any]] = [
        {"part": part, "images": paths[manifest.bounds(part)]}
        for part in range(manifest.num_parts)
        if not (folder / PART.format(part)).exists()
    ]
    computed, nodes = 0, set[str]()
    earlier = len(paths) - sum(len(part["images"]) for part in missing)
    place = replace(place, backbone=manifest.backbone)
    job = Job(folder, place, manifest, crew.cpus, question.skip_bad)
    for outcome in _outcomes(job, missing, crew, crew.workers or places):
        if outcome["problem"]:
            raise AddendaError(f"{outcome['problem'].rstrip('.')}. What is done stays done: the same again goes on.")
        computed += outcome["images"]
        nodes.add(outcome["node"])
        if report is not None:
            report("predicting", earlier + computed, len(paths))
    return Summary(
        images=len(paths),
        tasks=len(manifest.tasks),
        exact=manifest.exact,
        parts=manifest.num_parts,
        computed_parts=len(missing),
        computed_images=computed,
        nodes=len(nodes),
        folder=str(folder),
        **_contents(folder, manifest),
        seconds=time.perf_counter() - started,
    )


def _room(crew: Crew) -> int:
    """How many workers the cluster has room for."""
    import ray

    found = room(crew.cpus, crew.gpus)
    if not found:
        nodes, gpus = sum(node["Alive"] for node in ray.nodes()), f" and {crew.gpus:g} GPUs" if crew.gpus else ""
        raise AddendaError(f"None of the cluster's {nodes} nodes has the {crew.cpus} CPUs{gpus} of a worker.")
    return found


def _outcomes(job: Job, parts: Sequence[Mapping[str, Any]], crew: Crew, workers: int) -> Iterator[dict[str, Any]]:
    """What the workers say of each part, as they finish it."""
    import ray

    if not parts:
        return
    worker: Any = _Worker  # Ray's types know of functions only
    with _quiet():
        # One part in a block, and one block at a worker: a worker that dies has lost one part.
        pool = ray.data.ActorPoolStrategy(size=min(workers, len(parts)), max_tasks_in_flight_per_actor=1)
        yield from (
            ray.data.from_items(list(parts), override_num_blocks=len(parts))
            .map(
                worker,
                fn_constructor_args=(ray.put(job),),  # its text would be shown, and a registry's URL has a password
                compute=pool,
                num_cpus=crew.cpus,
                num_gpus=crew.gpus,
            )
            .iter_rows()
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data says what it does in its log file alone, and draws no bars."""
    from ray.data import DataContext

    context = DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    shown = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [handler.level for handler in shown]
    for handler in shown:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        for handler, level in zip(shown, levels, strict=True):
            handler.setLevel(level)


class _Worker:
    """A `PartWriter` as Ray Data's actors hold it."""

    def __init__(self, job: ray.ObjectRef[Job]) -> None:
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


def _contents(folder: Path, manifest: Manifest) -> dict[str, int]:
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
