"""Queries for tasks: by reference, and by filter and page."""

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
from addenda.registry.store.header import read_headers
from addenda.registry.store.records import EvaluationRecord, EvaluationRow, TaskColumns, TaskRecord, columns_of

MAX_CANDIDATES = 200  # names compared with an unknown one, to suggest similar names
_BATCH = 500
VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class TaskFilter:
    """A filter for listing tasks; all given conditions must hold.

    Attributes:
        name: exact name, or a pattern with `*`.
        backbone: a backbone's timm name, or the start of its fingerprint.
        tag: has this tag.
        extends: extends this task directly: `name:version`.
        min_score: minimum headline metric, 0 to 1, on the test split or else on the validation split.
        since: registered at this time or later: ISO 8601 date or time, in UTC by default.
        until: registered before this time.
        retired: whether to include retired tasks.
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
    """A task row's `name:version`."""
    return f"{row.name}:{row.version}"


def ref_column(task: FromClause) -> ColumnElement[str]:
    """The SQL expression for `name:version`."""
    return task.c.name + ":" + cast(task.c.version, String)


def is_retired(connection: Connection, row: Row[Any]) -> bool:
    """Whether a task is retired."""
    return bool(connection.scalar(select(retired()).where(schema.task.c.id == row.id)))


def retired() -> ColumnElement[bool]:
    """The SQL condition that a task is retired."""
    return select(schema.retirement.c.task_id).where(schema.retirement.c.task_id == schema.task.c.id).exists()


def listing(connection: Connection, chosen: TaskFilter, limit: int | None, before: str | None) -> Select[Any]:
    """The query for tasks that match a filter, newest first; see `Reader.tasks`."""
    task = schema.task.c
    query = select(task.id).order_by(task.id.desc())
    if chosen.name is not None:
        pattern = chosen.name.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_").replace("*", "%")
        query = query.where(task.name.like(pattern, escape="\\") if "*" in chosen.name else task.name == chosen.name)
    if chosen.backbone is not None:
        backbone = schema.backbone.c
        starts = backbone.fingerprint.startswith(chosen.backbone, autoescape=True)
        matches = select(backbone.fingerprint).where((backbone.name == chosen.backbone) | starts)
        query = query.where(task.backbone.in_(matches))
    if chosen.tag is not None:
        query = query.where(task.id.in_(select(schema.tag.c.task_id).where(schema.tag.c.tag == chosen.tag)))
    if chosen.extends is not None:
        edge, parent = schema.task_parent.c, find(connection, chosen.extends).id
        query = query.where(task.id.in_(select(edge.task_id).where(edge.parent_id == parent)))
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
    # A covering index answers the inner query for ids; full rows are read for one page only.
    page = query.limit(limit).correlate(None)
    return select(schema.task).where(task.id.in_(page)).order_by(task.id.desc())


def current(connection: Connection, backbone: str, alias: str | None) -> list[Row[Any]]:
    """Rows of the newest active version of each task on a backbone, or of an alias's versions, oldest first."""
    query = select(schema.task).where(schema.task.c.backbone == backbone)
    query = query.order_by(schema.task.c.version)  # not by id: an older version may be imported after a newer one
    query = query.where(~retired()) if alias is None else query.join(schema.alias).where(schema.alias.c.alias == alias)
    newest = {row.name: row for row in connection.execute(query)}
    return sorted(newest.values(), key=lambda row: int(row.id))


def _utc(text: str) -> str:
    """Converts an ISO 8601 time to its stored form; raises DataError if it is invalid."""
    try:
        time = datetime.fromisoformat(text)
        utc = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        message = f"{text!r} is not an ISO 8601 time. Examples, in UTC: 2026-01-31, 2026-01-31T12:00."
        raise DataError(message) from error
    return utc.isoformat(timespec="microseconds")


def plain_name(name: str) -> str:
    """Returns a task's name; raises UnknownTaskError for other references: a version, an alias or a pattern."""
    if any(mark in name for mark in ":@*"):
        raise UnknownTaskError(f"Task {name!r} is not registered: a name has no ':', '@' or '*'.")
    return name


def find(connection: Connection, ref: str) -> Row[Any]:
    """The task row of a reference; raises UnknownTaskError."""
    task = schema.task.c
    query = select(schema.task).order_by(task.version.desc()).limit(1)
    name, at, alias = ref.partition("@")
    if at:
        query = query.join(schema.alias).where(schema.alias.c.name == name, schema.alias.c.alias == alias)
    else:
        name, colon, version = ref.partition(":")
        number = int(version) if VERSION.fullmatch(version) else -1
        query = query.where(task.name == name, task.version == number if colon else ~retired())
    row = connection.execute(query).first()
    if row is None:
        newest = connection.scalar(select(func.max(task.version)).where(task.name == name))
        if newest is not None and at:
            raise UnknownTaskError(f"Task {name!r} has no alias {alias!r}. See: addenda tasks show {name}")
        if newest is not None and ref == name:
            raise UnknownTaskError(
                f"Task {ref!r} has no active version: all were retired. Name one, such as '{name}:{newest}'; see: "
                f"addenda tasks list {name} --retired"
            )
        names = select(task.name).distinct().order_by(task.name).limit(MAX_CANDIDATES)
        same_start = task.name.startswith(name[:2], autoescape=True)
        known = list(dict.fromkeys((*connection.scalars(names.where(same_start)), *connection.scalars(names))))
        similar = difflib.get_close_matches(name[:100], known, n=5, cutoff=0.4) or known[:5]
        listed = ", ".join(map(repr, similar)) + (", …" if len(similar) < len(known) else "")
        raise UnknownTaskError(f"Task {ref!r} is not registered. Known: {listed or 'none'}. See: addenda tasks list")
    return row


def rows_where(connection: Connection, table: Table, column: str, values: Collection[Any]) -> dict[Any, list[Row[Any]]]:
    """A table's rows grouped by the values of a column, ordered by primary key, without binary columns."""
    groups, listed = defaultdict(list), list(values)
    query = select(*(c for c in table.c if not isinstance(c.type, LargeBinary))).order_by(*table.primary_key)
    for start in range(0, len(listed), _BATCH):
        for row in connection.execute(query.where(table.c[column].in_(listed[start : start + _BATCH]))):
            groups[getattr(row, column)].append(row)
    return groups


def with_ancestors(
    connection: Connection, rows: Sequence[Row[Any]]
) -> tuple[dict[int, Row[Any]], dict[int, list[int]]]:
    """Rows of tasks and all their ancestors, by id, and each task's parent ids, in order."""
    tasks: dict[int, Row[Any]] = {}
    parents: dict[int, list[int]] = defaultdict(list)
    while rows:
        level = {row.id: row for row in rows}
        tasks |= level
        edges = rows_where(connection, schema.task_parent, "task_id", level)
        parents |= {child: [edge.parent_id for edge in group] for child, group in edges.items()}
        unseen = {parent for child in edges for parent in parents[child]} - tasks.keys()
        rows = [row for rows in rows_where(connection, schema.task, "id", unseen).values() for row in rows]
    return tasks, parents


def evaluations(connection: Connection, condition: ColumnElement[bool]) -> list[EvaluationRecord]:
    """The evaluations of the tasks that satisfy a condition, oldest first."""
    task, evaluation = schema.task.c, schema.evaluation.c
    columns = [evaluation[name] for name in (*columns_of(EvaluationRow), "event_id")]
    query = select(task.name, task.version, *columns).join_from(schema.evaluation, schema.task)
    return [
        EvaluationRecord(task=ref_of(row), **{column.name: row._mapping[column] for column in columns})
        for row in connection.execute(query.where(condition).order_by(evaluation.id))
    ]


def records(connection: Connection, rows: Sequence[Row[Any]]) -> list[TaskRecord]:
    """Records of task rows; uses a fixed number of queries per _BATCH rows."""
    starts = range(0, len(rows), _BATCH)
    return [record for start in starts for record in _records(connection, rows[start : start + _BATCH])]


def _records(connection: Connection, rows: Sequence[Row[Any]]) -> list[TaskRecord]:
    ids, hashes = {row.id for row in rows}, {row.artifact for row in rows}
    parent, edge = schema.task.alias(), schema.task_parent.c
    edges = select(edge.task_id, ref_column(parent)).join(parent, edge.parent_id == parent.c.id)
    edges = edges.where(edge.task_id.in_(ids)).order_by(edge.task_id, edge.position)
    parents = defaultdict(list)
    for child, ref in connection.execute(edges):
        parents[child].append(ref)
    aliases = rows_where(connection, schema.alias, "task_id", ids)
    tags = rows_where(connection, schema.tag, "task_id", ids)
    retirements = rows_where(connection, schema.retirement, "task_id", ids)

    def sizes(table: Table, key: str, values: Collection[Any]) -> dict[Any, int]:
        query = select(table.c[key], func.length(table.c.data)).where(table.c[key].in_(values))
        return dict(connection.execute(query).all())

    size_bytes = sizes(schema.artifact, "sha256", hashes)
    statistics_bytes = sizes(schema.statistics, "task_id", ids)
    headers = read_headers(connection, hashes)
    return [
        TaskRecord(
            **{column: getattr(row, column) for column in columns_of(TaskColumns) if column != "labels"},
            labels=tuple(row.labels),
            sha256=row.artifact,
            size_bytes=size_bytes.get(row.artifact, 0),
            **headers[row.artifact]._asdict(),
            statistics_bytes=statistics_bytes.get(row.id, 0),
            extends=tuple(parents[row.id]),
            aliases=tuple(alias.alias for alias in aliases[row.id]),
            tags=tuple(tag.tag for tag in tags[row.id]),
            retired=next((retirement.reason for retirement in retirements[row.id]), None),
            generation=row.event_id,
        )
        for row in rows
    ]
