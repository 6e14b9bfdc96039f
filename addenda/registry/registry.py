"""The task registry: an append-only database of learned tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, select

from addenda.exceptions import RegistryError
from addenda.registry.reader import Reader
from addenda.registry.store import changes, schema
from addenda.registry.store.database import connect, database_errors, reading, writing
from addenda.registry.store.ledger import Writer, generation, next_id, stamp
from addenda.registry.store.names import MAX_TEXT, check_name, check_tag, check_text
from addenda.registry.store.queries import find, ref_of
from addenda.registry.store.records import Evaluation, EvaluationRecord
from addenda.registry.store.upgrade import check_readable, upgrade

if TYPE_CHECKING:
    from addenda.registry.exchange.receiver import Received
    from addenda.registry.store.task import Golden, Task
    from addenda.registry.store.task_reader import FeatureStatistics


class Registry(Reader):
    """A database of tasks, opened with `Registry.open`; `Reader` has its read methods.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, Registry.open(f"{folder}/tasks.db") as registry:
        ...     registry.tasks(), registry.generation
        ([], 0)
    """

    def __init__(self, engine: Engine, user: str | None = None) -> None:
        super().__init__(engine)
        self._user = user

    @classmethod
    def open(
        cls, location: str | Path, create: bool = True, user: str | None = None, read_only: bool = False
    ) -> Registry:
        """Opens a registry; creates or upgrades its schema if needed.

        Args:
            location: a path, or a URL: sqlite:///PATH, postgresql://USER@HOST/DATABASE.
            create: whether to create the registry if it does not exist.
            user: the author recorded for changes; None means the operating system's user.
            read_only: for untrusted registries: nothing is created, upgraded or changed, and unexpected views and
                triggers are rejected.

        Raises:
            RegistryError: it does not exist, is not a registry, cannot be opened, or has a newer schema.
        """
        engine = connect(location, create and not read_only, read_only)
        try:
            if read_only:
                check_readable(engine)
            else:
                upgrade(engine, create)
        except RegistryError:
            engine.dispose()
            raise
        return cls(engine, user)

    def on_behalf_of(self, user: str) -> Registry:
        """The same registry on the same connections, with another author for its changes."""
        return Registry(self._engine, user)

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _changing(self, context: str, dry_run: bool = False, **details: str) -> Iterator[Writer]:
        """One write transaction. Database errors are prefixed with `context`; `details` go into every event."""
        with database_errors(context), writing(self._engine) as connection:
            yield Writer(connection, stamp(self._user), details)
            if dry_run:
                connection.rollback()

    def add_backbone(self, record: Mapping[str, Any]) -> None:
        """Registers a backbone, described by `FrozenBackbone.record`, unless it is registered already."""
        with self._changing(f"Backbone {record['name']!r} cannot be registered") as writer:
            known = select(schema.backbone.c.fingerprint).where(schema.backbone.c.fingerprint == record["fingerprint"])
            if writer.connection.scalar(known) is None:
                writer.add(schema.backbone, {**record, **writer.stamp}, "backbone", record["fingerprint"])

    def register(
        self,
        task: Task,
        golden: Golden,
        statistics: FeatureStatistics | None = None,
        new_version: bool = False,
        evaluations: Sequence[Evaluation] = (),
    ) -> Task:
        """Registers a task in one transaction.

        Args:
            task: the task; its parents must be registered.
            golden: its golden probe, from `combined.golden`.
            statistics: its routing statistics, from `combined.feature_statistics`; routers ignore tasks without.
            new_version: whether to add a version if the name is taken.
            evaluations: evaluations made during training.

        Returns:
            The task with its version. If an active version of this name has the same content, that version is
            returned and nothing is registered.

        Raises:
            NameTakenError: the name is taken by other content.
            RetiredError: the same content was registered under this name and retired; `new_version` registers it again.
            IntegrityError: the task's tensors were modified after its creation.
            RegistryError: a parent or the backbone is not registered, the statistics are too large, or the database
                rejected the change.
        """
        from addenda.registry.store import registration

        probe, _ = registration.check_new_task(task, golden, statistics), task.artifact
        with self._changing(f"Task {task.name!r} was not registered") as writer:
            return registration.register(writer, task, probe, statistics, new_version, evaluations)

    def add_golden(self, ref: str, golden: Golden) -> None:
        """Records a task's golden probe under new numerics; does nothing if it has one under these numerics.

        Raises:
            RegistryError: the probe is not of this task, or does not match its digest.
        """
        from addenda.registry.store.registration import add_golden, golden_row
        from addenda.registry.store.task_reader import load_task

        with self._changing(f"Task {ref!r}: no golden probe was recorded") as writer:
            row, columns = find(writer.connection, ref), schema.golden.c
            probe = golden_row(load_task(writer.connection, row), golden)
            recorded = select(columns.numerics_fingerprint).where(columns.task_id == row.id)
            if golden.numerics_fingerprint not in writer.connection.scalars(recorded).all():
                add_golden(writer, row, {**probe, **writer.stamp})

    def import_bundle(
        self,
        path: str | Path,
        renames: Mapping[str, str] | None = None,
        dry_run: bool = False,
        owner: str | None = None,
    ) -> list[Received]:
        """Imports a bundle written by `export`, in one transaction.

        Registered tasks are not altered; a task that exists already only gains tags, and golden probes under other
        numerics. Authors, times and scores are imported as they are; the event records the import.

        Args:
            path: the bundle.
            renames: name in the bundle -> name in this registry.
            dry_run: return what would be done, without changing anything.
            owner: if given, only free names and names whose versions were all registered or imported by this user
                may be changed.

        Raises:
            IntegrityError: the file is not a valid bundle.
            OwnershipError: the bundle has a version of a name that is not the owner's.
            RegistryError: versions exist with other content; the message lists them all.
        """
        from addenda.registry.exchange.bundle import open_bundle
        from addenda.registry.exchange.receiver import receive

        context = f"Bundle {str(path)!r} was not imported"
        with open_bundle(Path(path)) as (transfer, source), self._changing(context, dry_run, source=source) as writer:
            return receive(writer, transfer, renames or {}, owner)

    def merge(self, other: Registry, renames: Mapping[str, str] | None = None, dry_run: bool = False) -> list[Received]:
        """Imports every task of another registry, with retirements and aliases, in one transaction.

        As with `import_bundle`, registered tasks are not altered; an existing alias keeps its version.

        Args:
            other: the other registry, which is not changed.
            renames: name in the other registry -> name in this registry.
            dry_run: return what would be done, without changing anything.

        Raises:
            IntegrityError: stored bytes in the other registry have changed.
            RegistryError: versions exist with other content; the message lists them all.
        """
        from addenda.registry.exchange.bundle import gather
        from addenda.registry.exchange.receiver import receive

        context = f"Registry {other.location!r} was not merged"
        with reading(other._engine) as connection:
            transfer = gather(connection, None)
            with self._changing(context, dry_run, source=other.location) as writer:
                return receive(writer, transfer, renames or {})

    def retire(self, ref: str, reason: str = "", along: Sequence[str] = ()) -> None:
        """Retires a version: hides it from `load` and from its bare name, without deleting anything.

        Args:
            ref: the version.
            reason: recorded with the retirement.
            along: descendants to retire too; all active descendants must be listed.

        Raises:
            RegistryError: it is retired already, an alias points at it, an active descendant is not listed in
                `along`, or a listed task is not a descendant.
        """
        if len(check_text(reason, "The reason")) > MAX_TEXT:
            raise RegistryError(f"The reason has {len(reason):,} characters; the maximum is {MAX_TEXT:,}. Add a note.")
        with self._changing(f"Task {ref!r} was not retired") as writer:
            changes.retire_family(writer, ref, reason, along)

    def set_alias(self, name: str, alias: str, version: int | None = None, *, expected: int | None = None) -> None:
        """Points `name@alias` at a version; the events record the previous version.

        Args:
            name: the task's name.
            alias: the alias, such as `production`.
            version: the version's number.
            expected: precondition: the version that the alias points at now, 0 for none; None for no precondition.

        Raises:
            ConflictError: the precondition failed.
            RegistryError: the alias is not a valid name, or the version is retired or missing.
        """
        if version is None:
            raise RegistryError(
                f"set_alias({name!r}, {alias!r}) has no version. Its arguments are name, alias and version, as in "
                "set_alias('digits', 'production', 2)."
            )
        check_name(alias)
        with self._changing(f"Alias {alias!r} was not set") as writer:
            changes.set_alias(writer, find(writer.connection, f"{name}:{version}"), alias, expected)

    def remove_alias(self, name: str, alias: str, *, expected: int | None = None) -> None:
        """Removes `name@alias`; the events record the version that it pointed at.

        Raises:
            ConflictError: the alias does not point at the expected version.
            RegistryError: there is no such alias.
        """
        with self._changing(f"Alias {alias!r} was not removed") as writer:
            changes.remove_alias(writer, name, alias, expected)

    def tag(self, ref: str, tag: str) -> None:
        """Adds a tag to a version; does nothing if it has the tag.

        Raises:
            RegistryError: the tag is not valid.
        """
        check_tag(tag)
        with self._changing(f"Task {ref!r} was not tagged") as writer:
            row = find(writer.connection, ref)
            if tag not in changes.tags_of(writer.connection, row):
                changes.tag(writer, row, tag)

    def untag(self, ref: str, tag: str) -> None:
        """Removes a tag from a version.

        Raises:
            RegistryError: the version does not have this tag.
        """
        with self._changing(f"Task {ref!r} was not untagged") as writer:
            changes.untag(writer, find(writer.connection, ref), tag)

    def note(self, ref: str, text: str) -> None:
        """Adds a note to a version's history; a note is an event and cannot be removed.

        Raises:
            RegistryError: the note is empty.
        """
        if not check_text(text, "The note").strip():
            raise RegistryError("The note is empty.")
        with self._changing(f"Task {ref!r}: no note was added") as writer:
            writer.append("noted", ref_of(find(writer.connection, ref)), text=text)

    def add_evaluation(
        self, ref: str, data_fingerprint: str, numerics_fingerprint: str, metrics: Mapping[str, Any], logits_digest: str
    ) -> EvaluationRecord:
        """Records an evaluation of a task."""
        evaluation = vars(Evaluation(data_fingerprint, numerics_fingerprint, dict(metrics), logits_digest))
        with self._changing(f"The evaluation of {ref!r} was not recorded") as writer:
            row, event_id = find(writer.connection, ref), generation(writer.connection) + 1
            values = {**evaluation, **writer.stamp, "generation": event_id}
            ids = {"id": next_id(writer.connection, schema.evaluation), "task_id": row.id}
            writer.add(schema.evaluation, ids | values, "evaluated", ref_of(row), data=data_fingerprint)
            return EvaluationRecord(task=ref_of(row), event_id=event_id, **values)
