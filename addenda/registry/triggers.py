"""Triggers by which the database itself refuses to change or drop what was registered."""

from __future__ import annotations

from sqlalchemy import Connection, Table, inspect

from addenda.registry.schema import IMMUTABLE


def statements(table: Table) -> dict[str, str]:
    """Trigger name -> SQL, for SQLite.

    INSERT OR REPLACE deletes a row without firing its delete trigger unless the connection has recursive_triggers
    on, so an insert over an existing key is refused too.
    """
    refusal = f"SELECT RAISE(ABORT, 'rows of {table.name} are never changed or removed'); END"
    same_row = " AND ".join(f"{column.name} = NEW.{column.name}" for column in table.primary_key)
    exists = f"EXISTS (SELECT 1 FROM {table.name} WHERE ({same_row}) OR rowid = NEW.rowid)"
    if table.name == "task":
        exists += " OR EXISTS (SELECT 1 FROM task WHERE name = NEW.name AND version = NEW.version)"
    conditions = {"no_update": "UPDATE", "no_delete": "DELETE", "no_replace": "INSERT"}
    return {
        f"{table.name}_{what}": f"CREATE TRIGGER {table.name}_{what} BEFORE {verb} ON {table.name} "
        f"{f'WHEN {exists} ' if verb == 'INSERT' else ''}BEGIN {refusal}"
        for what, verb in conditions.items()
    }


def create_triggers(connection: Connection) -> None:
    """Creates, or creates again, the triggers of the tables there are so far; each migration ends with this.

    A batch migration drops them.
    """
    there = inspect(connection).get_table_names()
    for table in (table for table in IMMUTABLE if table.name in there):
        for name, sql in statements(table).items():
            connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name}")
            connection.exec_driver_sql(sql)
