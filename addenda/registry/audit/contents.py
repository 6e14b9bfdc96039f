"""Whether every stored byte is what its row says, and every row points at rows that there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

from sqlalchemy import Column, Connection, Row, Select, String, Table, cast, null, select

from addenda.exceptions import IntegrityError
from addenda.registry.audit.faults import PAGE, Fault, any_text, pages, readable, rows_alone
from addenda.registry.store import schema
from addenda.registry.store.artifact import read
from addenda.registry.store.digests import digest
from addenda.registry.store.names import NAME
from addenda.registry.store.queries import ref_column
from addenda.registry.store.task_reader import FeatureStatistics


def content_faults(connection: Connection) -> Iterator[Fault]:
    """Backbones and tasks that cannot be read, and tasks with other bytes than registered; one's bytes at a time."""
    fingerprint, task = schema.backbone.c.fingerprint, schema.task.c
    with any_text(connection):
        fingerprints = connection.scalars(select(fingerprint)).all()
    known = readable(connection, select(schema.backbone), fingerprint, fingerprints)
    yield from (Fault(missing, "cannot be read") for missing in fingerprints if missing not in known)
    damaged: dict[int, str] = {}
    for ids in pages(connection, task.id):
        rows = readable(connection, select(schema.task), task.id, ids)
        with any_text(connection):
            names = readable(connection, select(task.id, task.name, task.version), task.id, ids)
        for number in ids:
            ref = "{name}:{version}".format_map(names.get(number, {"name": "task", "version": number}))
            try:
                with rows_alone(connection):
                    if number not in rows:
                        raise IntegrityError("cannot be read")
                    check_stored(connection, rows[number], damaged)
                    if not NAME.fullmatch(rows[number]["name"]):
                        raise IntegrityError("has a name that no task can have")
            except IntegrityError as error:
                damaged[number] = ref
                yield Fault(ref, str(error))


def check_stored(connection: Connection, row: Mapping[str, Any], damaged: Mapping[int, str]) -> None:
    """Raises IntegrityError unless a task's bytes are right, and it extends none of the damaged, named by their ids."""
    parent, statistics, golden = schema.task_parent.c, schema.statistics.c, schema.golden.c
    stored = connection.scalar(select(schema.artifact.c.data).where(schema.artifact.c.sha256 == row["artifact"]))
    if stored is None:
        raise IntegrityError("its artifact is missing")
    manifest, _ = read(stored, row["artifact"])
    if any(manifest[key] != row[key] for key in ("backbone", "labels", "objective")):
        raise IntegrityError("its row and its artifact name different backbones, labels or objectives")
    parents = connection.execute(
        select(schema.task.c.id, schema.task.c.artifact)
        .join(schema.task_parent, parent.parent_id == schema.task.c.id)
        .where(parent.task_id == row["id"])
        .order_by(parent.position)
    ).all()
    if [p.artifact for p in parents] != manifest["extends"]:
        raise IntegrityError("its rows and its artifact name different tasks that it extends")
    probes = connection.execute(select(golden.digest, golden.logits).where(golden.task_id == row["id"])).all()
    for probe in probes:
        if digest(probe.logits) != probe.digest or len(probe.logits) % (4 * len(row["labels"])):
            raise IntegrityError("its golden probe's stored bytes have changed")
    kept = connection.execute(select(statistics.data, statistics.sha256).where(statistics.task_id == row["id"])).first()
    if kept is not None:
        FeatureStatistics.decode(kept.data, kept.sha256, len(row["labels"]))
    for p in parents:
        if p.id in damaged:
            raise IntegrityError(f"it extends {damaged[p.id]!r}, which is damaged")


def key_faults(connection: Connection) -> Iterator[Fault]:
    """Rows that point at rows that are not there, artifacts of no task, and numbers that were left out."""
    with any_text(connection):
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
    """Rows of a table whose column names no row of another; `task_parent` and `task` are each other's."""
    other = target.table.alias()
    lost = ~select(other.c[target.name]).where(other.c[target.name] == column).exists()
    for row in connection.execute(_owned(table, column).where(lost)):
        what = "row" if row.owner is None else f"{table.name} row"
        yield Fault(_owner(table, row), f"has a {what} of {target.table.name} {row.value!r}, which is not there")


def _misnumbered(connection: Connection, table: Table) -> Iterator[Fault]:
    """Rows whose numbers leave one out, or are not in the order of the events that wrote them."""
    expected, event = 1, 0
    query = _owned(table, table.c.event_id).add_columns(table.c.id).order_by(table.c.id)
    for row in connection.execute(query.execution_options(yield_per=PAGE)):
        if row.id != expected:
            yield Fault(_owner(table, row), f"is number {row.id} of {table.name}, where {expected} comes next")
        elif row.value < event:
            yield Fault(_owner(table, row), f"is number {row.id} of {table.name}, before some of earlier events")
        expected, event = row.id + 1, row.value


def _owned(table: Table, column: Column[Any]) -> Select[Any]:
    """A table's rows: a column's value, the key as text, and the task that they are of, if any."""
    parts: list[Any] = [cast(part, String) for part in table.primary_key]
    key = reduce(lambda one, other: one + ", " + other, parts)
    chosen = select(column.label("value"), key.label("key"))
    of_task = table.c.id if table is schema.task else table.c.get("task_id")
    if of_task is None:
        return chosen.add_columns(null().label("owner"))
    task = schema.task.alias()
    return chosen.add_columns(ref_column(task).label("owner")).join_from(
        table, task, task.c.id == of_task, isouter=True
    )


def _owner(table: Table, row: Row[Any]) -> str:
    """What a fault of a row is said of."""
    return str(row.key) if table is schema.backbone else str(row.owner or f"{table.name} ({row.key})")
