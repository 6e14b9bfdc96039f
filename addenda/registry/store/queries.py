"""Finding tasks: by reference, and by what a person asks for, a page at a time."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    LargeBinary,
    Row,
    Select,
    String,
    Table,
    cast,
    func,
    select,
)

from addenda.exceptions import DataError, UnknownTaskError
from addenda.registry.store import schema
from addenda.registry.store.header import insides
from addenda.registry.store.records import EvaluationRecord, EvaluationRow, TaskColumns, TaskRecord, columns_of

SEEN = 200  # names that are looked at, at most, for those like one that is not there
_BATCH = 500
NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class TaskFilter:
    """Which tasks to list; every condition given must hold.

    Attributes:
        name: exactly this name, or names that match it where it holds a `*`.
        backbone: the start of a backbone's fingerprint, or its timm name.
        tag: carries this tag.
        extends: extends this task directly: `name:version`.
        min_score: headline metric, 0 to 1, at least; of the test images, else of the validation part.
        since: registered at this time or later, ISO 8601, in UTC where it names no zone; a date will do.
        until: registered before this time.
        retired: whether retired tasks are listed too.
    """

    name: str | None = None
    backbone: str | None = None
    tag: str | None = None
    extends: str | None = None
    min_score: float | None = None
    since: str | None = None
    until: str | None = None
    retired: bool = False


def ref_of(row: Row[Any]) -> str:
    """`name:version` of a task's row."""
    return f"{row.name}:{row.version}"


def ref_column(task: FromClause) -> ColumnElement[str]:
    """`name:version` of the tasks of a query."""
    return task.c.name + ":" + cast(task.c.version, String)


def is_retired(connection: Connection, row: Row[Any]) -> bool:
    """Whether a task is retired."""
    return bool(connection.scalar(select(retired()).where(schema.task.c.id == row.id)))


def retired() -> ColumnElement[bool]:
    """The condition that a task is retired."""
    return select(schema.retirement.c.task_id).where(schema.retirement.c.task_id == schema.task.c.id).exists()


def listing(connection: Connection, chosen: TaskFilter, limit: int | None, before: str | None) -> Select[Any]:
    """The tasks of a filter, newest first, as `Reader.tasks` says; `limit` None: all."""
    task = schema.task.c
    query = select(task.id).order_by(task.id.desc())
    if chosen.name is not None:
        pattern = chosen.name.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_").replace("*", "%")
        query = query.where(task.name.like(pattern, escape="\\") if "*" in chosen.name else task.name == chosen.name)
    if chosen.backbone is not None:
        backbone = schema.backbone.c
        is_it = (backbone.name == chosen.backbone) | backbone.fingerprint.startswith(chosen.backbone, autoescape=True)
        query = query.where(task.backbone.in_(select(backbone.fingerprint).where(is_it)))
    if chosen.tag is not None:
        query = query.where(task.id.in_(select(schema.tag.c.task_id).where(schema.tag.c.tag == chosen.tag)))
    if chosen.extends is not None:
        of, parent = schema.task_parent.c, find(connection, chosen.extends).id
        query = query.where(task.id.in_(select(of.task_id).where(of.parent_id == parent)))
    if chosen.min_score is not None:
        query = query.where(task.score >= chosen.min_score)
    if chosen.since is not None:
        query = query.where(task.created_at >= _utc(chosen.since))
    if chosen.until is not None:
        query = query.where(task.created_at < _utc(chosen.until))
    if not chosen.retired:
        query = query.where(~retired())
    if before is not None:
        query = query.where(task.id < find(connection, before).id)
    # The numbers are found in an index that holds all columns asked for above; whole rows are read for one page only.
    page = query.limit(limit).correlate(None)
    return select(schema.task).where(task.id.in_(page)).order_by(task.id.desc())


def current(connection: Connection, backbone: str, alias: str | None) -> list[Row[Any]]:
    """Rows of the newest active version of each name on a backbone, or of those of an alias; oldest first."""
    query = select(schema.task).where(schema.task.c.backbone == backbone)
    query = query.order_by(schema.task.c.version)  # an older one may have been imported after a newer one
    query = query.where(~retired()) if alias is None else query.join(schema.alias).where(schema.alias.c.alias == alias)
    newest = {row.name: row for row in connection.execute(query)}
    return sorted(newest.values(), key=lambda row: int(row.id))


def _utc(text: str) -> str:
    """A time as it is stored; DataError where it is none."""
    try:
        given = datetime.fromisoformat(text)
    except ValueError as error:
        raise DataError(f"{text!r} is no time: write 2026-01-31, or 2026-01-31T12:00, in UTC.") from error
    utc = given.replace(tzinfo=UTC) if given.tzinfo is None else given.astimezone(UTC)
    return utc.isoformat(timespec="microseconds")


def find(connection: Connection, ref: str) -> Row[Any]:
    """The task row of a reference; UnknownTaskError where there is no such task, version or alias."""
    task = schema.task.c
    query = select(schema.task).order_by(task.version.desc()).limit(1)
    name, at, alias = ref.partition("@")
    if at:
        query = query.join(schema.alias).where(schema.alias.c.name == name, schema.alias.c.alias == alias)
    else:
        name, colon, version = ref.partition(":")
        number = int(version) if NUMBER.fullmatch(version) else -1
        query = query.where(task.name == name, task.version == number if colon else ~retired())
    row = connection.execute(query).first()
    if row is None:
        names = select(task.name).distinct().order_by(task.name).limit(SEEN)
        alike = task.name.startswith(name[:2], autoescape=True)
        known = list(dict.fromkeys((*connection.scalars(names.where(alike)), *connection.scalars(names))))
        near = difflib.get_close_matches(name[:100], known, n=5, cutoff=0.4) or known[:5]
        listed = ", ".join(repr(k) for k in near) + (", …" if len(near) < len(known) else "")
        there = connection.scalar(select(task.id).where(task.name == name).limit(1))
        why = "has no active version" if there is not None and ref == name else "is not registered"
        raise UnknownTaskError(f"Task {ref!r} {why}. Known: {listed or 'none'}. See: addenda tasks list")
    return row


def rows_where(connection: Connection, table: Table, column: str, values: Collection[Any]) -> dict[Any, list[Row[Any]]]:
    """A table's rows by the values of a column, in the order of their key; without the bytes that they hold."""
    found, listed = defaultdict(list), list(values)
    wanted = select(*(c for c in table.c if not isinstance(c.type, LargeBinary))).order_by(*table.primary_key)
    for start in range(0, len(listed), _BATCH):
        for row in connection.execute(wanted.where(table.c[column].in_(listed[start : start + _BATCH]))):
            found[getattr(row, column)].append(row)
    return found


def with_ancestors(
    connection: Connection, rows: Sequence[Row[Any]]
) -> tuple[dict[int, Row[Any]], dict[int, list[int]]]:
    """Rows of tasks and of all that they extend, by id, and the ids of each one's parents in order."""
    found: dict[int, Row[Any]] = {}
    parents: dict[int, list[int]] = defaultdict(list)
    while rows:
        level = {row.id: row for row in rows}
        found |= level
        edges = rows_where(connection, schema.task_parent, "task_id", level)
        parents |= {child: [edge.parent_id for edge in kin] for child, kin in edges.items()}
        unseen = {parent for child in edges for parent in parents[child]} - found.keys()
        rows = [row for rows in rows_where(connection, schema.task, "id", unseen).values() for row in rows]
    return found, parents


def evaluations(connection: Connection, chosen: ColumnElement[bool]) -> list[EvaluationRecord]:
    """The recorded scorings of the tasks that a condition holds for, oldest first."""
    task, evaluation = schema.task.c, schema.evaluation.c
    columns = [evaluation[name] for name in (*columns_of(EvaluationRow), "event_id")]
    query = select(task.name, task.version, *columns).join_from(schema.evaluation, schema.task)
    return [
        EvaluationRecord(task=ref_of(row), **{column.name: row._mapping[column] for column in columns})
        for row in connection.execute(query.where(chosen).order_by(evaluation.id))
    ]


def records(connection: Connection, rows: Sequence[Row[Any]]) -> list[TaskRecord]:
    """What is known of some task rows; a fixed number of queries for each _BATCH of them."""
    starts = range(0, len(rows), _BATCH)
    return [record for start in starts for record in _records(connection, rows[start : start + _BATCH])]


def _records(connection: Connection, rows: Sequence[Row[Any]]) -> list[TaskRecord]:
    ids, hashes = {row.id for row in rows}, {row.artifact for row in rows}
    parent, of = schema.task.alias(), schema.task_parent.c
    edges = select(of.task_id, ref_column(parent)).join(parent, of.parent_id == parent.c.id).where(of.task_id.in_(ids))
    parents = defaultdict(list)
    for child, ref in connection.execute(edges.order_by(of.task_id, of.position)):
        parents[child].append(ref)
    aliases = rows_where(connection, schema.alias, "task_id", ids)
    tags = rows_where(connection, schema.tag, "task_id", ids)
    retirements = rows_where(connection, schema.retirement, "task_id", ids)

    def sizes(table: Table, key: str, values: Collection[Any]) -> dict[Any, int]:
        query = select(table.c[key], func.length(table.c.data)).where(table.c[key].in_(values))
        return dict(connection.execute(query).all())

    size_bytes = sizes(schema.artifact, "sha256", hashes)
    statistics_bytes = sizes(schema.statistics, "task_id", ids)
    found = insides(connection, hashes)
    return [
        TaskRecord(
            **{column: getattr(row, column) for column in columns_of(TaskColumns) if column != "labels"},
            labels=tuple(row.labels),
            sha256=row.artifact,
            size_bytes=size_bytes.get(row.artifact, 0),
            **found[row.artifact]._asdict(),
            statistics_bytes=statistics_bytes.get(row.id, 0),
            extends=tuple(parents[row.id]),
            aliases=tuple(one.alias for one in aliases[row.id]),
            tags=tuple(one.tag for one in tags[row.id]),
            retired=next((one.reason for one in retirements[row.id]), None),
            generation=row.event_id,
        )
        for row in rows
    ]
