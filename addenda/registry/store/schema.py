"""The registry's tables with their keys, indexes and triggers; `records` defines their columns."""

from __future__ import annotations

from typing import Any, get_origin, get_type_hints

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    inspect,
    text,
)

from addenda.registry.store.digests import canonical_json
from addenda.registry.store.records import ROWS, Event, columns_of, defaults

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)


def _columns(rows: type, key: str = "", **foreign_keys: str) -> list[Column[Any]]:
    """A row's columns; `key` names a column of the primary key, `foreign_keys` the columns that others refer to."""
    hints, old_values = get_type_hints(rows), defaults(rows)
    types: dict[Any, Any] = {str: String, int: Integer, float | None: Float, tuple: JSON, dict: JSON}

    def column(name: str) -> Column[Any]:
        value, hint = old_values.get(name), get_origin(hints[name])
        return Column(
            name,
            types[hint if hint in types else hints[name]],  # a KeyError for a type that no column has yet
            *([ForeignKey(foreign_keys[name])] if name in foreign_keys else []),
            primary_key=name == key,
            nullable=hints[name] == float | None,
            server_default=value if value is None or isinstance(value, str) else canonical_json(value),
        )

    return [column(name) for name in columns_of(rows)]


def _id() -> Column[int]:
    """An id assigned by the registry under its write lock, so that ids have no gaps."""
    return Column("id", Integer, primary_key=True, autoincrement=False)


def _event_id() -> Column[int]:
    return Column("event_id", Integer, nullable=False, index=True, server_default="0")


def _task_id(primary_key: bool = False) -> Column[int]:
    return Column("task_id", ForeignKey("task.id"), nullable=False, primary_key=primary_key)


backbone = Table("backbone", metadata, *_columns(ROWS["backbone"], "fingerprint"), _event_id())

artifact = Table(
    "artifact", metadata, Column("sha256", String, primary_key=True), Column("data", LargeBinary, nullable=False)
)

task = Table(
    "task",
    metadata,
    _id(),
    *_columns(ROWS["task"], backbone="backbone.fingerprint", artifact="artifact.sha256"),
    _event_id(),
    UniqueConstraint("name", "version"),
    Index(None, "artifact"),
    # Covering indexes for filters and paging: only the page's own rows are read from the table.
    Index("ix_task_page", "id", "name", "backbone", "score", "created_at"),
    Index("ix_task_backbone_page", "backbone", "id", "name", "score", "created_at"),
)

task_parent = Table(
    "task_parent",
    metadata,
    _task_id(primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("parent_id", ForeignKey("task.id"), nullable=False),
    Index(None, "parent_id", "task_id"),
)

retirement = Table("retirement", metadata, _task_id(primary_key=True), *_columns(ROWS["retirement"]), _event_id())

alias = Table(
    "alias", metadata, Column("name", String, primary_key=True), Column("alias", String, primary_key=True), _task_id()
)

tag = Table(
    "tag", metadata, _task_id(primary_key=True), Column("tag", String, primary_key=True), Index(None, "tag", "task_id")
)

event = Table("event", metadata, *_columns(Event, "id"), Index(None, "subject"), sqlite_autoincrement=True)

evaluation = Table(
    "evaluation", metadata, _id(), _task_id(), *_columns(ROWS["evaluation"]), _event_id(), Index(None, "task_id")
)

golden = Table(
    "golden",
    metadata,
    _task_id(primary_key=True),
    *_columns(ROWS["golden"], "numerics_fingerprint"),
    Column("logits", LargeBinary, nullable=False),
    _event_id(),
)

statistics = Table(
    "statistics",
    metadata,
    _task_id(primary_key=True),
    Column("sha256", String, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

IMMUTABLE = (backbone, artifact, task, task_parent, retirement, event, evaluation, golden, statistics)
"""Append-only tables. Aliases and tags may change; the events have their history."""


_REFUSE = """CREATE OR REPLACE FUNCTION addenda_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION USING MESSAGE = 'rows of ' || TG_TABLE_NAME || ' are never changed or removed'; END $$"""
_INSTALLED = {
    "sqlite": "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'",
    # From the catalog and not as SQL, whose text depends on the server's version; tgtype is a bit set.
    "postgresql": "SELECT tgname, concat_ws(' ', relname, tgtype, tgenabled, tgqual IS NULL AND tgattr = '', prosrc) "
    "FROM pg_trigger t JOIN pg_proc p ON p.oid = tgfoid JOIN pg_class c ON c.oid = tgrelid "
    "WHERE NOT tgisinternal AND relnamespace = current_schema()::regnamespace",
}
_ROW, _BEFORE, _DELETE, _UPDATE, _TRUNCATE = 1, 2, 8, 16, 32  # bits of pg_trigger.tgtype


def statements(table: Table, dialect: str) -> dict[str, str]:
    """Trigger name -> CREATE TRIGGER statement."""
    name = table.name
    if dialect == "postgresql":
        events = {"change": ("UPDATE OR DELETE", "ROW"), "truncate": ("TRUNCATE", "STATEMENT")}
        return {
            f"{name}_no_{what}": f"CREATE TRIGGER {name}_no_{what} BEFORE {verbs} ON {name} "
            f"FOR EACH {level} EXECUTE FUNCTION addenda_refuse()"
            for what, (verbs, level) in events.items()
        }
    # INSERT OR REPLACE deletes a row without firing its delete trigger unless the connection sets recursive_triggers.
    # An insert over an existing key is therefore rejected too.
    refusal = f"SELECT RAISE(ABORT, 'rows of {name} are never changed or removed'); END"
    same_row = " AND ".join(f"{column.name} = NEW.{column.name}" for column in table.primary_key)
    exists = f"EXISTS (SELECT 1 FROM {name} WHERE ({same_row}) OR rowid = NEW.rowid)"
    if name == "task":
        exists += " OR EXISTS (SELECT 1 FROM task WHERE name = NEW.name AND version = NEW.version)"
    return {
        f"{name}_no_{what}": f"CREATE TRIGGER {name}_no_{what} BEFORE {verb} ON {name} "
        f"{f'WHEN {exists} ' if verb == 'INSERT' else ''}BEGIN {refusal}"
        for what, verb in (("update", "UPDATE"), ("delete", "DELETE"), ("replace", "INSERT"))
    }


def create_triggers(connection: Connection) -> None:
    """Creates the triggers of all existing tables, replacing old ones; every migration ends with this."""
    drop_triggers(connection)
    for sql in _expected(connection).values():
        connection.exec_driver_sql(sql)


def drop_triggers(connection: Connection) -> None:
    """Drops the triggers, for a migration that fills in a new column."""
    on_table = connection.dialect.name == "postgresql"
    if on_table:
        connection.exec_driver_sql(_REFUSE)
    for name in _expected(connection):
        table = f" ON {name.rpartition('_no_')[0]}" if on_table else ""
        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name}{table}")


def wrong_triggers(connection: Connection) -> list[str]:
    """Names of triggers that are missing, disabled, or different from those that this version creates; only reads."""
    installed = {row[0]: row[1] for row in connection.execute(text(_INSTALLED[connection.dialect.name]))}
    expected = _expected(connection)
    if connection.dialect.name == "postgresql":
        types = {"change": _ROW | _BEFORE | _DELETE | _UPDATE, "truncate": _BEFORE | _TRUNCATE}
        split_names = {name: name.partition("_no_") for name in expected}
        source = _REFUSE.split("$$")[1]
        expected = {name: f"{table} {types[what]} O t {source}" for name, (table, _, what) in split_names.items()}
    return sorted(name for name in installed | expected if installed.get(name) != expected.get(name))


def _expected(connection: Connection) -> dict[str, str]:
    existing = inspect(connection).get_table_names()
    tables = (table for table in IMMUTABLE if table.name in existing)
    return {name: sql for table in tables for name, sql in statements(table, connection.dialect.name).items()}
