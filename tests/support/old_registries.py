"""Registries as written by earlier versions of Addenda, with a row in every table."""

from __future__ import annotations

from typing import Any

from sqlalchemy import MetaData

from addenda.registry.store import schema
from addenda.registry.store.database import connect, writing
from addenda.registry.store.upgrade import migrate
from tests.support.databases import raw

Rows = dict[str, list[dict[str, Any]]]


def make_old(location: str, revision: str, present: Rows) -> Rows:
    """Creates a registry with an old schema and fills it with rows of a current one, as far as the old schema has them.

    Returns:
        The rows of each table as the old version stored them.
    """
    engine, tables = connect(location, create=True), MetaData()
    written = {}
    with writing(engine) as connection:
        migrate(connection, revision)
        tables.reflect(connection)
        for table in tables.sorted_tables:
            if table.name in present:
                rows = [{name: row[name] for name in table.columns.keys()} for row in present[table.name]]  # noqa: SIM118
                connection.execute(table.insert(), rows)
                written[table.name] = rows
    engine.dispose()
    return written


def as_it_was_told(location: str) -> Rows:
    """The rows of a current registry without the events that came with the ledger: those of backbones and tags."""
    tables = mappings(location)
    tables["event"] = [row for row in tables["event"] if row["kind"] not in ("backbone", "tagged")]
    numbers = {row["id"]: number for number, row in enumerate(tables["event"], 1)}
    for table in tables.values():
        for row in table:
            for column in ("event_id", "generation"):
                if column in row:
                    row[column] = numbers.get(row[column])
    for row in tables["event"]:
        row["id"] = numbers[row["id"]]
    return tables


def mappings(location: str) -> Rows:
    """All rows of all tables as dictionaries."""
    with raw(location) as connection:
        return {
            table.name: [
                dict(row) for row in connection.execute(table.select().order_by(*table.primary_key)).mappings()
            ]
            for table in schema.metadata.sorted_tables
        }
