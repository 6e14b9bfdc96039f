"""Integrity faults of stored rows and bytes, found although some rows are unreadable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, Row, Select, String, Table, cast, null, select
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from addenda.exceptions import IntegrityError
from addenda.registry.store import schema
from addenda.registry.store.artifact import read
from addenda.registry.store.names import NAME
from addenda.registry.store.queries import ref_column
from addenda.registry.store.task_reader import load_goldens, load_statistics

K, V = TypeVar("K"), TypeVar("V")

VALUE_ERRORS = (ValueError, TypeError)
"""Errors that a damaged value raises: JSON that does not parse, bytes instead of text."""
READ_ERRORS = (SQLAlchemyError, *VALUE_ERRORS)
"""Errors that reading damaged rows raises."""
PAGE_SIZE = 500
"""Rows read at a time."""


@dataclass(frozen=True)
class Fault:
    """One integrity fault.

    Attributes:
        subject: the damaged object: a task `name:version`, an alias `name@alias`, `event 12`, a backbone's
            fingerprint, `artifact SHA256`, a row `table (key)`, `schema`, `history` or `database`.
        message: what is wrong, as a predicate of the subject ("is missing").
    """

    subject: str
    message: str


def pages(connection: Connection, key: Column[int]) -> Iterator[Sequence[int]]:
    """A table's ids in ascending order, PAGE_SIZE at a time."""
    query = select(key).order_by(key).limit(PAGE_SIZE)
    ids = connection.scalars(query).all()
    while ids:
        yield ids
        ids = connection.scalars(query.where(key > ids[-1])).all()


@contextmanager
def row_errors(connection: Connection) -> Iterator[None]:
    """Raises IntegrityError for errors caused by a row's content; a missing table or permission raises unchanged."""
    try:
        with connection.begin_nested():
            yield
    except READ_ERRORS as error:
        if isinstance(error, ProgrammingError) or "no such" in str(error):
            raise
        raise IntegrityError(f"cannot be read ({getattr(error, 'orig', None) or error})") from error


@contextmanager
def lenient_text(connection: Connection) -> Iterator[None]:
    """Makes SQLite escape invalid UTF-8 instead of raising; PostgreSQL never stores invalid UTF-8."""
    if connection.dialect.name != "sqlite":
        yield
        return
    driver: Any = connection.connection.driver_connection
    driver.text_factory = lambda data: data.decode(errors="backslashreplace")
    try:
        yield
    finally:
        driver.text_factory = str


def read_undamaged(
    connection: Connection, read: Callable[[Sequence[K]], Mapping[K, V]], keys: Sequence[K]
) -> dict[K, V]:
    """Calls `read` on the keys, and on each key alone if that fails; omits keys whose rows are unreadable."""
    try:
        with row_errors(connection):
            return dict(read(keys))
    except IntegrityError:
        batches = [[key] for key in keys] if len(keys) > 1 else []
        return {key: value for batch in batches for key, value in read_undamaged(connection, read, batch).items()}


def readable_rows(
    connection: Connection, query: Select[Any], key: Column[Any], keys: Sequence[Any]
) -> dict[Any, dict[str, Any]]:
    """Rows by key, without those that are unreadable."""

    def read(batch: Sequence[Any]) -> dict[Any, dict[str, Any]]:
        rows = connection.execute(query.where(key.in_(batch))).all()
        return {getattr(row, key.name): row._asdict() for row in rows}

    return read_undamaged(connection, read, keys)


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
    """Checks a task's stored bytes and its parents; a task that extends one of `damaged` is damaged too."""
    parent = schema.task_parent.c
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
    load_goldens(connection, row["id"], len(row["labels"]))
    load_statistics(connection, row["id"], len(row["labels"]))
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
    return str(row.key) if table is schema.backbone else str(row.owner or f"{table.name} ({row.key})")
