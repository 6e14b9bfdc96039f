"""Registries as earlier versions of Addenda left them, with a row in every table that they had."""

from __future__ import annotations

from typing import Any

from alembic import command
from sqlalchemy import MetaData

from addenda.registry.store import schema
from addenda.registry.store.database import connect, writing
from addenda.registry.store.upgrade import _config
from tests.support.databases import raw

Rows = dict[str, list[dict[str, Any]]]


def make_old(location: str, revision: str, present: Rows) -> Rows:
    """Makes a registry of an old schema and fills it with what it knew of the rows of a present one.

    Returns:
        The rows of each table, as the old version wrote them.
    """
    engine, config, tables = connect(location, create=True), _config(), MetaData()
    written = {}
    with writing(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        tables.reflect(connection)
        for table in tables.sorted_tables:
            if table.name in present:
                kept = [{name: row[name] for name in table.columns.keys()} for row in present[table.name]]  # noqa: SIM118
                connection.execute(table.insert(), kept)
                written[table.name] = kept
    engine.dispose()
    return written


def as_it_was_told(location: str) -> Rows:
    """The rows of a present registry without what only the ledger knows: events of backbones and of tags."""
    found = mappings(location)
    found["event"] = [row for row in found["event"] if row["kind"] not in ("backbone", "tagged")]
    numbers = {row["id"]: number for number, row in enumerate(found["event"], 1)}
    for table in found.values():
        for row in table:
            for column in ("event_id", "generation"):
                if column in row:
                    row[column] = numbers.get(row[column])
    for row in found["event"]:
        row["id"] = numbers[row["id"]]
    return found


def mappings(location: str) -> Rows:
    """Every row of every table as a dictionary."""
    with raw(location) as connection:
        return {
            table.name: [
                dict(row) for row in connection.execute(table.select().order_by(*table.primary_key)).mappings()
            ]
            for table in schema.metadata.sorted_tables
        }
