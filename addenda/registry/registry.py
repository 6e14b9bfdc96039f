"""The registry: every task ever learned, never altered."""

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
from addenda.registry.store.names import check_name, check_tag, check_text
from addenda.registry.store.queries import find, ref_of
from addenda.registry.store.records import Evaluation, EvaluationRecord
from addenda.registry.store.upgrade import check_readable, upgrade

if TYPE_CHECKING:
    from addenda.registry.exchange.receiver import Received
    from addenda.registry.store.task import Golden, Task
    from addenda.registry.store.task_reader import FeatureStatistics


class Registry(Reader):
    """A database of tasks. Open it with `Registry.open`; `Reader` has what it can be asked.

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
        """Opens a registry, making or upgrading its schema where needed.

        Args:
            location: a path, or a URL: sqlite:///PATH, postgresql://USER@HOST/DATABASE.
            create: whether to make a new registry where there is none.
            user: in whose name changes are recorded; None takes the operating system's user.
            read_only: for somebody else's: nothing is made, upgraded or changed, and what is there is not trusted.

        Raises:
            RegistryError: it does not exist, is no registry, cannot be opened, or is of a newer version.
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
        """The same registry, by the same connections, whose changes are recorded in another's name."""
        return Registry(self._engine, user)

    def close(self) -> None:
        """Closes its connections."""
        self._engine.dispose()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _changing(self, failed: str, dry_run: bool = False, **told: str) -> Iterator[Writer]:
        """One transaction, wholly or not at all; errors of the database begin with what failed."""
        with database_errors(failed), writing(self._engine) as connection:
            yield Writer(connection, stamp(self._user), told)
            if dry_run:
                connection.rollback()

    def add_backbone(self, record: Mapping[str, Any]) -> None:
        """Records a backbone, once; `record` is what `FrozenBackbone.record` gives."""
        with self._changing(f"Backbone {record['name']!r} cannot be recorded") as to:
            known = select(schema.backbone.c.fingerprint).where(schema.backbone.c.fingerprint == record["fingerprint"])
            if to.connection.scalar(known) is None:
                to.add(schema.backbone, {**record, **to.who}, "backbone", record["fingerprint"])

    def register(
        self,
        task: Task,
        golden: Golden,
        statistics: FeatureStatistics | None = None,
        new_version: bool = False,
        evaluations: Sequence[Evaluation] = (),
    ) -> Task:
        """Registers a task, in one transaction: wholly or not at all.

        Args:
            task: what was learned; its parents must be registered.
            golden: its golden probe, from `combined.golden`.
            statistics: of the images it was learned from, from `combined.feature_statistics`; without, no router
                knows of it.
            new_version: whether a name already taken gets a further version.
            evaluations: scorings made while it was learned.

        Returns:
            The task with its version. Content already registered under this name is not registered again: the active
            version that holds it is returned.

        Raises:
            NameTakenError: the name is taken by other content.
            RetiredError: it is taken by the same content, which was retired; as a new version it is active again.
            IntegrityError: its tensors have been written to since it was made.
            RegistryError: a parent or the backbone is not registered, its statistics weigh too much, or the database
                refused.
        """
        from addenda.registry.store import registration

        probe, _ = registration.checked(task, golden, statistics), task.artifact
        with self._changing(f"Task {task.name!r} was not registered") as to:
            return registration.register(to, task, probe, statistics, new_version, evaluations)

    def add_golden(self, ref: str, golden: Golden) -> None:
        """Records a golden probe made under further numerics, beside those that are there; a known one is left alone.

        Raises:
            RegistryError: the probe is not one of this task, or does not hash to its digest.
        """
        from addenda.registry.store.registration import add_golden, golden_row
        from addenda.registry.store.task_reader import load_task

        with self._changing(f"Task {ref!r}: no probe was recorded") as to:
            row, of = find(to.connection, ref), schema.golden.c
            probe = golden_row(load_task(to.connection, row), golden)
            known = select(of.numerics_fingerprint).where(of.task_id == row.id)
            if golden.numerics_fingerprint not in to.connection.scalars(known).all():
                add_golden(to, row, {**probe, **to.who})

    def import_bundle(
        self,
        path: str | Path,
        renames: Mapping[str, str] | None = None,
        dry_run: bool = False,
        owner: str | None = None,
    ) -> list[Received]:
        """Takes in what `export` wrote, in one transaction: wholly or not at all.

        What is here is never altered: content already under its name only gains golden probes of other numerics and
        tags. Who learned a task and when, with what score, stays as it was; the event tells of the import.

        Args:
            path: the file.
            renames: a name there -> its name here.
            dry_run: only says what would be done.
            owner: who may touch none but their own names: those whose versions were all registered or imported in
                this name, and names that are free. None may touch all.

        Raises:
            IntegrityError: the file is not a whole bundle.
            OwnershipError: it brings a version of a name that is not the owner's.
            RegistryError: a version number holds other content here; all of these are named.
        """
        from addenda.registry.exchange import bundle
        from addenda.registry.exchange.receiver import receive

        failed = f"Bundle {str(path)!r} was not taken in"
        with bundle.opened(Path(path)) as (arrived, source), self._changing(failed, dry_run, source=source) as to:
            return receive(to, arrived, renames or {}, owner)

    def merge(self, other: Registry, renames: Mapping[str, str] | None = None, dry_run: bool = False) -> list[Received]:
        """Takes in every task of another registry, with retirements and aliases, in one transaction.

        What is here is never altered, as with `import_bundle`; an alias that points elsewhere here stays.

        Args:
            other: it is only read.
            renames: a name there -> its name here.
            dry_run: only says what would be done.

        Raises:
            IntegrityError: stored bytes there are not what was registered.
            RegistryError: a version number holds other content here; all of these are named.
        """
        from addenda.registry.exchange.receiver import receive
        from addenda.registry.exchange.selection import gather

        failed = f"Registry {other.location!r} was not taken in"
        with reading(other._engine) as connection:
            arrived = gather(connection, None)
            with self._changing(failed, dry_run, source=other.location) as to:
                return receive(to, arrived, renames or {})

    def retire(self, ref: str, reason: str = "", along: Sequence[str] = ()) -> None:
        """Hides a version from `load` and from its bare name; nothing is deleted.

        Args:
            ref: the version.
            reason: why, for the record.
            along: active tasks that extend it, directly or not, to retire before it; all of them must be named.

        Raises:
            RegistryError: it is retired already, an alias points at it, an active task that is not named extends it, or
                one that is named does not.
        """
        check_text(reason, "The reason")
        with self._changing(f"Task {ref!r} was not retired") as to:
            changes.retire_family(to, ref, reason, along)

    def set_alias(self, name: str, alias: str, version: int | None = None, *, expected: int | None = None) -> None:
        """Points `name@alias` at a version; where it pointed before stays in the events.

        Args:
            name: of the task.
            alias: such as `production`.
            version: the number under this name.
            expected: the version that it must point at now, 0 for none; None sets it whatever it is.

        Raises:
            ConflictError: it points elsewhere than expected.
            RegistryError: the alias is not a valid name, the version is retired, or none is given.
        """
        if version is None:
            raise RegistryError(
                f"set_alias({name!r}, {alias!r}) names no version: it takes name, alias and version in this order, as "
                "in set_alias('digits', 'production', 2)."
            )
        check_name(alias)
        with self._changing(f"Alias {alias!r} was not set") as to:
            changes.point(to, find(to.connection, f"{name}:{version}"), alias, expected)

    def remove_alias(self, name: str, alias: str, *, expected: int | None = None) -> None:
        """Lets `name@alias` point at nothing; where it pointed stays in the events.

        Raises:
            ConflictError: it points elsewhere than expected.
            RegistryError: it points at nothing already.
        """
        with self._changing(f"Alias {alias!r} was not removed") as to:
            changes.unpoint(to, name, alias, expected)

    def tag(self, ref: str, tag: str) -> None:
        """Puts a tag on a version; one that it carries already changes nothing.

        Raises:
            RegistryError: the tag is not valid.
        """
        check_tag(tag)
        with self._changing(f"Task {ref!r} was not tagged") as to:
            row = find(to.connection, ref)
            if tag not in changes.tags_of(to.connection, row):
                changes.tag(to, row, tag)

    def untag(self, ref: str, tag: str) -> None:
        """Takes a tag off a version.

        Raises:
            RegistryError: it does not carry this tag.
        """
        with self._changing(f"Task {ref!r} was not untagged") as to:
            changes.untag(to, find(to.connection, ref), tag)

    def note(self, ref: str, text: str) -> None:
        """Adds a note to a version's history; a note is an event, so it stays.

        Raises:
            RegistryError: the note says nothing.
        """
        if not check_text(text, "The note").strip():
            raise RegistryError("A note says something; this one is empty.")
        with self._changing(f"Task {ref!r}: no note was added") as to:
            to.append("noted", ref_of(find(to.connection, ref)), text=text)

    def add_evaluation(
        self, ref: str, data_fingerprint: str, numerics_fingerprint: str, metrics: Mapping[str, Any], logits_digest: str
    ) -> EvaluationRecord:
        """Records one scoring of a task."""
        evaluation = vars(Evaluation(data_fingerprint, numerics_fingerprint, dict(metrics), logits_digest))
        with self._changing(f"The evaluation of {ref!r} was not recorded") as to:
            row, number = find(to.connection, ref), generation(to.connection) + 1
            values = {**evaluation, **to.who, "generation": number}
            numbers = {"id": next_id(to.connection, schema.evaluation), "task_id": row.id}
            to.add(schema.evaluation, numbers | values, "evaluated", ref_of(row), data=data_fingerprint)
            return EvaluationRecord(task=ref_of(row), event_id=number, **values)
