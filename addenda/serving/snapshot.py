"""What is served at one moment: a generation of the registry, as one reference."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from addenda.backbones import FrozenBackbone
from addenda.combined import CombinedModel, verdicts
from addenda.exceptions import AddendaError, RegistryError, RegistryUnavailableError
from addenda.registry import Golden, Registry, Task, TaskRecord

WAIT_S = 1.0
"""How long one question for the next change waits: so long may it take to stop."""
RETRY_S = 1.0
"""Between questions to a database that does not answer."""

log = logging.getLogger(__name__)

Recorded = tuple[Task, list[Golden]]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One generation, served. An answer comes wholly from one snapshot."""

    generation: int
    model: CombinedModel
    records: Mapping[str, TaskRecord]  # of the tasks that it answers, by name
    quarantined: Mapping[str, str]  # why a version is not served although it should be, by its reference

    @property
    def refs(self) -> dict[str, str]:
        """The versions that it answers, by name."""
        return {name: record.ref for name, record in self.records.items()}

    def state(self, ref: str) -> tuple[str, str | None]:
        """Whether a version is "serving", "quarantined" (then with the reason) or "not served"."""
        served = self.records.get(ref.partition(":")[0])
        if served is not None and served.ref == ref:
            return "serving", None
        return ("quarantined" if ref in self.quarantined else "not served"), self.quarantined.get(ref)

    def absence(self, name: str, also: Sequence[str] = ()) -> str:
        """Why a name is not answered, in words to follow it; names to offer beside its tasks may be given."""
        reasons = {ref.rpartition(":")[0]: why for ref, why in self.quarantined.items()}
        if name in reasons:
            return f"is quarantined. {reasons[name]}"
        offered = [repr(each) for each in islice(chain(also, self.model.tasks), 10)]
        rest = len(also) + len(self.model.tasks) - len(offered)
        return f"is not served. Served: {', '.join(offered) or 'none'}{f' and {rest} more' if rest else ''}."


def first(backbone: FrozenBackbone) -> Snapshot:
    """The snapshot of a registry without tasks."""
    return Snapshot(0, CombinedModel(backbone, []), {}, {})


def following(before: Snapshot, registry: Registry, alias: str | None = None) -> Snapshot:
    """The snapshot of a registry as it is now; what the one before serves is shared, not loaded or computed again.

    A task whose stored bytes are not what was registered, whose golden probe comes out otherwise, or that this machine
    cannot compute exactly is quarantined: it is named, and the others are served. It is tried again with every change.
    """
    generation, chosen = registry.current(before.model.backbone, alias)
    quarantined: dict[str, str] = {}
    known = {(task.ref, task.sha256): task for task in before.model.tasks.values()}
    passed = {record.ref: known[key] for record in chosen if (key := (record.ref, record.sha256)) in known}
    fresh = []
    for record in chosen:
        if record.ref not in passed:
            try:
                fresh.append((registry.get(record.ref), registry.goldens(record.ref)))
            except RegistryUnavailableError:
                raise
            except AddendaError as error:
                quarantined[record.ref] = str(error)
    passed |= {task.ref: task for task in _passed(before.model, fresh, quarantined)}
    records = {record.name: record for record in chosen if record.ref in passed}
    model = before.model.with_tasks([passed[record.ref] for record in records.values()])
    return Snapshot(generation, model, records, quarantined)


def _passed(model: CombinedModel, fresh: Sequence[Recorded], quarantined: dict[str, str]) -> list[Task]:
    """Those tasks whose golden probes come out as they were recorded, computed together as far as possible."""
    if not fresh:
        return []
    try:
        found = verdicts(model.with_tasks([task for task, _ in fresh]), fresh)
    except Exception as error:  # whatever one task is made of, the others are served
        if len(fresh) == 1:
            quarantined[fresh[0][0].ref] = str(error) or type(error).__name__
            if not isinstance(error, AddendaError):
                log.exception("Task %s cannot be computed", fresh[0][0].ref)
            return []
        half = len(fresh) // 2
        return _passed(model, fresh[:half], quarantined) + _passed(model, fresh[half:], quarantined)
    quarantined |= {verdict.task: f"Its golden probe {verdict.detail}." for verdict in found if not verdict.ok}
    return [task for (task, _), verdict in zip(fresh, found, strict=True) if verdict.ok]


class Follower:
    """Keeps a snapshot in step with a registry, in a thread of its own; a database that is down leaves the last one."""

    def __init__(self, backbone: FrozenBackbone, registry: Registry, alias: str | None) -> None:
        self._registry, self._alias = registry, alias
        self._changed, self._stopping = threading.Condition(), threading.Event()
        self.snapshot: Snapshot = first(backbone)  # what is served now; replaced as a whole, never altered
        self.reachable = True  # whether the registry answered last
        self._follow()
        self._thread = threading.Thread(target=self._run, name="addenda-follower", daemon=True)
        self._thread.start()

    def settle(self, generation: int, timeout_s: float) -> bool:
        """Waits until a generation is served, or the time is over; says whether it is. It blocks its thread."""
        with self._changed:
            return self._changed.wait_for(lambda: self.snapshot.generation >= generation, timeout_s)

    def stop(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._registry.wait(self.snapshot.generation, WAIT_S) != self.snapshot.generation:
                    self._follow()
                self.reachable = True
            except RegistryError as error:
                if self.reachable:
                    generation = self.snapshot.generation
                    log.error("The registry does not answer; generation %d is served on: %s", generation, error)
                self.reachable = False
                self._stopping.wait(RETRY_S)
            except Exception:  # a thread that ends would serve this generation for ever
                log.exception("Generation %d is served on", self.snapshot.generation)
                self._stopping.wait(RETRY_S)

    def _follow(self) -> None:
        started, before = time.monotonic(), self.snapshot
        snapshot = following(before, self._registry, self._alias)
        with self._changed:
            self.snapshot = snapshot
            self._changed.notify_all()
        took_ms = 1000 * (time.monotonic() - started)
        log.info("Generation %d is served: %d tasks, %.0f ms", snapshot.generation, len(snapshot.records), took_ms)
        if not (snapshot.records or snapshot.quarantined):
            where = "is registered" if self._alias is None else f"has the alias {self._alias!r}"
            log.warning("Nothing is answered: no task of backbone %s %s", snapshot.model.backbone.name, where)
        for ref, why in snapshot.quarantined.items():
            if before.quarantined.get(ref) != why:
                log.error("Task %s is quarantined: %s", ref, why)
