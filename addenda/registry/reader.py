"""Reading a registry: every question that changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sqlalchemy import Engine, or_, select

from addenda.registry.audit.history import Scored, VersionDifference, compare, history
from addenda.registry.store import ledger, schema
from addenda.registry.store.database import database_errors, described, mode, reading
from addenda.registry.store.ledger import wait
from addenda.registry.store.lineage import Lineage, lineage
from addenda.registry.store.queries import TaskFilter, current, evaluations, find, listing, records
from addenda.registry.store.records import EvaluationRecord, Event, TaskRecord
from addenda.registry.store.upgrade import revision, schema_faults

if TYPE_CHECKING:
    from addenda.registry.audit.integrity import Integrity
    from addenda.registry.store.task import Golden, Task
    from addenda.registry.store.task_reader import FeatureStatistics


@runtime_checkable
class HasFingerprint(Protocol):
    """Anything with a backbone's fingerprint; the registry knows nothing else of backbones."""

    @property
    def fingerprint(self) -> str:
        """sha256 over architecture, weights and preprocessing."""


class Reader:
    """What a registry can be asked; `Registry` adds what changes it.

    A version is named by a reference: `name` (its newest active version), `name:version` or `name@alias`. In every
    method a reference to nothing is an UnknownTaskError.

    Attributes:
        location: where it is, for people: a path, or a URL without its password.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.location = described(engine)

    @property
    def generation(self) -> int:
        """The id of the last event: it grows by one with every change."""
        with reading(self._engine) as connection:
            return ledger.generation(connection)

    def wait(self, after: int, timeout_s: float) -> int:
        """Waits until the generation is past `after`, or the time is over; returns the generation."""
        with database_errors("The registry cannot be waited for"):
            return wait(self._engine, lambda: self.generation, after, timeout_s)

    def events(self, name: str | None = None, after: int = 0, limit: int | None = None) -> list[Event]:
        """Who did what and when, oldest first.

        Args:
            name: only what happened to versions and aliases of this task.
            after: only events past this generation.
            limit: only so many, the newest.
        """
        event = schema.event.c
        query = select(schema.event).where(event.id > after).order_by(event.id.desc()).limit(limit)
        if name is not None:
            subjects = (event.subject.startswith(f"{name}{mark}", autoescape=True) for mark in ":@")
            query = query.where(or_(*subjects))
        with reading(self._engine) as connection:
            return [Event(**row) for row in reversed(connection.execute(query).mappings().all())]

    def tasks(
        self, chosen: TaskFilter | None = None, limit: int | None = None, before: str | None = None
    ) -> list[TaskRecord]:
        """Every version of every task that a filter lets through, oldest first.

        Args:
            chosen: the filter; None lets all active tasks through.
            limit: only so many, the newest.
            before: only those registered before this one; with `limit` a page after a page.

        Raises:
            DataError: a time of the filter is none.
            UnknownTaskError: the filter or `before` names a task that is not registered.
        """
        with reading(self._engine) as connection:
            rows = connection.execute(listing(connection, chosen or TaskFilter(), limit, before)).all()
            return records(connection, rows[::-1])

    def record(self, ref: str) -> TaskRecord:
        """What is known of one version."""
        with reading(self._engine) as connection:
            return records(connection, [find(connection, ref)])[0]

    def get(self, ref: str) -> Task:
        """Loads a task and what it extends; bytes that are not what was registered are an IntegrityError."""
        from addenda.registry.store.task_reader import load_task

        with reading(self._engine) as connection:
            return load_task(connection, find(connection, ref))

    def load(self, backbone: HasFingerprint, alias: str | None = None) -> list[Task]:
        """Loads, as `get` does, the newest active version of each name on a backbone, or those of an alias."""
        from addenda.registry.store.task_reader import load_tasks

        with reading(self._engine) as connection:
            return load_tasks(connection, current(connection, backbone.fingerprint, alias))

    def current(self, backbone: HasFingerprint, alias: str | None = None) -> tuple[int, list[TaskRecord]]:
        """The generation, and what is known of the tasks that `load` loads, as both are at one moment."""
        with reading(self._engine) as connection:
            chosen = current(connection, backbone.fingerprint, alias)
            return ledger.generation(connection), records(connection, chosen)

    def backbones(self) -> list[dict[str, Any]]:
        """The backbones that tasks were learned on, as `FrozenBackbone.record` described them."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(schema.backbone).order_by(schema.backbone.c.created_at)).mappings()
            ours = ("created_by", "created_at", "event_id")
            return [{key: value for key, value in row.items() if key not in ours} for row in rows]

    def goldens(self, ref: str) -> list[Golden]:
        """A task's golden probes, one for each numerics fingerprint it was recorded under, newest first."""
        from addenda.registry.store.task_reader import load_goldens

        with reading(self._engine) as connection:
            return load_goldens(connection, find(connection, ref))

    def statistics(self, ref: str) -> FeatureStatistics | None:
        """What a router knows of a task's images; None where nothing was kept."""
        from addenda.registry.store.task_reader import load_statistics

        with reading(self._engine) as connection:
            return load_statistics(connection, find(connection, ref))

    def evaluations(self, ref: str) -> list[EvaluationRecord]:
        """Every recorded scoring of a task, oldest first."""
        with reading(self._engine) as connection:
            return evaluations(connection, schema.task.c.id == find(connection, ref).id)

    def history(self, name: str) -> list[Scored]:
        """Every scoring of every version of a name, data by data, each measured against the one before."""
        with reading(self._engine) as connection:
            return history(connection, name)

    def lineage(self, ref: str) -> Lineage:
        """What a version extends and what extends it, as trees."""
        with reading(self._engine) as connection:
            return lineage(connection, ref)

    def compare(self, one: str, other: str) -> list[VersionDifference]:
        """What differs between two versions, section by section."""
        return compare(self.record(one), self.record(other))

    def backup(self, path: str | Path) -> Integrity:
        """Copies the registry, as it is at one moment, into a new SQLite file, and checks the copy.

        Raises:
            RegistryError: there is such a file already, or the copy could not be written.
            IntegrityError: the registry is damaged; nothing was written.
        """
        from addenda.registry.exchange.backup import backup

        return backup(self._engine, path)

    @property
    def file_mode(self) -> int:
        """Permissions of files that hold what the registry holds: never more than it has itself."""
        return mode(self._engine)

    def remains(self) -> list[Path]:
        """Folders that killed backups left beside the registry's file."""
        from addenda.registry.exchange.backup import remains

        return remains(self._engine)

    @property
    def schema_version(self) -> str:
        """The version of the database's schema."""
        with reading(self._engine) as connection:
            return revision(connection) or "none"

    def schema_faults(self) -> list[str]:
        """What of the tables, indexes and triggers is not as this version makes them, in words."""
        return schema_faults(self._engine)

    def check_integrity(self, head: str | None = None) -> Integrity:
        """Hashes every stored byte again, and checks every seal, key, alias, tag, trigger and index; it only reads.

        Args:
            head: the digest of an event that was noted earlier (`Integrity.head`): then no event since can have been
                cut off unseen.

        Raises:
            RegistryError: the database cannot be read at all.
        """
        from addenda.registry.audit.integrity import check_integrity

        return check_integrity(self._engine, head)

    def export(self, refs: Sequence[str], path: str | Path) -> list[str]:
        """Writes tasks, what they extend and all that belongs to them to one file, which `import_bundle` reads.

        The same tasks give the same bytes. Aliases and notes stay at home.

        Args:
            refs: of the tasks.
            path: the file, by custom NAME.addenda; it must not exist.

        Returns:
            References of all the tasks in it.

        Raises:
            IntegrityError: stored bytes are not what was registered.
            RegistryError: the file exists, or cannot be written.
        """
        from addenda.registry.exchange import bundle
        from addenda.registry.exchange.selection import gather

        with reading(self._engine) as connection:
            contents, read, _ = gather(connection, refs)
            bundle.write(Path(path), contents, read, self.file_mode)
        return [entry.ref for entry in contents.tasks]
