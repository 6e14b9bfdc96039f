"""Parallel `learn-many` on a Ray cluster: each row of the file is a Ray task, run after the rows that it extends."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from graphlib import TopologicalSorter
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import torch

from addenda.backbones import FrozenBackbone
from addenda.distributed.cluster import Workplace, check_shared, worker_capacity
from addenda.exceptions import DataError
from addenda.learner import ActivationCache, Learner, LearnRow, Outcome
from addenda.learner.context import Report, silent
from addenda.learner.many import LearnManyResults, LearnResult, attempt, extended_refs
from addenda.registry import Registry, Task

RETRIES = 3
"""How often a row is restarted after its worker or its node was lost."""
MAX_SHOWN = 3
"""Most rows whose progress is shown by name."""
REFRESH_S = 1.0
"""Seconds between progress updates, both written by a worker and read by the driver."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearningJob:
    """How the workers learn rows."""

    workplace: Workplace
    cpus: int = 1  # per row, and its threads, which are part of the numerics fingerprint
    gpus: float = 0  # per row, at most 1
    new_version: bool = False
    skip_bad: bool = False
    cache_gb: float | None = None  # budget of the activation cache on each node, as in `ActivationCache`


def learn_on_cluster(
    job: LearningJob, rows: Sequence[LearnRow], registry: Registry, report: Report = silent
) -> list[Outcome]:
    """Learns tasks, each after those that it extends, on the cluster that this process is connected to.

    The artifacts equal those of `learn_many`. A row whose worker is lost is restarted on another one. An interrupted
    run is resumed by calling this again with the same rows.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    check_shared(registry)
    worker_capacity("task", job.cpus, job.gpus)
    learn: Any = ray.remote(num_cpus=job.cpus, num_gpus=job.gpus, max_retries=RETRIES)(_learn)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(ProgressBoard).options(num_cpus=0, scheduling_strategy=here).remote()
    results = LearnManyResults(registry, rows)
    outcomes: dict[int, Outcome] = {}
    running: dict[Any, int] = {}
    order = TopologicalSorter(predecessors(rows))
    order.prepare()

    def finish(index: int, seconds: float, result: LearnResult) -> None:
        outcomes[index] = results.add(rows[index], seconds, result)
        order.done(index)

    while order.is_active():
        for index in sorted(order.get_ready()):
            row, obstacle = rows[index], results.obstacle(rows[index])
            if obstacle:
                finish(index, 0.0, LearnResult(reason=obstacle))
            else:
                running[learn.options(name=f"learn {row.name}").remote(job, row, board)] = index
        for reference in ray.wait(list(running), timeout=REFRESH_S)[0] if running else ():
            index = running.pop(reference)
            finish(index, *_result(reference, rows[index]))
        notes: dict[str, str] = {}
        with suppress(ray.exceptions.RayError):  # the actor was lost, or does not respond in time
            notes = ray.get(board.read.remote(), timeout=REFRESH_S)
        names = (rows[index].name for index in running.values())
        started = [f"{name}: {notes[name]}" for name in names if name in notes]
        more = [f"and {len(started) - MAX_SHOWN} more"] if len(started) > MAX_SHOWN else []
        report(", ".join(["learning tasks", *started[:MAX_SHOWN], *more]), len(outcomes), len(rows))
    return [outcomes[index] for index in range(len(rows))]


def predecessors(rows: Sequence[LearnRow]) -> dict[int, set[int]]:
    """The indices of the earlier rows that each row waits for, so that it sees the same tasks as in sequence.

    A row waits for the rows that it extends, and for rows that extend an older task of its own name. A row with
    `extends="auto"` waits for all earlier rows, and all later rows wait for it.
    """
    waits_for: dict[int, set[int]] = {}
    start = 0
    for index, row in enumerate(rows):
        auto = row.config.extends == "auto"
        waits_for[index] = {
            earlier
            for earlier in range(start, index)
            if auto
            or rows[earlier].config.extends == "auto"
            or rows[earlier].name in extended_refs(row.config)
            or row.name in extended_refs(rows[earlier].config)
        }
        if auto:
            start = index
    return waits_for


def _result(reference: Any, row: LearnRow) -> tuple[float, LearnResult]:
    """Seconds that a row took and its result; logs the warnings of its worker."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        seconds, result, warnings = ray.get(reference)
    except RayTaskError as error:  # before the row started, for example because the worker lacks the package
        log.debug("Task %r:", row.name, exc_info=True)
        return 0.0, LearnResult(reason=f"its worker could not start: {str(error.cause).strip().splitlines()[-1]}")
    except RayError as error:
        return 0.0, LearnResult(reason=f"its worker was lost {RETRIES + 1} times ({type(error).__name__})")
    for level, message in warnings:
        log.log(level, "%s: %s", row.name, message)
    return seconds, result


def _learn(job: LearningJob, row: LearnRow, board: Any) -> tuple[float, LearnResult, list[tuple[int, str]]]:
    """Learns a row on a worker: seconds, result, and the warnings logged meanwhile."""
    import ray

    started = time.perf_counter()
    report = _reporter(board, row.name)
    report("starting", 0, 1)
    torch.set_num_threads(job.cpus)

    def learn() -> Task:
        for data in (row.data, row.test):
            if isinstance(data, str | Path) and not Path(data).exists():
                raise DataError(
                    f"{str(data)!r} does not exist on node {ray.util.get_node_ip_address()}; the data must be at the "
                    "same path on every node."
                )
        _, registry, backbone = _opened(job.workplace)
        learner = Learner(backbone, registry, ActivationCache(budget_gb=job.cache_gb))
        return learner.learn(row.name, row.data, row.test, row.config, job.new_version, job.skip_bad, report=report)

    warnings, logger = BufferingHandler(sys.maxsize), logging.getLogger("addenda")
    warnings.setLevel(logging.WARNING)
    logger.addHandler(warnings)
    try:
        result = attempt(row.name, learn)
    finally:
        logger.removeHandler(warnings)
    messages = [(record.levelno, warnings.format(record)) for record in warnings.buffer]
    return time.perf_counter() - started, result, messages


@lru_cache(maxsize=1)
def _opened(workplace: Workplace) -> tuple[ExitStack, Registry, FrozenBackbone]:
    """A worker's registry and backbone, reused from row to row; they stay open as long as the stack is referenced."""
    stack = ExitStack()
    return stack, *stack.enter_context(workplace.opened())


class ProgressBoard:
    """State of an actor: the latest progress note of each row. Learning continues if the actor is lost."""

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}

    def write(self, name: str, note: str) -> None:
        """Replaces the note of a row."""
        self._notes[name] = note

    def read(self) -> dict[str, str]:
        """The latest note of each row."""
        return self._notes


def _reporter(board: Any, name: str) -> Report:
    """A progress callback that writes a row's note on a board at most once in `REFRESH_S` seconds."""
    last_s = -REFRESH_S

    def report(what: str, done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= REFRESH_S:
            last_s = time.monotonic()
            board.write.remote(name, f"{what.partition(',')[0]} {done}/{total}")

    return report
