"""Snapshots: one registry generation, loaded for serving and replaced as a whole."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice
from typing import Any

from addenda.backbones import FrozenBackbone
from addenda.combined import CombinedModel, numerics, numerics_fingerprint, verdicts
from addenda.exceptions import AddendaError, RegistryError, RegistryUnavailableError
from addenda.registry import Golden, Registry, Task, TaskRecord, select_tasks
from addenda.serving.answers import AnswerPlan
from addenda.text import plural

WAIT_S = 1.0
"""Seconds that one wait for a registry change lasts; stopping may take as long."""
RETRY_S = 1.0
"""Seconds between retries when the database is unavailable."""
STOP_S = 5.0
"""Seconds to wait for the follower's thread when the server stops."""

log = logging.getLogger(__name__)

RecordedTask = tuple[Task, list[Golden]]
Background = Callable[[Callable[[], "Snapshot"]], "Snapshot"]
"""Runs a function on the thread that runs the model, in slices that give way to requests."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One registry generation, ready to serve. Every response comes from a single snapshot."""

    generation: int
    model: CombinedModel
    records: Mapping[str, TaskRecord]  # of the served tasks, by name
    quarantined: dict[str, str]  # reasons by reference, of versions that failed their checks
    numerics: Mapping[str, Any]  # of the thread that runs the model; a worker has none

    @cached_property
    def numerics_fingerprint(self) -> str:
        """The numerics fingerprint of all responses."""
        return numerics_fingerprint(self.numerics)

    @property
    def refs(self) -> dict[str, str]:
        """The references of the served versions, by task name."""
        return {name: record.ref for name, record in self.records.items()}

    def select(self, selectors: Sequence[str] | None = None, tag: str | None = None) -> tuple[str, ...]:
        """The names of the selected tasks; see `select_tasks`."""
        return tuple(select_tasks(self.records, selectors, tag, self.absence))

    @cached_property
    def plan(self) -> Callable[..., AnswerPlan]:
        """Returns the plan of answering with the tasks of some names; eight are kept."""
        tasks = self.model.tasks  # not `self`: that cycle would keep the model until a garbage collection
        return lru_cache(maxsize=8)(lambda *names: AnswerPlan([tasks[name] for name in names]))

    def state(self, ref: str) -> tuple[str, str | None]:
        """The state of a version, "serving", "quarantined" or "not served", and the reason if quarantined."""
        served = self.records.get(ref.partition(":")[0])
        if served is not None and served.ref == ref:
            return "serving", None
        return ("quarantined" if ref in self.quarantined else "not served"), self.quarantined.get(ref)

    def absence(self, name: str, also: Sequence[str] = ()) -> str:
        """Why a name is not served, as the rest of a sentence; `also` are names to list before the served tasks."""
        reasons = {ref.rpartition(":")[0]: reason for ref, reason in self.quarantined.items()}
        if name in reasons:
            return f"is quarantined. {reasons[name]}"
        listed = [repr(served) for served in islice(chain(also, self.model.tasks), 10)]
        num_more = len(also) + len(self.model.tasks) - len(listed)
        return f"is not served. Served: {', '.join(listed) or 'none'}{f' and {num_more} more' if num_more else ''}."


def empty_snapshot(backbone: FrozenBackbone) -> Snapshot:
    """A snapshot before the first one of a registry."""
    return Snapshot(0, CombinedModel(backbone, []), {}, {}, {})


def next_snapshot(
    previous: Snapshot, registry: Registry, alias: str | None = None, background: Background = lambda load: load()
) -> Snapshot:
    """The snapshot of the registry's current generation; it shares the tasks that `previous` already serves.

    Tasks are loaded and golden probes computed in the background. A task is quarantined if its stored bytes have
    changed, its golden probe differs, or this machine cannot compute it exactly: it is reported, and the others are
    served. It is checked again at every registry change.
    """
    generation, current = registry.current(previous.model.backbone, alias)
    quarantined: dict[str, str] = {}
    served = {(task.ref, task.sha256): task for task in previous.model.tasks.values()}
    verified = {record.ref: served[key] for record in current if (key := (record.ref, record.sha256)) in served}
    new = []
    for record in current:
        if record.ref not in verified:
            try:
                new.append((registry.get(record.ref), registry.goldens(record.ref)))
            except RegistryUnavailableError:
                raise
            except AddendaError as error:
                quarantined[record.ref] = str(error)

    def load() -> Snapshot:
        tasks = verified | {task.ref: task for task in _verified(previous.model, new, quarantined)}
        records = {record.name: record for record in current if record.ref in tasks}
        model = previous.model.with_tasks([tasks[record.ref] for record in records.values()])
        return Snapshot(generation, model, records, quarantined, numerics(model.backbone))

    return background(load)


def _verified(model: CombinedModel, new: Sequence[RecordedTask], quarantined: dict[str, str]) -> list[Task]:
    """The tasks whose golden probes match; on an error the batch is bisected, to quarantine only the faulty tasks."""
    if not new:
        return []
    try:
        results = verdicts(model.with_tasks([task for task, _ in new]), new)
    except Exception as error:  # a task of any content must not stop the others from being served
        if len(new) == 1:
            quarantined[new[0][0].ref] = str(error) or type(error).__name__
            if not isinstance(error, AddendaError):
                log.exception("Task %s cannot be computed", new[0][0].ref)
            return []
        halves = new[: len(new) // 2], new[len(new) // 2 :]
        return [task for half in halves for task in _verified(model, half, quarantined)]
    quarantined |= {verdict.task: f"Its golden probe {verdict.detail}." for verdict in results if not verdict.ok}
    return [task for (task, _), verdict in zip(new, results, strict=True) if verdict.ok]


class Follower:
    """Keeps a snapshot up to date with a registry in a background thread; the last one stays during an outage."""

    def __init__(self, backbone: FrozenBackbone, registry: Registry, alias: str | None, background: Background) -> None:
        self._registry, self._alias, self._background = registry, alias, background
        self._changed, self._stopping = threading.Condition(), threading.Event()
        self.snapshot: Snapshot = empty_snapshot(backbone)  # replaced as a whole, never mutated
        self.reachable = True  # whether the last registry query succeeded
        self._publish: Callable[[Snapshot], None] = lambda snapshot: None
        self._follow()
        self._thread = threading.Thread(target=self._run, name="addenda-follower", daemon=True)
        self._thread.start()

    def settle(self, generation: int, timeout_s: float) -> bool:
        """Waits until a generation or a later one is served; returns False on timeout. Blocks the calling thread."""
        with self._changed:
            return self._changed.wait_for(lambda: self.snapshot.generation >= generation, timeout_s)

    def subscribe(self, publish: Callable[[Snapshot], None]) -> Snapshot:
        """Returns the current snapshot; `publish` is called with each new one before it counts as served."""
        with self._changed:
            self._publish = publish
            return self.snapshot

    def stop(self) -> None:
        """Stops the thread; one that waits for a database that hangs ends with the process."""
        self._stopping.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._registry.wait(self.snapshot.generation, WAIT_S) != self.snapshot.generation:
                    self._follow()
                self.reachable = True
            except RegistryError as error:
                if self.reachable:
                    generation = self.snapshot.generation
                    log.error("The registry is unavailable; still serving generation %d: %s", generation, error)
                self.reachable = False
                self._stopping.wait(RETRY_S)
            except Exception:  # if the thread ended, this generation would be served forever
                log.exception("Loading the new generation failed; still serving %d", self.snapshot.generation)
                self._stopping.wait(RETRY_S)

    def _follow(self) -> None:
        started, previous = time.monotonic(), self.snapshot
        snapshot = next_snapshot(previous, self._registry, self._alias, self._background)
        with self._changed:
            self._publish(snapshot)
            self.snapshot = snapshot
            self._changed.notify_all()
        elapsed_ms = 1000 * (time.monotonic() - started)
        tasks = plural(len(snapshot.records), "task")
        log.info("Serving generation %d: %s, loaded in %.0f ms", snapshot.generation, tasks, elapsed_ms)
        if not (snapshot.records or snapshot.quarantined):
            condition = "is registered" if self._alias is None else f"has the alias {self._alias!r}"
            log.warning("No task is served: no task of backbone %s %s", snapshot.model.backbone.name, condition)
        for ref, reason in snapshot.quarantined.items():
            if previous.quarantined.get(ref) != reason:
                log.error("Task %s is quarantined: %s", ref, reason)
