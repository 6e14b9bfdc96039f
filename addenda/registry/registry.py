"""The registry: every task ever learned, never altered."""

from __future__ import annotations

import difflib
import getpass
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from sqlalchemy import Connection, Engine, Row, Select, func, insert, select, update

import addenda
from addenda.exceptions import IntegrityError, NameTakenError, RegistryError, UnknownTaskError
from addenda.registry import schema
from addenda.registry.artifact import decode, digest
from addenda.registry.database import connect, database_errors, reading, writing
from addenda.registry.records import EvaluationRecord, TaskRecord
from addenda.registry.statistics import FeatureStatistics
from addenda.registry.task import Golden, Task, check_name

NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@runtime_checkable
class HasFingerprint(Protocol):
    """Anything with a backbone's fingerprint; the registry knows nothing else of backbones."""

    @property
    def fingerprint(self) -> str:
        """sha256 over architecture, weights and preprocessing."""


class Registry:
    """A database of tasks. Open it with `Registry.open`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, Registry.open(f"{folder}/tasks.db") as registry:
        ...     registry.tasks(), registry.generation
        ([], 0)
    """

    def __init__(self, engine: Engine, location: str) -> None:
        self._engine = engine
        self.location = location

    @classmethod
    def open(cls, location: str | Path, create: bool = True) -> Registry:
        """Opens a registry, making or upgrading its schema where needed.

        Args:
            location: a path or an sqlite:/// URL.
            create: whether to make a new registry where there is none.

        Raises:
            RegistryError: it does not exist, is no registry, cannot be opened, or is of a newer version.
        """
        return cls(connect(location, create), str(location))

    def close(self) -> None:
        """Closes its connections."""
        self._engine.dispose()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """The id of the last event: it grows with every change."""
        with reading(self._engine) as connection:
            return _generation(connection)

    def tasks(self, include_retired: bool = False) -> list[TaskRecord]:
        """Every version of every task, oldest first."""
        with reading(self._engine) as connection:
            rows = connection.execute(_tasks().order_by(schema.task.c.id)).all()
            records = [_record(connection, row) for row in rows]
        return [record for record in records if include_retired or record.retired is None]

    def record(self, ref: str) -> TaskRecord:
        """What is known of one version.

        Args:
            ref: `name` (its newest active version), `name:version`, or `name@alias`.

        Raises:
            UnknownTaskError: there is no such task, version or alias.
        """
        with reading(self._engine) as connection:
            return _record(connection, _find(connection, ref))

    def get(self, ref: str) -> Task:
        """Loads a task and what it extends; the bytes are checked against their sha256.

        Args:
            ref: `name`, `name:version` or `name@alias`.

        Raises:
            UnknownTaskError: there is no such task, version or alias.
            IntegrityError: its stored bytes, or an ancestor's, are not what was registered.
        """
        with reading(self._engine) as connection:
            return _load(connection, _find(connection, ref), {})

    def load(self, backbone: HasFingerprint, alias: str | None = None) -> list[Task]:
        """Loads the newest active version of each name on a backbone, or those that an alias points at.

        Raises:
            IntegrityError: a task's stored bytes are not what was registered.
        """
        query = _tasks().where(schema.task.c.backbone == backbone.fingerprint).order_by(schema.task.c.id)
        with reading(self._engine) as connection:
            if alias is None:
                rows = connection.execute(query.where(~_retired())).all()
            else:
                rows = connection.execute(
                    query.join(schema.alias, schema.alias.c.task_id == schema.task.c.id).where(
                        schema.alias.c.alias == alias
                    )
                ).all()
            newest = {row.name: row for row in rows}
            known: dict[str, Task] = {}
            return [_load(connection, row, known) for row in newest.values()]

    def backbones(self) -> list[dict[str, Any]]:
        """The backbones that tasks were learned on, as `FrozenBackbone.record` described them."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(schema.backbone).order_by(schema.backbone.c.created_at)).mappings()
            return [{k: v for k, v in row.items() if k not in ("created_by", "created_at")} for row in rows]

    def goldens(self, ref: str) -> list[Golden]:
        """A task's golden probes, one for each numerics fingerprint it was recorded under, newest first.

        Raises:
            IntegrityError: stored logits that do not hash to their digest.
        """
        with reading(self._engine) as connection:
            row = _find(connection, ref)
            stored = connection.execute(
                select(schema.golden)
                .where(schema.golden.c.task_id == row.id)
                .order_by(schema.golden.c.created_at.desc())
            ).all()
        for probe in stored:
            if digest(probe.logits) != probe.digest:
                raise IntegrityError(f"Task {ref!r}: its golden probe's stored bytes have changed.")
        return [
            Golden(
                numerics=probe.numerics,
                numerics_fingerprint=probe.numerics_fingerprint,
                logits=torch.from_numpy(np.frombuffer(probe.logits, np.float32).copy()).view(-1, len(row.labels)),
                digest=probe.digest,
            )
            for probe in stored
        ]

    def statistics(self, ref: str) -> FeatureStatistics | None:
        """What a router knows of a task's images; None where nothing was kept.

        Raises:
            UnknownTaskError: there is no such task.
            IntegrityError: the stored bytes are not what was registered.
        """
        with reading(self._engine) as connection:
            row = _find(connection, ref)
            stored = connection.execute(select(schema.statistics).where(schema.statistics.c.task_id == row.id)).first()
        if stored is None:
            return None
        try:
            return FeatureStatistics.decode(stored.data, stored.sha256, len(row.labels))
        except IntegrityError as error:
            raise IntegrityError(f"Task '{row.name}:{row.version}' cannot be routed to: {error}.") from error

    def evaluations(self, ref: str) -> list[EvaluationRecord]:
        """Every recorded scoring of a task, oldest first."""
        with reading(self._engine) as connection:
            row = _find(connection, ref)
            stored = connection.execute(
                select(schema.evaluation).where(schema.evaluation.c.task_id == row.id).order_by(schema.evaluation.c.id)
            ).mappings()
            return [
                EvaluationRecord(
                    task=f"{row.name}:{row.version}", **{k: v for k, v in e.items() if k not in ("id", "task_id")}
                )
                for e in stored
            ]

    # -- writing ---------------------------------------------------------------------------------------------------

    def add_backbone(self, record: Mapping[str, Any]) -> None:
        """Records a backbone, once; `record` is what `FrozenBackbone.record` gives."""
        with database_errors(f"Backbone {record['name']!r} cannot be recorded"), writing(self._engine) as connection:
            known = select(schema.backbone.c.fingerprint).where(schema.backbone.c.fingerprint == record["fingerprint"])
            if connection.scalar(known) is None:
                connection.execute(insert(schema.backbone).values(**record, **_stamp()))

    def register(
        self, task: Task, golden: Golden, statistics: FeatureStatistics | None = None, new_version: bool = False
    ) -> Task:
        """Registers a task, in one transaction: wholly or not at all.

        Args:
            task: what was learned; its parents must be registered.
            golden: its golden probe, from `combined.golden`.
            statistics: of the images it was learned from, from `combined.feature_statistics`; without, no router
                knows of it.
            new_version: whether a name already taken gets a further version.

        Returns:
            The task with its version. Content already registered under this name is not registered again: the
            version that holds it is returned.

        Raises:
            NameTakenError: the name is taken by other content.
            RegistryError: a parent or the backbone is not registered, its statistics weigh too much, or the database
                refused.
        """
        check_name(task.name)
        if statistics is not None:
            statistics.check(len(task.labels))
            if statistics.excess is not None:
                raise RegistryError(f"Task {task.name!r} was not registered: {statistics.excess}.")
        golden_row = _golden_row(task.name, len(task.labels), golden)
        data = task.artifact
        with database_errors(f"Task {task.name!r} was not registered"), writing(self._engine) as connection:
            versions = connection.execute(_tasks().where(schema.task.c.name == task.name)).all()
            for row in versions:
                if row.artifact == task.sha256:
                    return _load(connection, row, {})
            if versions and not new_version:
                raise NameTakenError(task.name, max(row.version for row in versions))
            if (
                connection.scalar(select(schema.backbone.c.name).where(schema.backbone.c.fingerprint == task.backbone))
                is None
            ):
                raise RegistryError(
                    f"Task {task.name!r} was learned on a backbone that is not registered: add_backbone first."
                )
            if (
                connection.scalar(select(schema.artifact.c.sha256).where(schema.artifact.c.sha256 == task.sha256))
                is None
            ):
                connection.execute(insert(schema.artifact).values(sha256=task.sha256, data=data))
            version = max((row.version for row in versions), default=0) + 1
            task_id = connection.scalar(
                insert(schema.task)
                .values(
                    name=task.name,
                    version=version,
                    backbone=task.backbone,
                    artifact=task.sha256,
                    labels=list(task.labels),
                    num_memory_tokens=task.num_memory_tokens,
                    num_parameters=task.num_parameters,
                    objective=task.objective,
                    config=dict(task.config),
                    metrics=dict(task.metrics),
                    data=dict(task.data),
                    code_version=addenda.__version__,
                    **_stamp(),
                )
                .returning(schema.task.c.id)
            )
            for position, parent in enumerate(task.parents):
                parent_row = connection.execute(
                    _tasks()
                    .where(schema.task.c.artifact == parent.sha256)
                    .order_by((schema.task.c.name != parent.name) | (schema.task.c.version != parent.version))
                ).first()
                if parent_row is None:
                    raise RegistryError(f"Task {task.name!r} extends {parent.ref!r}, which is not registered here.")
                if parent.class_token is None:
                    raise RegistryError(
                        f"Task {task.name!r} extends {parent.ref!r}, which is head-only: it has no token."
                    )
                connection.execute(
                    insert(schema.task_parent).values(task_id=task_id, position=position, parent_id=parent_row.id)
                )
            connection.execute(insert(schema.golden).values(task_id=task_id, **golden_row, **_stamp()))
            if statistics is not None:
                connection.execute(
                    insert(schema.statistics).values(task_id=task_id, sha256=statistics.sha256, data=statistics.data)
                )
            _append_event(connection, "registered", f"{task.name}:{version}", sha256=task.sha256)
            return _load(connection, _find(connection, f"{task.name}:{version}"), {})

    def add_golden(self, ref: str, golden: Golden) -> None:
        """Records a golden probe made under further numerics, beside those that are there; a known one is left alone.

        Raises:
            UnknownTaskError: there is no such task.
            RegistryError: the probe is not one of this task, or does not hash to its digest.
        """
        with database_errors(f"Task {ref!r}: no probe was recorded"), writing(self._engine) as connection:
            row = _find(connection, ref)
            golden_row = _golden_row(f"{row.name}:{row.version}", len(row.labels), golden)
            known = select(schema.golden.c.digest).where(
                schema.golden.c.task_id == row.id,
                schema.golden.c.numerics_fingerprint == golden.numerics_fingerprint,
            )
            if connection.scalar(known) is None:
                connection.execute(insert(schema.golden).values(task_id=row.id, **golden_row, **_stamp()))
                _append_event(connection, "golden", f"{row.name}:{row.version}", numerics=golden.numerics_fingerprint)

    def retire(self, ref: str, reason: str = "") -> None:
        """Hides a version from `load` and from its bare name; nothing is deleted.

        Raises:
            UnknownTaskError: there is no such task.
            RegistryError: it is retired already, or an active task extends it.
        """
        with database_errors(f"Task {ref!r} was not retired"), writing(self._engine) as connection:
            row = _find(connection, ref)
            record = _record(connection, row)
            if record.retired is not None:
                raise RegistryError(f"Task {record.ref!r} is retired already.")
            children = connection.execute(
                _tasks()
                .join(schema.task_parent, schema.task_parent.c.task_id == schema.task.c.id)
                .where(schema.task_parent.c.parent_id == row.id, ~_retired())
            ).all()
            if children:
                names = ", ".join(f"{child.name}:{child.version}" for child in children)
                raise RegistryError(f"Task {record.ref!r} cannot be retired: active tasks extend it ({names}).")
            connection.execute(insert(schema.retirement).values(task_id=row.id, reason=reason, **_stamp()))
            _append_event(connection, "retired", record.ref, reason=reason)

    def set_alias(self, alias: str, ref: str) -> None:
        """Points `name@alias` at a version; where it pointed before stays in the events.

        Raises:
            UnknownTaskError: there is no such task.
            RegistryError: the alias is not a valid name.
        """
        check_name(alias)
        with database_errors(f"Alias {alias!r} was not set"), writing(self._engine) as connection:
            row = _find(connection, ref)
            key = (schema.alias.c.name == row.name) & (schema.alias.c.alias == alias)
            before = connection.scalar(
                select(schema.task.c.version).join(schema.alias, schema.alias.c.task_id == schema.task.c.id).where(key)
            )
            if before is None:
                connection.execute(insert(schema.alias).values(name=row.name, alias=alias, task_id=row.id))
            else:
                connection.execute(update(schema.alias).where(key).values(task_id=row.id))
            _append_event(connection, "alias", f"{row.name}@{alias}", version=row.version, before=before)

    def add_evaluation(
        self, ref: str, data_fingerprint: str, numerics_fingerprint: str, metrics: Mapping[str, Any], logits_digest: str
    ) -> EvaluationRecord:
        """Records one scoring of a task.

        Raises:
            UnknownTaskError: there is no such task.
        """
        with database_errors(f"The evaluation of {ref!r} was not recorded"), writing(self._engine) as connection:
            row = _find(connection, ref)
            _append_event(connection, "evaluated", f"{row.name}:{row.version}", data=data_fingerprint)
            values: dict[str, Any] = {
                "data_fingerprint": data_fingerprint,
                "generation": _generation(connection),
                "numerics_fingerprint": numerics_fingerprint,
                "metrics": dict(metrics),
                "logits_digest": logits_digest,
                **_stamp(),
            }
            connection.execute(insert(schema.evaluation).values(task_id=row.id, **values))
            return EvaluationRecord(task=f"{row.name}:{row.version}", **values)


def _tasks() -> Select[Any]:
    return select(schema.task)


def _retired() -> Any:
    return select(schema.retirement.c.task_id).where(schema.retirement.c.task_id == schema.task.c.id).exists()


def _generation(connection: Connection) -> int:
    return connection.scalar(select(func.max(schema.event.c.id))) or 0


def _stamp() -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        user = "unknown"
    return {"created_by": user, "created_at": datetime.now(UTC).isoformat(timespec="microseconds")}


def _append_event(connection: Connection, kind: str, subject: str, **details: Any) -> None:
    connection.execute(insert(schema.event).values(kind=kind, subject=subject, details=details, **_stamp()))


def _golden_row(name: str, num_labels: int, golden: Golden) -> dict[str, Any]:
    if golden.logits.shape[-1] != num_labels:
        raise RegistryError(
            f"Task {name!r} has {num_labels} labels; its golden probe has {golden.logits.shape[-1]} columns."
        )
    data = golden.logits.cpu().contiguous().numpy().tobytes()
    if digest(data) != golden.digest:
        raise RegistryError(f"Task {name!r}: its golden probe does not hash to its digest.")
    return {
        "numerics_fingerprint": golden.numerics_fingerprint,
        "numerics": dict(golden.numerics),
        "digest": golden.digest,
        "logits": data,
    }


def _find(connection: Connection, ref: str) -> Row[Any]:
    """The task row of a reference."""
    query = _tasks().order_by(schema.task.c.version.desc())
    name, at, alias = ref.partition("@")
    if at:
        query = query.join(schema.alias, schema.alias.c.task_id == schema.task.c.id).where(
            schema.alias.c.name == name, schema.alias.c.alias == alias
        )
    else:
        name, colon, version = ref.partition(":")
        query = query.where(schema.task.c.name == name)
        if colon:
            query = query.where(schema.task.c.version == (int(version) if NUMBER.fullmatch(version) else -1))
        else:
            query = query.where(~_retired())
    row = connection.execute(query).first()
    if row is None:
        known = sorted(set(connection.scalars(select(schema.task.c.name))))
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
        listed = ", ".join(repr(k) for k in near) + (", …" if len(near) < len(known) else "")
        why = "has no active version" if name in known and ref == name else "is not registered"
        raise UnknownTaskError(f"Task {ref!r} {why}. Known: {listed or 'none'}. See: addenda tasks list")
    return row


def _record(connection: Connection, row: Row[Any]) -> TaskRecord:
    parents = connection.execute(
        _tasks()
        .join(schema.task_parent, schema.task_parent.c.parent_id == schema.task.c.id)
        .where(schema.task_parent.c.task_id == row.id)
        .order_by(schema.task_parent.c.position)
    )
    retired = select(schema.retirement.c.reason).where(schema.retirement.c.task_id == row.id)
    aliases = select(schema.alias.c.alias).where(schema.alias.c.task_id == row.id).order_by(schema.alias.c.alias)
    size = select(func.length(schema.artifact.c.data)).where(schema.artifact.c.sha256 == row.artifact)
    known = select(func.length(schema.statistics.c.data)).where(schema.statistics.c.task_id == row.id)
    return TaskRecord(
        name=row.name,
        version=row.version,
        backbone=row.backbone,
        sha256=row.artifact,
        size_bytes=connection.scalar(size) or 0,
        statistics_bytes=connection.scalar(known) or 0,
        labels=tuple(row.labels),
        num_memory_tokens=row.num_memory_tokens,
        num_parameters=row.num_parameters,
        objective=row.objective,
        config=row.config,
        metrics=row.metrics,
        data=row.data,
        extends=tuple(f"{parent.name}:{parent.version}" for parent in parents),
        aliases=tuple(connection.scalars(aliases)),
        retired=connection.scalar(retired),
        created_by=row.created_by,
        created_at=row.created_at,
    )


def _load(connection: Connection, row: Row[Any], known: dict[str, Task]) -> Task:
    """Decodes a task and its ancestors, each once."""

    def parent(sha256: str) -> Task:
        found = connection.execute(
            _tasks()
            .join(schema.task_parent, schema.task_parent.c.parent_id == schema.task.c.id)
            .where(schema.task_parent.c.task_id == row.id, schema.task.c.artifact == sha256)
        ).first()
        if found is None:
            raise IntegrityError(f"it extends a task with sha256 {sha256[:16]}… that is missing")
        return _load(connection, found, known)

    ref = f"{row.name}:{row.version}"
    if ref in known:
        return known[ref]
    artifact = connection.scalar(select(schema.artifact.c.data).where(schema.artifact.c.sha256 == row.artifact))
    try:
        if artifact is None:
            raise IntegrityError("its artifact is missing")
        stored = {"name": row.name, "version": row.version, "config": row.config, "metrics": row.metrics}
        task = decode(artifact, row.artifact, parent, {**stored, "data": row.data})
        if (task.backbone, list(task.labels), task.objective) != (row.backbone, row.labels, row.objective):
            raise IntegrityError("its row and its artifact name different backbones, labels or objectives")
    except IntegrityError as error:
        raise IntegrityError(f"Task {ref!r} cannot be trusted: {str(error).rstrip('.')}.") from error
    known[ref] = task
    return task
