"""The read-only half of the registry."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sqlalchemy import Engine, or_, select

from addenda.registry.audit.history import ComparedEvaluation, VersionDifference, compare, history
from addenda.registry.store import ledger, schema
from addenda.registry.store.database import database_errors, display_location, file_mode, reading
from addenda.registry.store.digests import integrity_errors
from addenda.registry.store.lineage import Lineage, lineage
from addenda.registry.store.queries import TaskFilter, current, evaluations, find, listing, plain_name, records, ref_of
from addenda.registry.store.records import EvaluationRecord, Event, TaskRecord
from addenda.registry.store.upgrade import revision, schema_faults

if TYPE_CHECKING:
    from addenda.registry.audit.integrity import Integrity
    from addenda.registry.store.task import Golden, Task
    from addenda.registry.store.task_reader import FeatureStatistics


@runtime_checkable
class HasFingerprint(Protocol):
    """Anything with a backbone's fingerprint; the registry needs nothing else of a backbone."""

    @property
    def fingerprint(self) -> str:
        """sha256 over architecture, weights and preprocessing."""


class Reader:
    """Read access to a registry; `Registry` adds the methods that change it.

    A reference is `name` (the newest active version), `name:version` or `name@alias`. Every method raises
    UnknownTaskError for a reference that does not resolve.

    Attributes:
        location: the registry's location for display: a path, or a URL without its password.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.location = display_location(engine)

    @property
    def generation(self) -> int:
        """The id of the last event; every change increments it by one."""
        with reading(self._engine) as connection:
            return ledger.generation(connection)

    def wait(self, after: int, timeout_s: float) -> int:
        """Waits until the generation exceeds `after` or the timeout expires; returns the generation."""
        deadline = time.monotonic() + timeout_s
        with database_errors("Cannot wait for the registry"), ledger.change_waiter(self._engine) as wait_for_change:
            while (generation := self.generation) <= after and (remaining_s := deadline - time.monotonic()) > 0:
                wait_for_change(remaining_s)
        return generation

    def events(self, name: str | None = None, after: int = 0, limit: int | None = None) -> list[Event]:
        """Events, oldest first.

        Args:
            name: only events of this task's versions and aliases.
            after: only events after this generation.
            limit: maximum number of events; the newest are returned.

        Raises:
            UnknownTaskError: `name` is a version, an alias or a pattern.
        """
        event = schema.event.c
        query = select(schema.event).where(event.id > after).order_by(event.id.desc()).limit(limit)
        if name is not None:
            prefixes = (f"{plain_name(name)}{separator}" for separator in ":@")
            subjects = (event.subject.startswith(prefix, autoescape=True) for prefix in prefixes)
            query = query.where(or_(*subjects))
        with reading(self._engine) as connection:
            return [Event(**row) for row in reversed(connection.execute(query).mappings().all())]

    def tasks(
        self, chosen: TaskFilter | None = None, limit: int | None = None, before: str | None = None
    ) -> list[TaskRecord]:
        """The task versions that match a filter, oldest first.

        Args:
            chosen: the filter; None matches all active tasks.
            limit: maximum number of versions; the newest are returned.
            before: only versions registered before this one; with `limit`, this pages through the list.

        Raises:
            DataError: a time in the filter is not ISO 8601.
            UnknownTaskError: the filter or `before` names a task that is not registered.
        """
        with reading(self._engine) as connection:
            rows = connection.execute(listing(connection, chosen or TaskFilter(), limit, before)).all()
            return records(connection, rows[::-1])

    def record(self, ref: str) -> TaskRecord:
        """The record of one version."""
        with reading(self._engine) as connection:
            return records(connection, [find(connection, ref)])[0]

    def get(self, ref: str) -> Task:
        """Loads a task and the tasks it extends; raises IntegrityError if stored bytes have changed."""
        from addenda.registry.store.task_reader import load_task

        with reading(self._engine) as connection:
            return load_task(connection, find(connection, ref))

    def load(self, backbone: HasFingerprint, alias: str | None = None) -> list[Task]:
        """Loads the newest active version of each task on a backbone, or the versions that an alias points at."""
        from addenda.registry.store.task_reader import load_tasks

        with reading(self._engine) as connection:
            return load_tasks(connection, current(connection, backbone.fingerprint, alias))

    def current(self, backbone: HasFingerprint, alias: str | None = None) -> tuple[int, list[TaskRecord]]:
        """The generation, and the records of the tasks that `load` returns, in one consistent snapshot."""
        with reading(self._engine) as connection:
            rows = current(connection, backbone.fingerprint, alias)
            return ledger.generation(connection), records(connection, rows)

    def backbones(self) -> list[dict[str, Any]]:
        """The registered backbones, as `FrozenBackbone.record` described them."""
        with reading(self._engine) as connection:
            columns = schema.backbone.c
            query = select(schema.backbone).order_by(columns.created_at, columns.fingerprint)
            internal = ("created_by", "created_at", "event_id")
            rows = connection.execute(query).mappings()
            return [{key: value for key, value in row.items() if key not in internal} for row in rows]

    def goldens(self, ref: str) -> list[Golden]:
        """A task's golden probes, one per numerics fingerprint, newest first."""
        from addenda.registry.store.task_reader import load_goldens

        with reading(self._engine) as connection:
            row = find(connection, ref)
            with integrity_errors(f"Task {ref_of(row)!r}"):
                return load_goldens(connection, row.id, len(row.labels))

    def statistics(self, ref: str) -> FeatureStatistics | None:
        """A task's routing statistics; None if it has none."""
        from addenda.registry.store.task_reader import load_statistics

        with reading(self._engine) as connection:
            row = find(connection, ref)
            with integrity_errors(f"Task {ref_of(row)!r} cannot be used for routing"):
                return load_statistics(connection, row.id, len(row.labels))

    def evaluations(self, ref: str) -> list[EvaluationRecord]:
        """All evaluations of a task, oldest first."""
        with reading(self._engine) as connection:
            return evaluations(connection, schema.task.c.id == find(connection, ref).id)

    def history(self, name: str) -> list[ComparedEvaluation]:
        """All evaluations of all versions of a name, grouped by data, each compared with the previous one."""
        with reading(self._engine) as connection:
            return history(connection, name)

    def lineage(self, ref: str) -> Lineage:
        """The ancestors and descendants of a version, as trees."""
        with reading(self._engine) as connection:
            return lineage(connection, ref)

    def compare(self, one: str, other: str) -> list[VersionDifference]:
        """The differences between two versions, section by section."""
        return compare(self.record(one), self.record(other))

    def backup(self, path: str | Path) -> Integrity:
        """Copies a consistent snapshot of the registry to a new SQLite file, and checks the copy.

        Raises:
            RegistryError: the file exists, or cannot be written.
            IntegrityError: the registry is damaged; nothing was written.
        """
        from addenda.registry.exchange.backup import backup

        return backup(self._engine, path)

    @property
    def file_mode(self) -> int:
        """Permissions for copies of the registry's contents; never wider than the registry's own."""
        return file_mode(self._engine)

    def remains(self) -> list[Path]:
        """Folders that interrupted backups left next to the registry's file."""
        from addenda.registry.exchange.backup import remains

        return remains(self._engine)

    @property
    def schema_version(self) -> str:
        """The database schema's version."""
        with reading(self._engine) as connection:
            return revision(connection) or "none"

    def schema_faults(self) -> list[str]:
        """Differences between the database's tables, indexes and triggers and those of this version's schema."""
        return schema_faults(self._engine)

    def check_integrity(self, head: str | None = None) -> Integrity:
        """Checks all stored digests, references, aliases, tags, triggers and indexes, without writing.

        Args:
            head: an `Integrity.head` recorded earlier; a fault is reported if the history no longer contains it.

        Raises:
            RegistryError: the database cannot be read at all.
        """
        from addenda.registry.audit.integrity import check_integrity

        return check_integrity(self._engine, head)

    def export(self, refs: Sequence[str], path: str | Path) -> list[str]:
        """Writes tasks and the tasks they extend to a bundle, which `import_bundle` reads.

        The same tasks give the same bytes. Aliases and notes are not exported.

        Args:
            refs: references of the tasks.
            path: the bundle, by convention NAME.addenda; it must not exist.

        Returns:
            References of all tasks in the bundle.

        Raises:
            IntegrityError: stored bytes have changed.
            RegistryError: the file exists, or cannot be written.
        """
        from addenda.registry.exchange.bundle import gather, write

        with reading(self._engine) as connection:
            contents, read, _ = gather(connection, refs)
            write(Path(path), contents, read, self.file_mode)
        return [entry.ref for entry in contents.tasks]
