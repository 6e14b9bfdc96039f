"""Learning many tasks at once: each row of a file is a task of a Ray cluster, after those that it builds on."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from graphlib import TopologicalSorter
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import torch

from addenda.backbones import FrozenBackbone
from addenda.distributed.cluster import Workplace, check_shared, room
from addenda.exceptions import AddendaError, DataError
from addenda.learner import ActivationCache, Learner, LearnRow, Outcome
from addenda.learner.context import Report
from addenda.learner.many import Became, LearnManyResults, attempt, named
from addenda.registry import Registry, Task

RETRIES = 3
"""How often a row is begun again because its worker, or the node under it, was lost."""
SHOWN = 3
"""Rows whose progress is shown in words."""
REFRESH_S = 1.0
"""How often a worker says how far it is, and how often that is read."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearningJob:
    """How rows are learned by the workers."""

    place: Workplace
    cpus: int = 1  # of a row: that many threads compute it, which is part of the numerics fingerprint
    gpus: float = 0  # a row's share of one, at most 1
    new_version: bool = False
    skip_bad: bool = False
    cache_gb: float | None = None  # the most that kept activations take on a node's disk; as for `ActivationCache`


def learn_on_cluster(
    job: LearningJob, rows: Sequence[LearnRow], registry: Registry, report: Report | None = None
) -> list[Outcome]:
    """Learns tasks, each after those that it extends, on the cluster that this process is connected to.

    Their artifacts are those of `learn_many`. A row whose worker is lost is begun again elsewhere. A run that was
    interrupted is taken up by another with the same rows.
    """
    import ray

    check_shared(registry)
    if not room(job.cpus, job.gpus):  # a row would wait for ever
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        largest = ", ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
        raise AddendaError(
            f"A task takes {job.cpus} CPUs and {job.gpus:g} GPUs of one node; the nodes have {largest}. Ask for less: "
            "--cpus, --gpus."
        )
    learn: Any = ray.remote(num_cpus=job.cpus, num_gpus=job.gpus, max_retries=RETRIES)(_learn)
    board, results = Board(), LearnManyResults(registry, rows)
    outcomes: dict[int, Outcome] = {}
    running: dict[Any, int] = {}
    order = TopologicalSorter(predecessors(rows))
    order.prepare()

    def finish(index: int, seconds: float, became: Became) -> None:
        outcomes[index] = results.add(rows[index], seconds, became)
        order.done(index)

    while order.is_active():
        for index in sorted(order.get_ready()):
            row, obstacle = rows[index], results.obstacle(rows[index])
            if obstacle:
                finish(index, 0.0, Became(reason=obstacle))
            else:
                running[learn.options(name=f"learn {row.name}").remote(job, row, board)] = index
        for answer in ray.wait(list(running), timeout=REFRESH_S)[0] if running else ():
            index = running.pop(answer)
            finish(index, *_received(answer, rows[index]))
        if report is not None:
            at = board.read()
            begun = [f"{name}: {at[name]}" for name in (rows[index].name for index in running.values()) if name in at]
            more = [f"and {len(begun) - SHOWN} more"] if len(begun) > SHOWN else []
            report(", ".join(["learning tasks", *begun[:SHOWN], *more]), len(outcomes), len(rows))
    return [outcomes[index] for index in range(len(rows))]


def predecessors(rows: Sequence[LearnRow]) -> dict[int, set[int]]:
    """The earlier rows that each waits for, by their numbers from 0, so that it sees what it would see in order.

    It waits for those that it extends, and for those that extend an older task of its own name. One that extends
    `"auto"` waits for all, and all later ones wait for it.
    """
    found: dict[int, set[int]] = {}
    start = 0
    for index, row in enumerate(rows):
        auto = row.config.extends == "auto"
        found[index] = {
            earlier
            for earlier in range(start, index)
            if auto
            or rows[earlier].config.extends == "auto"
            or rows[earlier].name in named(row.config)
            or row.name in named(rows[earlier].config)
        }
        if auto:
            start = index
    return found


def _received(answer: Any, row: LearnRow) -> tuple[float, Became]:
    """How long a row took its worker, and what became of it."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        seconds, became, said = ray.get(answer)
    except RayTaskError as error:  # before the row was begun: the worker lacks the package, say
        log.debug("Task %r:", row.name, exc_info=True)
        return 0.0, Became(reason=f"its worker could not begin: {str(error.cause).strip().splitlines()[-1]}")
    except RayError as error:
        return 0.0, Became(reason=f"{RETRIES + 1} workers were lost over it ({type(error).__name__})")
    for level, message in said:
        log.log(level, "%s: %s", row.name, message)
    return seconds, became


def _learn(job: LearningJob, row: LearnRow, board: Board) -> tuple[float, Became, list[tuple[int, str]]]:
    """Learns a row, on a worker: what `_received` gives, and what was warned of meanwhile."""
    import ray

    started = time.perf_counter()
    report = board.reporter(row.name)
    report("beginning", 0, 1)
    torch.set_num_threads(job.cpus)

    def learn() -> Task:
        for data in (row.data, row.test):
            if isinstance(data, str | Path) and not Path(data).exists():
                raise DataError(
                    f"Node {ray.util.get_node_ip_address()} does not see {str(data)!r}: every node must see the data, "
                    "at the same path."
                )
        _, registry, backbone = _opened(job.place)
        learner = Learner(backbone, registry, ActivationCache(budget_gb=job.cache_gb))
        return learner.learn(row.name, row.data, row.test, row.config, job.new_version, job.skip_bad, report=report)

    warnings, logger = BufferingHandler(sys.maxsize), logging.getLogger("addenda")
    warnings.setLevel(logging.WARNING)
    logger.addHandler(warnings)
    try:
        became = attempt(row.name, learn)
    finally:
        logger.removeHandler(warnings)
    said = [(record.levelno, warnings.format(record)) for record in warnings.buffer]
    return time.perf_counter() - started, became, said


@lru_cache(maxsize=1)
def _opened(place: Workplace) -> tuple[ExitStack, Registry, FrozenBackbone]:
    """The registry and the backbone of a worker, kept from one row to the next for as long as the first is."""
    stack = ExitStack()
    return stack, *stack.enter_context(place.opened())


class Notes:
    """What each name is at: the state of an actor."""

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}

    def write(self, name: str, note: str) -> None:
        """Notes what a name is at now."""
        self._notes[name] = note

    def read(self) -> dict[str, str]:
        """What each was at last."""
        return self._notes


class Board:
    """Notes that all nodes can write, kept beside the driver; where they are lost, the work goes on unseen."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor: Any = ray.remote(Notes).options(num_cpus=0, scheduling_strategy=here).remote()

    def read(self) -> dict[str, str]:
        """What each was at last; nothing where the notes cannot be had in time."""
        import ray

        try:
            found: dict[str, str] = ray.get(self._actor.read.remote(), timeout=REFRESH_S)
        except ray.exceptions.RayError:
            return {}
        return found

    def reporter(self, name: str) -> Report:
        """A report of progress that notes, now and then, what a name is at."""
        said = -REFRESH_S

        def report(what: str, done: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said >= REFRESH_S:
                said = time.monotonic()
                self._actor.write.remote(name, f"{what.partition(',')[0]} {done}/{total}")

        return report
