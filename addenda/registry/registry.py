"""The registry: every task ever learned, never altered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, insert, select, update

import addenda
from addenda.exceptions import ConflictError, NameTakenError, RegistryError, RetiredError
from addenda.registry import bundle, ledger, schema
from addenda.registry.artifact import check_unwritten
from addenda.registry.bounds import check_bounds, check_text
from addenda.registry.database import connect, database_errors, reading, writing
from addenda.registry.gathering import Read, aliases, gather
from addenda.registry.loading import load_task
from addenda.registry.manifest import Alias, Contents
from addenda.registry.queries import descendants, find, is_retired
from addenda.registry.reader import Reader
from addenda.registry.receiving import Received, receive
from addenda.registry.records import EvaluationRecord, Scoring
from addenda.registry.registration import derived, golden_row, insert_task, next_id, packages
from addenda.registry.statistics import FeatureStatistics
from addenda.registry.task import Golden, Task, check_name, check_new_name, check_tag
from addenda.registry.upgrade import check_readable, upgrade


class Registry(Reader):
    """A database of tasks. Open it with `Registry.open`.

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

    def add_backbone(self, record: Mapping[str, Any]) -> None:
        """Records a backbone, once; `record` is what `FrozenBackbone.record` gives."""
        with database_errors(f"Backbone {record['name']!r} cannot be recorded"), writing(self._engine) as connection:
            known = select(schema.backbone.c.fingerprint).where(schema.backbone.c.fingerprint == record["fingerprint"])
            if connection.scalar(known) is None:
                stamp = ledger.stamp(self._user)
                row = {**record, **stamp}
                ledger.add(connection, schema.backbone, row, "backbone", record["fingerprint"], stamp)

    def register(
        self,
        task: Task,
        golden: Golden,
        statistics: FeatureStatistics | None = None,
        new_version: bool = False,
        evaluations: Sequence[Scoring] = (),
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
        check_new_name(task.name)
        if statistics is not None:
            statistics.check(len(task.labels))
            if statistics.excess is not None:
                raise RegistryError(f"Task {task.name!r} was not registered: {statistics.excess}.")
        check_unwritten(task)
        check_bounds(task)
        probe, data = golden_row(task, golden), task.artifact
        with database_errors(f"Task {task.name!r} was not registered"), writing(self._engine) as connection:
            versions = connection.execute(select(schema.task).where(schema.task.c.name == task.name)).all()
            same = [row for row in versions if row.artifact == task.sha256]
            tombstone = schema.retirement.c
            query = select(tombstone.task_id, tombstone.reason).where(tombstone.task_id.in_([row.id for row in same]))
            retired = dict(connection.execute(query).all())
            for row in same:
                if row.id not in retired:
                    return load_task(connection, row)
            if same and not new_version:
                raise RetiredError(_ref(same[-1]), retired[same[-1].id])
            if versions and not new_version:
                raise NameTakenError(task.name, max(row.version for row in versions))
            known = select(schema.backbone.c.name).where(schema.backbone.c.fingerprint == task.backbone)
            if connection.scalar(known) is None:
                raise RegistryError(
                    f"Task {task.name!r} was learned on a backbone that is not registered: add_backbone first."
                )
            stamp, version = ledger.stamp(self._user), max((row.version for row in versions), default=0) + 1
            insert_task(
                connection,
                "registered",
                {
                    **derived(task),
                    "name": task.name,
                    "version": version,
                    "artifact": task.sha256,
                    "config": dict(task.config),
                    "metrics": dict(task.metrics),
                    "data": dict(task.data),
                    "code_version": addenda.__version__,
                    "packages": packages(),
                    **stamp,
                },
                data,
                [_parent(connection, task, parent) for parent in task.parents],
                [probe | stamp],
                None if statistics is None else {"sha256": statistics.sha256, "data": statistics.data},
                [vars(evaluation) | stamp for evaluation in evaluations],
                stamp,
            )
            return load_task(connection, find(connection, f"{task.name}:{version}"))

    def add_golden(self, ref: str, golden: Golden) -> None:
        """Records a golden probe made under further numerics, beside those that are there; a known one is left alone.

        Raises:
            UnknownTaskError: there is no such task.
            RegistryError: the probe is not one of this task, or does not hash to its digest.
        """
        with database_errors(f"Task {ref!r}: no probe was recorded"), writing(self._engine) as connection:
            row = find(connection, ref)
            probe = golden_row(load_task(connection, row), golden)
            known = select(schema.golden.c.digest).where(
                schema.golden.c.task_id == row.id,
                schema.golden.c.numerics_fingerprint == golden.numerics_fingerprint,
            )
            if connection.scalar(known) is None:
                stamp, numerics = ledger.stamp(self._user), golden.numerics_fingerprint
                probe |= {"task_id": row.id, **stamp}
                ledger.add(connection, schema.golden, probe, "golden", _ref(row), stamp, numerics=numerics)

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
        with bundle.opened(Path(path)) as (contents, read, source):
            return self._receive(f"Bundle {str(path)!r}", contents, read, renames, [], source, dry_run, owner)

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
        with reading(other._engine) as connection:
            contents, read = gather(connection, None)
            pointed = aliases(connection)
            what = f"Registry {other.location!r}"
            return self._receive(what, contents, read, renames, pointed, other.location, dry_run)

    def _receive(
        self,
        what: str,
        contents: Contents,
        read: Read,
        renames: Mapping[str, str] | None,
        aliases: Sequence[Alias],
        source: str,
        dry_run: bool,
        owner: str | None = None,
    ) -> list[Received]:
        with database_errors(f"{what} was not taken in"), writing(self._engine) as connection:
            stamp = ledger.stamp(self._user)
            received = receive(connection, contents, read, renames or {}, aliases, source, stamp, owner)
            if dry_run:
                connection.get_transaction().rollback()  # type: ignore[union-attr]
        return received

    def retire(self, ref: str, reason: str = "", along: Sequence[str] = ()) -> None:
        """Hides a version from `load` and from its bare name; nothing is deleted.

        Args:
            ref: the version.
            reason: why, for the record.
            along: active tasks that extend it, directly or not, to retire before it; all of them must be named.

        Raises:
            UnknownTaskError: there is no such task.
            RegistryError: it is retired already, an alias points at it, an active task that is not named extends it, or
                one that is named does not.
        """
        check_text(reason, "The reason")
        with database_errors(f"Task {ref!r} was not retired"), writing(self._engine) as connection:
            root = find(connection, ref)
            named = {row.id: row for row in (root, *(find(connection, other) for other in along))}
            below = {row.id for row in connection.execute(descendants(root.id))}
            for row in named.values():
                if row.id not in below and row.id != root.id:
                    raise RegistryError(f"Task {_ref(row)!r} does not extend {_ref(root)!r}: retire it by itself.")
            active = connection.execute(descendants(root.id).where(~is_retired())).all()
            if missing := ", ".join(_ref(row) for row in active if row.id not in named):
                raise RegistryError(
                    f"Task {_ref(root)!r} cannot be retired: active tasks extend it ({missing}). Name them, to retire "
                    "them with it."
                )
            pointed = select(schema.alias.c.name, schema.alias.c.alias).where(schema.alias.c.task_id.in_(named))
            if (held := connection.execute(pointed.order_by(schema.alias.c.alias)).first()) is not None:
                raise RegistryError(
                    f"Task {_ref(root)!r} cannot be retired: '{held.name}@{held.alias}' points at it, or at one "
                    f"retired with it. Point that elsewhere, or at nothing: addenda tasks alias {held.name} "
                    f"{held.alias} --remove"
                )
            # Parents have smaller numbers than their children: from the greatest down, no child is left behind.
            for task_id in sorted(named, reverse=True):
                self._retire(connection, _ref(named[task_id]), task_id, reason)

    def _retire(self, connection: Connection, ref: str, task_id: int, reason: str) -> None:
        if connection.scalar(select(schema.retirement.c.task_id).where(schema.retirement.c.task_id == task_id)):
            raise RegistryError(f"Task {ref!r} is retired already.")
        stamp = ledger.stamp(self._user)
        row = {"task_id": task_id, "reason": reason, **stamp}
        ledger.add(connection, schema.retirement, row, "retired", ref, stamp, reason=reason)

    def set_alias(self, alias: str, ref: str, expected: int | None = None) -> None:
        """Points `name@alias` at a version; where it pointed before stays in the events.

        Args:
            alias: its name, such as `production`.
            ref: the version.
            expected: the version that it must point at now, 0 for none; None sets it whatever it is.

        Raises:
            UnknownTaskError: there is no such task.
            ConflictError: it points elsewhere than expected.
            RegistryError: the alias is not a valid name, or the version is retired.
        """
        check_name(alias)
        with database_errors(f"Alias {alias!r} was not set"), writing(self._engine) as connection:
            row = find(connection, ref)
            if connection.scalar(select(is_retired()).where(schema.task.c.id == row.id)):
                raise RegistryError(f"Task {_ref(row)!r} is retired: no alias is pointed at it.")
            before = _pointed(connection, row.name, alias, expected)
            if before == row.version:
                return
            if before == 0:
                connection.execute(insert(schema.alias).values(name=row.name, alias=alias, task_id=row.id))
            else:
                connection.execute(
                    update(schema.alias)
                    .where(schema.alias.c.name == row.name, schema.alias.c.alias == alias)
                    .values(task_id=row.id)
                )
            stamp = ledger.stamp(self._user)
            ledger.append(connection, "alias", f"{row.name}@{alias}", stamp, version=row.version, before=before or None)

    def remove_alias(self, alias: str, name: str, expected: int | None = None) -> None:
        """Lets `name@alias` point at nothing; where it pointed stays in the events.

        Raises:
            ConflictError: it points elsewhere than expected.
            RegistryError: it points at nothing already.
        """
        with database_errors(f"Alias {alias!r} was not removed"), writing(self._engine) as connection:
            before = _pointed(connection, name, alias, expected)
            if before == 0:
                raise RegistryError(f"There is no alias '{name}@{alias}'. See: addenda tasks list")
            connection.execute(delete(schema.alias).where(schema.alias.c.name == name, schema.alias.c.alias == alias))
            stamp = ledger.stamp(self._user)
            ledger.append(connection, "alias", f"{name}@{alias}", stamp, version=None, before=before)

    def tag(self, ref: str, tag: str) -> None:
        """Puts a tag on a version; one that it carries already changes nothing.

        Raises:
            UnknownTaskError: there is no such task.
            RegistryError: the tag is not valid.
        """
        check_tag(tag)
        with database_errors(f"Task {ref!r} was not tagged"), writing(self._engine) as connection:
            row = find(connection, ref)
            if not _is_tagged(connection, row.id, tag):
                connection.execute(insert(schema.tag).values(task_id=row.id, tag=tag))
                ledger.append(connection, "tagged", _ref(row), ledger.stamp(self._user), tag=tag)

    def untag(self, ref: str, tag: str) -> None:
        """Takes a tag off a version.

        Raises:
            UnknownTaskError: there is no such task.
            RegistryError: it does not carry this tag.
        """
        with database_errors(f"Task {ref!r} was not untagged"), writing(self._engine) as connection:
            row = find(connection, ref)
            if not _is_tagged(connection, row.id, tag):
                raise RegistryError(f"Task {_ref(row)!r} does not carry the tag {tag!r}.")
            connection.execute(delete(schema.tag).where(schema.tag.c.task_id == row.id, schema.tag.c.tag == tag))
            ledger.append(connection, "untagged", _ref(row), ledger.stamp(self._user), tag=tag)

    def note(self, ref: str, text: str) -> None:
        """Adds a note to a version's history; a note is an event, so it stays.

        Raises:
            RegistryError: the note says nothing.
            UnknownTaskError: there is no such task.
        """
        if not check_text(text, "The note").strip():
            raise RegistryError("A note says something; this one is empty.")
        with database_errors(f"Task {ref!r}: no note was added"), writing(self._engine) as connection:
            row = find(connection, ref)
            ledger.append(connection, "noted", _ref(row), ledger.stamp(self._user), text=text)

    def add_evaluation(
        self, ref: str, data_fingerprint: str, numerics_fingerprint: str, metrics: Mapping[str, Any], logits_digest: str
    ) -> EvaluationRecord:
        """Records one scoring of a task.

        Raises:
            UnknownTaskError: there is no such task.
        """
        with database_errors(f"The evaluation of {ref!r} was not recorded"), writing(self._engine) as connection:
            row = find(connection, ref)
            stamp, number = ledger.stamp(self._user), ledger.generation(connection) + 1
            values: dict[str, Any] = {
                "data_fingerprint": data_fingerprint,
                "generation": number,
                "numerics_fingerprint": numerics_fingerprint,
                "metrics": dict(metrics),
                "logits_digest": logits_digest,
                "event_id": number,
                **stamp,
            }
            evaluation_id = next_id(connection, schema.evaluation)
            connection.execute(insert(schema.evaluation).values(id=evaluation_id, task_id=row.id, **values))
            ledger.append(connection, "evaluated", _ref(row), stamp, data=data_fingerprint)
            return EvaluationRecord(task=_ref(row), **values)


def _ref(row: Row[Any]) -> str:
    return f"{row.name}:{row.version}"


def _parent(connection: Connection, task: Task, parent: Task) -> int:
    """The id of a task that another extends."""
    row = connection.execute(
        select(schema.task)
        .where(schema.task.c.artifact == parent.sha256)
        .order_by((schema.task.c.name != parent.name) | (schema.task.c.version != parent.version))
    ).first()
    if row is None:
        raise RegistryError(f"Task {task.name!r} extends {parent.ref!r}, which is not registered here.")
    if parent.class_token is None:
        raise RegistryError(f"Task {task.name!r} extends {parent.ref!r}, which is head-only: it has no token.")
    return int(row.id)


def _pointed(connection: Connection, name: str, alias: str, expected: int | None) -> int:
    """The version that an alias points at, 0 for none; ConflictError where that is not what was expected."""
    found = connection.scalar(
        select(schema.task.c.version)
        .join(schema.alias, schema.alias.c.task_id == schema.task.c.id)
        .where(schema.alias.c.name == name, schema.alias.c.alias == alias)
    )
    if expected is not None and (found or 0) != expected:
        what = [f"at '{name}:{version}'" if version else "at nothing" for version in (found, expected)]
        raise ConflictError(f"'{name}@{alias}' points {what[0]}, not {what[1]} as expected. Nothing was changed.")
    return found or 0


def _is_tagged(connection: Connection, task_id: int, tag: str) -> bool:
    found = select(schema.tag.c.tag).where(schema.tag.c.task_id == task_id, schema.tag.c.tag == tag)
    return connection.scalar(found) is not None
