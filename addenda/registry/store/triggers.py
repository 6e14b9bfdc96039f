"""Triggers by which the database itself refuses to change or drop what was registered."""

from __future__ import annotations

from sqlalchemy import Connection, Table, inspect, text

from addenda.registry.store.schema import IMMUTABLE

_REFUSE = """CREATE OR REPLACE FUNCTION addenda_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION USING MESSAGE = 'rows of ' || TG_TABLE_NAME || ' are never changed or removed'; END $$"""
_INSTALLED = {
    "sqlite": "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'",
    # Of the catalog rather than as SQL, whose form changes with the server's version: type is a set of bits.
    "postgresql": "SELECT tgname, concat_ws(' ', relname, tgtype, tgenabled, tgqual IS NULL AND tgattr = '', prosrc) "
    "FROM pg_trigger t JOIN pg_proc p ON p.oid = tgfoid JOIN pg_class c ON c.oid = tgrelid "
    "WHERE NOT tgisinternal AND relnamespace = current_schema()::regnamespace",
}
_ROW, _BEFORE, _DELETE, _UPDATE, _TRUNCATE = 1, 2, 8, 16, 32  # bits of pg_trigger.tgtype


def statements(table: Table, dialect: str) -> dict[str, str]:
    """Trigger name -> SQL.

    On SQLite, INSERT OR REPLACE deletes a row without firing its delete trigger unless the connection has
    recursive_triggers on, so an insert over an existing key is refused too. PostgreSQL has TRUNCATE instead.
    """
    name = table.name
    if dialect == "postgresql":
        call = "EXECUTE FUNCTION addenda_refuse()"
        return {
            f"{name}_no_change": f"CREATE TRIGGER {name}_no_change BEFORE UPDATE OR DELETE ON {name} "
            f"FOR EACH ROW {call}",
            f"{name}_no_truncate": f"CREATE TRIGGER {name}_no_truncate BEFORE TRUNCATE ON {name} "
            f"FOR EACH STATEMENT {call}",
        }
    refusal = f"SELECT RAISE(ABORT, 'rows of {name} are never changed or removed'); END"
    same_row = " AND ".join(f"{column.name} = NEW.{column.name}" for column in table.primary_key)
    exists = f"EXISTS (SELECT 1 FROM {name} WHERE ({same_row}) OR rowid = NEW.rowid)"
    if name == "task":
        exists += " OR EXISTS (SELECT 1 FROM task WHERE name = NEW.name AND version = NEW.version)"
    conditions = {"no_update": "UPDATE", "no_delete": "DELETE", "no_replace": "INSERT"}
    return {
        f"{name}_{what}": f"CREATE TRIGGER {name}_{what} BEFORE {verb} ON {name} "
        f"{f'WHEN {exists} ' if verb == 'INSERT' else ''}BEGIN {refusal}"
        for what, verb in conditions.items()
    }


def create_triggers(connection: Connection) -> None:
    """Creates, or creates again, the triggers of the tables there are so far; each migration ends with this.

    A batch migration drops them.
    """
    drop_triggers(connection)
    for sql in _expected(connection).values():
        connection.exec_driver_sql(sql)


def drop_triggers(connection: Connection) -> None:
    """Drops them, for a migration that fills a new column in."""
    on_table = connection.dialect.name == "postgresql"
    if on_table:
        connection.exec_driver_sql(_REFUSE)
    for name in _expected(connection):
        table = f" ON {name.rpartition('_no_')[0]}" if on_table else ""
        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name}{table}")


def wrong_triggers(connection: Connection) -> list[str]:
    """Names of triggers that are missing, switched off, or not what this version creates; it only reads."""
    found = {row[0]: row[1] for row in connection.execute(text(_INSTALLED[connection.dialect.name]))}
    expected = _expected(connection)
    if connection.dialect.name == "postgresql":
        kinds = {"change": _ROW | _BEFORE | _DELETE | _UPDATE, "truncate": _BEFORE | _TRUNCATE}
        parts = {name: name.partition("_no_") for name in expected}
        source = _REFUSE.split("$$")[1]
        expected = {name: f"{table} {kinds[what]} O t {source}" for name, (table, _, what) in parts.items()}
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))


def _expected(connection: Connection) -> dict[str, str]:
    there = inspect(connection).get_table_names()
    tables = (table for table in IMMUTABLE if table.name in there)
    return {name: sql for table in tables for name, sql in statements(table, connection.dialect.name).items()}
