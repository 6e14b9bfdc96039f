"""Checks of stored bytes against their digests, and of references between rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

from sqlalchemy import Column, Connection, Row, Select, String, Table, cast, null, select

from addenda.exceptions import IntegrityError
from addenda.registry.audit.faults import PAGE_SIZE, Fault, lenient_text, pages, readable_rows, row_errors
from addenda.registry.store import schema
from addenda.registry.store.artifact import read
from addenda.registry.store.digests import digest
from addenda.registry.store.names import NAME
from addenda.registry.store.queries import ref_column
from addenda.registry.store.task_reader import FeatureStatistics


def content_faults(connection: Connection) -> Iterator[Fault]:
    """Yields unreadable backbones and tasks, and tasks whose stored bytes have changed; loads one task at a time."""
    fingerprint, task = schema.backbone.c.fingerprint, schema.task.c
    with lenient_text(connection):
        fingerprints = connection.scalars(select(fingerprint)).all()
    readable = readable_rows(connection, select(schema.backbone), fingerprint, fingerprints)
    yield from (Fault(subject, "cannot be read") for subject in fingerprints if subject not in readable)
    damaged: dict[int, str] = {}
    for ids in pages(connection, task.id):
        rows = readable_rows(connection, select(schema.task), task.id, ids)
        with lenient_text(connection):
            names = readable_rows(connection, select(task.id, task.name, task.version), task.id, ids)
        for task_id in ids:
            ref = "{name}:{version}".format_map(names.get(task_id, {"name": "task", "version": task_id}))
            try:
                with row_errors(connection):
                    if task_id not in rows:
                        raise IntegrityError("cannot be read")
                    check_stored(connection, rows[task_id], damaged)
                    if not NAME.fullmatch(rows[task_id]["name"]):
                        raise IntegrityError("has an invalid name")
            except IntegrityError as error:
                damaged[task_id] = ref
                yield Fault(ref, str(error))


def check_stored(connection: Connection, row: Mapping[str, Any], damaged: Mapping[int, str]) -> None:
    """Checks a task's stored bytes and its parents; raises IntegrityError.

    Args:
        connection: a connection to the registry.
        row: the task's row.
        damaged: references of the tasks known to be damaged, by id; a task that extends one is damaged too.
    """
    parent, statistics, golden = schema.task_parent.c, schema.statistics.c, schema.golden.c
    stored = connection.scalar(select(schema.artifact.c.data).where(schema.artifact.c.sha256 == row["artifact"]))
    if stored is None:
        raise IntegrityError("its artifact is missing")
    manifest, _ = read(stored, row["artifact"])
    if any(manifest[key] != row[key] for key in ("backbone", "labels", "objective")):
        raise IntegrityError("its row and its artifact disagree on backbone, labels or objective")
    parents = connection.execute(
        select(schema.task.c.id, schema.task.c.artifact)
        .join(schema.task_parent, parent.parent_id == schema.task.c.id)
        .where(parent.task_id == row["id"])
        .order_by(parent.position)
    ).all()
    if [p.artifact for p in parents] != manifest["extends"]:
        raise IntegrityError("its rows and its artifact disagree on the tasks it extends")
    probes = connection.execute(select(golden.digest, golden.logits).where(golden.task_id == row["id"])).all()
    for probe in probes:
        if digest(probe.logits) != probe.digest or len(probe.logits) % (4 * len(row["labels"])):
            raise IntegrityError("its golden probe's stored bytes have changed")
    query = select(statistics.data, statistics.sha256).where(statistics.task_id == row["id"])
    if (stored_statistics := connection.execute(query).first()) is not None:
        FeatureStatistics.decode(stored_statistics.data, stored_statistics.sha256, len(row["labels"]))
    for p in parents:
        if p.id in damaged:
            raise IntegrityError(f"it extends {damaged[p.id]!r}, which is damaged")


def key_faults(connection: Connection) -> Iterator[Fault]:
    """Yields dangling references, artifacts without a task, and gaps in the ids."""
    with lenient_text(connection):
        for table in schema.metadata.sorted_tables:
            for column in table.c:
                for key in column.foreign_keys:
                    yield from _dangling(connection, table, column, key.column)
            if "event_id" in table.c:
                yield from _dangling(connection, table, table.c.event_id, schema.event.c.id)
            if table in (schema.task, schema.evaluation):
                yield from _misnumbered(connection, table)
        artifact_of = select(schema.task.c.id).where(schema.task.c.artifact == schema.artifact.c.sha256)
        for sha256 in connection.scalars(select(schema.artifact.c.sha256).where(~artifact_of.exists())):
            yield Fault(f"artifact {sha256}", "belongs to no task")


def _dangling(connection: Connection, table: Table, column: Column[Any], target: Column[Any]) -> Iterator[Fault]:
    """Yields rows of a table whose `column` refers to a missing row."""
    other = target.table.alias()
    is_missing = ~select(other.c[target.name]).where(other.c[target.name] == column).exists()
    for row in connection.execute(_rows_with_owner(table, column).where(is_missing)):
        what = "row" if row.owner is None else f"{table.name} row"
        message = f"has a {what} that refers to {target.table.name} {row.value!r}, which does not exist"
        yield Fault(_subject(table, row), message)


def _misnumbered(connection: Connection, table: Table) -> Iterator[Fault]:
    """Yields rows after a gap in the ids, or whose ids are not in the order of their events."""
    expected, event = 1, 0
    query = _rows_with_owner(table, table.c.event_id).add_columns(table.c.id).order_by(table.c.id)
    for row in connection.execute(query.execution_options(yield_per=PAGE_SIZE)):
        if row.id != expected:
            yield Fault(_subject(table, row), f"has id {row.id} in {table.name}; expected {expected}")
        elif row.value < event:
            message = f"has id {row.id} in {table.name}, but an earlier event than the row before it"
            yield Fault(_subject(table, row), message)
        expected, event = row.id + 1, row.value


def _rows_with_owner(table: Table, column: Column[Any]) -> Select[Any]:
    """Selects a table's rows as `value` (of the column), `key` (as text) and `owner` (the task, or None)."""
    key_columns: list[Any] = [cast(key_column, String) for key_column in table.primary_key]
    key = reduce(lambda left, right: left + ", " + right, key_columns)
    rows = select(column.label("value"), key.label("key"))
    task_id = table.c.id if table is schema.task else table.c.get("task_id")
    if task_id is None:
        return rows.add_columns(null().label("owner"))
    task = schema.task.alias()
    return rows.add_columns(ref_column(task).label("owner")).join_from(table, task, task.c.id == task_id, isouter=True)


def _subject(table: Table, row: Row[Any]) -> str:
    """The subject of a row's fault."""
    return str(row.key) if table is schema.backbone else str(row.owner or f"{table.name} ({row.key})")
