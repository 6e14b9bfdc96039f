"""A changed, missing or added byte anywhere in a registry is detected and named, and the rest still passes."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import JSON, Column, Connection, Float, Integer, LargeBinary, Row, String, Table, cast, select, text
from sqlalchemy import exc as sql
from sqlalchemy.engine import make_url
from sqlalchemy.event import listen

from addenda.registry import Evaluation, Registry
from addenda.registry.audit import faults
from addenda.registry.audit.integrity import Integrity, check_rows
from addenda.registry.store import schema
from addenda.registry.store.queries import find
from addenda.registry.store.schema import statements
from addenda.registry.store.task_reader import load_task
from tests.support.databases import Database, Postgres, raw, rows, tamper, without_triggers
from tests.support.registries import BACKBONE, FINGERPRINT, a_statistic, a_task, keep, probe

TABLES = schema.metadata.sorted_tables
REFS = ("strokes:1", "digits:1", "old:1", "bystander:1", "twin:1")


def fill(location: str | Path) -> None:
    """Creates a registry with rows in every table; `bystander` is unrelated to others, `digits` extends `strokes`."""
    metrics = {"test": {"accuracy": 0.875, "per_class": {"zero": 1.0}}}
    with Registry.open(location, user="ada") as book:
        book.add_backbone(BACKBONE)
        keep(book, a_task("bystander", 1))
        parent = keep(book, a_task("strokes", 2, metrics=metrics, data={"count": 12}))
        child = a_task("digits", 3, parents=(parent,), config={"epochs": 20, "seed": None}, metrics=metrics)
        evaluation = Evaluation("d" * 64, "n" * 64, {"accuracy": 0.875}, "l" * 64)
        book.register(child, probe(child), a_statistic(), evaluations=[evaluation])
        keep(book, a_task("old", 4))
        book.register(a_task("twin", 3, parents=(parent,)), probe(child))
        book.set_alias("strokes", "production", 1)
        book.set_alias("strokes", "gone", 1)
        book.remove_alias("strokes", "gone")
        book.set_alias("digits", "production", 1)
        book.tag("digits", "good")
        book.tag("digits", "doubtful")
        book.untag("digits", "doubtful")
        book.note("digits", "seen by Ada")
        book.add_evaluation("digits", "e" * 64, "n" * 64, {"accuracy": 0.5}, "m" * 64)
        book.add_golden("strokes", probe(a_task(), "o" * 64))
        book.retire("old", "superseded")


@pytest.fixture(scope="module")
def filled(database: Database) -> str:
    location = database.new()
    fill(location)
    with Registry.open(location) as book:
        integrity = book.check_integrity()
        assert (integrity.ok, integrity.faults, integrity.unchecked, integrity.num_tasks) == (True, (), (), len(REFS))
        assert (integrity.generation, integrity.head) == (book.generation, book.events()[-1].digest)
    return location


@pytest.fixture
def copied(database: Database, filled: str) -> str:
    return database.copy(filled)


@pytest.fixture(scope="module")
def on_postgres(postgres: str) -> Iterator[Postgres]:
    made = Postgres(postgres)
    yield made
    made.close()


@contextmanager
def unguarded(location: str) -> Iterator[Connection]:
    """A transaction without triggers and foreign keys, so that any row can be damaged; it is rolled back."""
    with raw(location) as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")
        for table in TABLES:
            without_triggers(connection, table.name)
        yield connection
        connection.rollback()


def cells(connection: Connection) -> Iterator[tuple[Table, Row[Any], Column[Any]]]:
    for table in TABLES:
        table_rows = connection.execute(select(*raw_columns(table)).order_by(*table.primary_key)).all()
        assert table_rows, f"{table.name} without a row would prove nothing"
        yield from ((table, row, column) for row in table_rows for column in table.c)


def raw_columns(table: Table) -> list[Any]:
    """A table's columns, JSON columns as text."""
    return [cast(column, String).label(column.name) if isinstance(column.type, JSON) else column for column in table.c]


def kind(column: Column[Any]) -> type:
    return next(kind for kind in (JSON, String, LargeBinary, Integer, Float) if isinstance(column.type, kind))


def flips(value: Any, column: Column[Any], sqlite: bool) -> list[Any]:
    """The value with one bit flipped, at its start, middle or end; for text also a value that is not UTF-8."""
    if kind(column) is Integer:
        return [value ^ 1, value ^ 64]
    if kind(column) is Float:
        return [0.5 if value is None else struct.unpack("<d", flipped(struct.pack("<d", value), 0, 1))[0]]
    data = value if isinstance(value, bytes) else value.encode()
    if kind(column) is JSON:
        other = next((f for i in range(len(data)) if parses_differently(f := flipped(data, i, 1), data)), b"{]")
        return [other.decode(), *(["{" + value, flipped(data, len(data) // 2, 128)] if sqlite else [])]
    index = (0, len(data) // 2, len(data) - 1)[len(column.name) % 3]
    changed = flipped(data, index, 1)
    if isinstance(value, bytes):
        return [changed]
    return [changed.decode(), *([flipped(data, len(data) // 2, 128)] if sqlite else [])]


def parses_differently(text: bytes, original: bytes) -> bool:
    try:
        return json.loads(text) != json.loads(original)
    except ValueError:
        return False


def flipped(data: bytes, index: int, bit: int) -> bytes:
    return data[:index] + bytes([data[index] ^ bit]) + data[index + 1 :] if data else bytes([bit + 64])


def where(table: Table, row: Row[Any]) -> tuple[str, dict[str, Any]]:
    keys = [column.name for column in table.primary_key]
    return " AND ".join(f"{key} = :key_{key}" for key in keys), {f"key_{key}": getattr(row, key) for key in keys}


def damage(connection: Connection, table: Table, row: Row[Any], column: Column[Any], value: Any) -> Integrity | str:
    """Sets one cell, checks the registry and undoes the change; returns the result, or the database's error."""
    condition, keys = where(table, row)
    wrapped = ":value"
    if connection.dialect.name == "sqlite" and isinstance(value, bytes) and kind(column) is not LargeBinary:
        wrapped = "CAST(:value AS TEXT)"
    elif connection.dialect.name == "postgresql" and kind(column) is JSON:
        wrapped = "CAST(:value AS JSON)"
    with connection.begin_nested() as savepoint:
        try:
            with connection.begin_nested():
                update = f"UPDATE {table.name} SET {column.name} = {wrapped} WHERE {condition}"
                assert connection.execute(text(update), {"value": value, **keys}).rowcount == 1
        except (sql.IntegrityError, sql.DataError) as error:
            return str(error.orig)
        integrity = check_rows(connection)
        tasks_without_faults_load(connection, integrity)
        savepoint.rollback()
    return integrity


def tasks_without_faults_load(connection: Connection, integrity: Integrity) -> None:
    for ref in REFS:
        if not integrity.of(ref):
            assert load_task(connection, find(connection, ref)).ref == ref


def owners(connection: Connection, table: Table, row: Row[Any]) -> set[str]:
    """The possible subjects of a row's fault; at least one must be reported."""
    if table is schema.backbone:
        return {FINGERPRINT}
    if table is schema.event:
        return {f"event {row.id}"}
    if table is schema.alias:
        return {f"{row.name}@{row.alias}"}
    task = schema.task.c
    if table is schema.artifact:
        of = task.artifact == row.sha256
    else:
        of = task.id == (row.id if table is schema.task else row.task_id)
    return {f"{name}:{version}" for name, version in connection.execute(select(task.name, task.version).where(of))}


KEYS = {"id", "task_id", "parent_id", "event_id", "name", "version", "fingerprint", "sha256", "digest"}
"""Columns that relate rows to each other: damage to one may be reported for other subjects too."""


@pytest.mark.slow
def test_a_flipped_bit_in_any_cell_is_found_and_named_and_tasks_that_are_not_named_load(filled, database):
    outcomes: Counter[str] = Counter()
    sqlite = database.kind == "sqlite"
    with unguarded(filled) as connection:
        for table, row, column in list(cells(connection)):
            mine = owners(connection, table, row)
            for value in flips(getattr(row, column.name), column, sqlite):
                cell = f"{table.name}.{column.name} {getattr(row, column.name)!r:.60} -> {value!r:.60}"
                found = damage(connection, table, row, column, value)
                if isinstance(found, str):
                    assert "unique" in found.lower() or (value == "{]" and not sqlite), (cell, found)
                    outcomes["refused"] += 1
                    continue
                at = {f"event {value}"} if column is schema.event.c.id else set()
                assert {fault.subject for fault in found.faults} & (mine | at), (cell, found.faults)
                if column.name not in KEYS and table not in (schema.event, schema.backbone):
                    kin = mine | ({"digits:1", "twin:1"} if "strokes:1" in mine else set())
                    assert {ref for ref in REFS if found.of(ref)} <= kin, (cell, found.faults)
                outcomes["found"] += 1
        flips_of = {Integer: 2, Float: 1, LargeBinary: 1, String: 1 + sqlite, JSON: 1 + 2 * sqlite}
        columns = {table.name: sum(flips_of[kind(column)] for column in table.c) for table in TABLES}
        assert outcomes.total() == sum(columns[name] * len(found) for name, found in rows(filled).items())
        assert check_rows(connection).ok, "the damage was not undone"


def test_json_that_reads_the_same_is_no_fault(copied):
    """The only change of bytes that is allowed: the parsed value is equal."""
    columns = [(table, column) for table in TABLES for column in table.c if kind(column) is JSON]
    assert len(columns) == 9
    with unguarded(copied) as connection:
        for table, column in columns:
            row = connection.execute(select(*raw_columns(table)).order_by(*table.primary_key)).first()
            found = damage(connection, table, row, column, f" {getattr(row, column.name)}\n")
            assert isinstance(found, Integrity)
            assert found.ok, (table.name, column.name, found.faults)


@pytest.mark.slow
def test_a_missing_row_is_found_and_named(filled, database):
    deleted = 0
    with unguarded(filled) as connection:
        head = connection.scalar(select(schema.event.c.digest).order_by(schema.event.c.id.desc()).limit(1))
        for table, table_rows in [(table, connection.execute(select(table)).all()) for table in TABLES]:
            for row in table_rows:
                mine = owners(connection, table, row)
                condition, keys = where(table, row)
                with connection.begin_nested() as savepoint:
                    assert connection.execute(text(f"DELETE FROM {table.name} WHERE {condition}"), keys).rowcount == 1
                    integrity = check_rows(connection, head)
                    last = {"history"} if table is schema.event and row.id == integrity.generation + 1 else set()
                    subjects = {fault.subject for fault in integrity.faults}
                    assert subjects & (mine | last), (table.name, row, integrity.faults)
                    if table is not schema.task:
                        tasks_without_faults_load(connection, integrity)
                    savepoint.rollback()
                deleted += 1
    assert deleted == sum(map(len, rows(filled).values()))


DOUBLED: dict[str, dict[str, Any]] = {
    "artifact": {"sha256": "a" * 64},
    "backbone": {"fingerprint": "f" * 64},
    "event": {"id": 18},
    "task": {"id": 6, "version": 2},
    "task_parent": {"position": 1},
    "retirement": {"task_id": 1},
    "alias": {"alias": "staging"},
    "tag": {"tag": "better"},
    "evaluation": {"id": 3},
    "golden": {"numerics_fingerprint": "z" * 64},
    "statistics": {"task_id": 5},
}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_duplicate_row_is_found(filled, table):
    with unguarded(filled) as connection:
        row = connection.execute(select(*raw_columns(table)).order_by(*table.primary_key.columns)).first()
        other = row._asdict() | DOUBLED[table.name]
        values = (f"CAST(:{c.name} AS JSON)" if kind(c) is JSON and connection.dialect.name == "postgresql" else
                  f":{c.name}" for c in table.c)  # fmt: skip
        connection.execute(text(f"INSERT INTO {table.name} ({', '.join(other)}) VALUES ({', '.join(values)})"), other)
        integrity = check_rows(connection)
        assert not integrity.ok
        tasks_without_faults_load(connection, integrity)


def test_an_event_written_by_hand_is_found(copied):
    with unguarded(copied) as connection:
        last = connection.execute(select(schema.event).order_by(schema.event.c.id.desc()).limit(1)).one()
        forged = last._asdict() | {"id": last.id + 1, "kind": "noted", "subject": "digits:1", "details": {"text": "x"}}
        for digest in (last.digest, "0" * 64, ""):
            with connection.begin_nested() as savepoint:
                connection.execute(schema.event.insert().values(**forged | {"digest": digest}))
                assert {fault.subject for fault in check_rows(connection).faults} == {"event 18", "digits:1"}
                savepoint.rollback()


def test_events_that_changed_places_are_found(copied):
    with unguarded(copied) as connection:
        for number in range(1, 17):
            with connection.begin_nested() as savepoint:
                for one, other in ((number, 99), (number + 1, number), (99, number + 1)):
                    connection.execute(text("UPDATE event SET id = :to WHERE id = :of"), {"of": one, "to": other})
                named = {fault.subject for fault in check_rows(connection).faults}
                assert {f"event {number}", f"event {number + 1}"} <= named
                savepoint.rollback()


def test_a_truncated_history_is_found_by_a_digest_recorded_earlier(copied):
    with Registry.open(copied) as book:
        before = book.check_integrity().head
        book.note("digits", "inconvenient")
        noted = book.check_integrity().head
        assert book.check_integrity(head=before).ok
        tamper(copied, "event", "DELETE FROM event WHERE id = 18")
        ours = [fault for fault in book.check_integrity(head=noted).faults if fault.subject != "schema"]
        assert [fault.subject for fault in ours] == ["history"]
        assert f"no event with digest {noted}" in ours[0].message


def test_a_damaged_event_is_not_reported_for_later_events(copied, monkeypatch):
    monkeypatch.setattr(faults, "PAGE_SIZE", 3)  # so that the event is on another page than those around it
    with unguarded(copied) as connection:
        assert check_rows(connection).ok
        for change in ("created_by = 'eve'", "digest = 'f'", "subject = 'other:1'"):
            with connection.begin_nested() as savepoint:
                assert connection.execute(text(f"UPDATE event SET {change} WHERE id = 5")).rowcount == 1
                named = {fault.subject for fault in check_rows(connection).faults}
                assert {subject for subject in named if subject.startswith("event")} == {"event 5"}
                savepoint.rollback()


def test_a_child_of_a_damaged_task_is_named_and_says_why(copied):
    tamper(copied, "artifact", "UPDATE artifact SET data = :data WHERE sha256 = "
           "(SELECT artifact FROM task WHERE name = 'strokes')", data=b"short")  # fmt: skip
    with Registry.open(copied) as book:
        integrity = book.check_integrity()
        assert "now has sha256" in integrity.of("strokes:1")[0].message
        for child in ("digits:1", "twin:1"):
            assert [fault.message for fault in integrity.of(child)] == ["it extends 'strokes:1', which is damaged"]
        assert integrity.of("bystander:1") == integrity.of("old:1") == []


# -- the schema --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_trigger_that_is_dropped_is_named(copied):
    with Registry.open(copied) as book:
        gone = [name for table in schema.IMMUTABLE for name in statements(table, book._engine.dialect.name)]
        for number, name in enumerate(gone, 1):
            with raw(copied) as connection:
                on = f" ON {name.rpartition('_no_')[0]}" if connection.dialect.name == "postgresql" else ""
                connection.execute(text(f"DROP TRIGGER {name}{on}"))
            said = [fault.message for fault in book.check_integrity().faults if fault.subject == "schema"]
            assert said == [f"trigger: {one} is missing, changed or unexpected" for one in sorted(gone[:number])]


def test_each_index_that_is_dropped_is_named(copied):
    indexes = [str(index.name) for table in TABLES for index in table.indexes]
    assert len(indexes) > 10
    with Registry.open(copied) as book:
        for number, name in enumerate(indexes, 1):
            with raw(copied) as connection:
                connection.execute(text(f"DROP INDEX {name}"))
            said = [fault.message for fault in book.check_integrity().faults if fault.subject == "schema"]
            assert len(said) == number
            assert all(any(repr(one) in line for line in said) for one in indexes[:number])


def test_a_missing_table_is_named_and_the_other_tables_are_checked(copied):
    with raw(copied) as connection:
        connection.execute(text("DROP TABLE tag"))
    tamper(copied, "golden", "UPDATE golden SET logits = :data WHERE numerics_fingerprint = :n",
           data=b"four", n="o" * 64)  # fmt: skip
    with Registry.open(copied) as book:
        integrity = book.check_integrity()
    assert any("tag" in fault.message for fault in integrity.faults if fault.subject == "schema")
    assert any("tags could not be checked" in fault.message for fault in integrity.of("database"))
    assert "its golden probe's stored bytes have changed" in [fault.message for fault in integrity.of("strokes:1")]
    assert integrity.of("bystander:1") == []


def test_a_read_only_role_can_check_and_unreadable_tables_are_reported(on_postgres):
    copied = on_postgres.new()
    fill(copied)
    role = f"reader_{uuid4().hex}"
    url = make_url(copied).set(username=role, password="secret")
    with raw(copied) as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'"))
        connection.execute(text(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"))
    try:
        with Registry.open(url.render_as_string(hide_password=False)) as book:
            assert book.check_integrity().ok
            with raw(copied) as connection:
                connection.execute(text(f"REVOKE SELECT ON statistics FROM {role}"))
            integrity = book.check_integrity()
            assert (integrity.faults, integrity.ok, integrity.num_tasks) == ((), False, len(REFS))
            assert all("permission denied for table statistics" in message for message in integrity.unchecked)
    finally:
        with raw(copied) as connection:
            connection.execute(text(f"DROP OWNED BY {role}"))
            connection.execute(text(f"DROP ROLE {role}"))


def test_a_read_only_file_can_be_checked(tmp_path):
    fill(tmp_path / "tasks.db")
    with Registry.open(tmp_path / "tasks.db") as book:
        listen(book._engine, "connect", lambda dbapi, _: dbapi.execute("PRAGMA query_only=ON"))
        book._engine.dispose()
        assert book.check_integrity().ok
