"""Triggers of the database itself reject changes of registered rows."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from addenda.registry import Registry
from addenda.registry.store import schema
from addenda.registry.store.upgrade import schema_faults
from tests.support.databases import ON_POSTGRESQL, ON_SQLITE, everything, raw, rows
from tests.support.registries import a_task, keep


def refused(registry: Registry, sql: str, pragma: str = "") -> None:
    """Runs a statement on another connection and expects the database to reject it."""
    with raw(registry) as connection:
        if pragma:
            connection.execute(text(pragma))
        with pytest.raises(DBAPIError, match="are never changed or removed"):
            connection.execute(text(sql))
        connection.rollback()


def changes(registry: Registry) -> list[str]:
    """Statements that would change each column of each table, delete its rows, or overwrite them."""
    assert len(schema.IMMUTABLE) == 9
    statements = []
    for table in schema.IMMUTABLE:
        statements += [f"UPDATE {table.name} SET {column.name} = {column.name}" for column in table.columns]
        statements.append(f"DELETE FROM {table.name}")
        keys = [column.name for column in table.primary_key]
        statements.append(
            f"INSERT INTO {table.name} SELECT * FROM {table.name} WHERE true "
            f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {keys[0]} = {table.name}.{keys[0]}"
        )
    assert len(statements) > 80
    return statements


def test_the_database_refuses_to_change_any_row(full_book):
    before = rows(full_book)
    for sql in changes(full_book):
        refused(full_book, sql)
    assert rows(full_book) == before


@ON_SQLITE
@pytest.mark.parametrize("pragma", ["", "PRAGMA recursive_triggers=ON"], ids=["plain", "recursive triggers"])
def test_sqlite_refuses_to_replace_any_row(full_book, pragma):
    before = rows(full_book)
    for table in schema.IMMUTABLE:
        name, key = table.name, next(iter(table.primary_key)).name
        refused(full_book, f"UPDATE OR REPLACE {name} SET {key} = {key}", pragma)
        for verb in ("REPLACE", "INSERT", "INSERT OR REPLACE", "INSERT OR IGNORE"):
            refused(full_book, f"{verb} INTO {name} SELECT * FROM {name} LIMIT 1", pragma)
    assert rows(full_book) == before


@ON_SQLITE
def test_sqlite_refuses_to_replace_a_task_of_the_same_name_and_version(full_book):
    before = rows(full_book)
    columns = ", ".join(column.name for column in schema.task.columns if column.name != "id")
    for new_id in ("99", "NULL"):
        refused(full_book, f"INSERT OR REPLACE INTO task (id, {columns}) SELECT {new_id}, {columns} FROM task LIMIT 1")
    assert rows(full_book) == before


@ON_SQLITE
def test_sqlite_refuses_a_replacement_by_rowid(full_book):
    changed = {
        "backbone": {"fingerprint": "'evil'"},
        "artifact": {"sha256": "'evil'"},
        "golden": {"numerics_fingerprint": "'evil'"},
        "task_parent": {"position": "99"},
    }
    before = rows(full_book)
    for name, change in changed.items():
        columns = [column.name for column in schema.metadata.tables[name].columns]
        select = ", ".join(change.get(column, column) for column in columns)
        refused(
            full_book,
            f"INSERT OR REPLACE INTO {name} (rowid, {', '.join(columns)}) SELECT rowid, {select} FROM {name} LIMIT 1",
        )
    assert rows(full_book) == before


@ON_POSTGRESQL
def test_postgresql_refuses_to_truncate_any_table(full_book):
    before = rows(full_book)
    for table in schema.IMMUTABLE:
        refused(full_book, f"TRUNCATE {table.name} CASCADE")
    refused(full_book, f"TRUNCATE {', '.join(table.name for table in schema.metadata.sorted_tables)}")
    assert rows(full_book) == before


def test_rows_can_still_be_added_and_aliases_still_move(full_book):
    keep(full_book, a_task("birds", 8))
    full_book.set_alias("birds", "production", 1)
    full_book.set_alias("digits", "production", 1)
    full_book.untag("digits", "shop")
    assert full_book.get("birds").version == 1


def test_every_table_but_aliases_and_tags_has_triggers(full_book, database):
    assert {t.name for t in schema.metadata.sorted_tables} - {t.name for t in schema.IMMUTABLE} == {"alias", "tag"}
    names = [name for name, _ in everything(full_book)["triggers"]]
    kinds = {"sqlite": ("delete", "replace", "update"), "postgresql": ("change", "truncate")}[database.kind]
    assert names == sorted(f"{table.name}_no_{kind}" for table in schema.IMMUTABLE for kind in kinds)
    assert schema_faults(full_book._engine) == []


ADDED = {
    "sqlite": "CREATE TRIGGER other AFTER INSERT ON event BEGIN DELETE FROM alias; END",
    "postgresql": "CREATE TRIGGER other AFTER INSERT ON event EXECUTE FUNCTION addenda_refuse()",
}
CHANGED = "CREATE TRIGGER task_no_update BEFORE UPDATE ON task WHEN NEW.id > 9 BEGIN SELECT RAISE(ABORT, 'no'); END"
WEAKER = (
    "CREATE OR REPLACE TRIGGER task_no_change {} OR DELETE ON task FOR EACH ROW {} EXECUTE FUNCTION addenda_refuse()"
)
REPLACED = "CREATE OR REPLACE FUNCTION addenda_refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
EVERY = sorted(f"{table.name}_no_{kind}" for table in schema.IMMUTABLE for kind in ("change", "truncate"))


@pytest.mark.parametrize(
    ("database", "statements", "names"),
    [
        ("sqlite", ["DROP TRIGGER task_no_update"], ["task_no_update"]),
        ("sqlite", [ADDED["sqlite"]], ["other"]),
        ("sqlite", ["DROP TRIGGER task_no_update", CHANGED], ["task_no_update"]),
        ("postgresql", ["DROP TRIGGER task_no_change ON task"], ["task_no_change"]),
        ("postgresql", [ADDED["postgresql"]], ["other"]),
        ("postgresql", [WEAKER.format("BEFORE UPDATE", "WHEN (OLD.id < 0)")], ["task_no_change"]),
        ("postgresql", [WEAKER.format("BEFORE UPDATE OF name", "")], ["task_no_change"]),
        ("postgresql", [WEAKER.format("AFTER UPDATE", "")], ["task_no_change"]),
        (
            "postgresql",
            ["CREATE TRIGGER swallows BEFORE INSERT ON tag FOR EACH ROW EXECUTE FUNCTION addenda_refuse()"],
            ["swallows"],
        ),
        ("postgresql", ["ALTER TABLE event DISABLE TRIGGER event_no_change"], ["event_no_change"]),
        ("postgresql", ["ALTER TABLE event ENABLE REPLICA TRIGGER event_no_truncate"], ["event_no_truncate"]),
        ("postgresql", ["ALTER TABLE golden DISABLE TRIGGER USER"], ["golden_no_change", "golden_no_truncate"]),
        ("postgresql", [REPLACED], EVERY),
    ],
    indirect=["database"],
)
def test_a_trigger_that_was_dropped_added_changed_or_switched_off_is_named(full_book, statements, names):
    with raw(full_book) as connection:
        for sql in statements:
            connection.execute(text(sql))
    before = everything(full_book)
    assert schema_faults(full_book._engine) == [f"trigger: {name} is missing, changed or unexpected" for name in names]
    assert everything(full_book) == before, "the check changed something"
