"""The ledger: a hash chain of events, one for every change.

An event's digest is the sha256 of its columns, the rows that it wrote and the previous event's digest. A changed, added
or missing row breaks the chain, and the last digest covers the whole history.
"""

from __future__ import annotations

import getpass
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, LargeBinary, MetaData, Select, Table, func, insert, select, text

from addenda.registry.store import schema
from addenda.registry.store.digests import canonical_json, digest
from addenda.registry.store.records import ROWS, defaults

POLL_S = 0.2
_CHANNEL = "'addenda.' || md5(current_schema())"  # a channel's name has at most 63 bytes, as a schema's has


def notify(connection: Connection, generation: int) -> None:
    """Notifies waiting PostgreSQL sessions when the transaction commits; on SQLite they poll."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_notify({_CHANNEL}, :id)"), {"id": str(generation)})


@contextmanager
def change_waiter(engine: Engine) -> Iterator[Callable[[float], Any]]:
    """Yields a function that waits for a possible change, for at most the given number of seconds."""
    if engine.dialect.name == "sqlite":
        yield lambda timeout_s: time.sleep(min(POLL_S, timeout_s))
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        [channel] = connection.execute(text(f"SELECT quote_ident({_CHANNEL})")).one()
        connection.execute(text(f"LISTEN {channel}"))
        driver: Any = connection.connection.driver_connection
        yield lambda timeout_s: next(driver.notifies(timeout=timeout_s, stop_after=1), None)
        connection.execute(text("UNLISTEN *"))


INTERNAL = {"id", "task_id", "parent_id", "event_id"}
"""Columns that are local to a database; digests and bundles have what they refer to."""


def stamp(user: str | None = None) -> dict[str, str]:
    """Author and time for a row; the author defaults to the operating system's user."""
    if user is None:
        try:
            user = getpass.getuser()
        except (OSError, KeyError):  # a container without a user database
            user = "unknown"
    return {"created_by": user, "created_at": datetime.now(UTC).isoformat(timespec="microseconds")}


def generation(connection: Connection) -> int:
    """The id of the last event."""
    return connection.scalar(select(func.max(schema.event.c.id))) or 0


def next_id(connection: Connection, table: Table) -> int:
    """A table's next free id; requires the write lock."""
    return (connection.scalar(select(func.max(table.c.id))) or 0) + 1


@dataclass(frozen=True)
class Writer:
    """Writes to a registry within a write transaction, with an event for each change."""

    connection: Connection
    stamp: Mapping[str, str]  # author and time
    details: Mapping[str, str]  # added to every event

    def append(self, kind: str, subject: str, **details: Any) -> int:
        """Adds an event after its rows were written with the next event id; returns that id."""
        event_id = generation(self.connection) + 1
        columns = {"id": event_id, "kind": kind, "subject": subject, "details": {**details, **self.details}}
        columns |= self.stamp
        before = self.connection.scalar(select(schema.event.c.digest).where(schema.event.c.id == event_id - 1)) or ""
        event_digest = seal(before, columns, written(self.connection, event_id, event_id).get(event_id, []))
        self.connection.execute(insert(schema.event).values(**columns, digest=event_digest))
        notify(self.connection, event_id)
        return event_id

    def add(self, table: Table, row: Mapping[str, Any], kind: str, subject: str, **details: Any) -> int:
        """Inserts a row, given without event_id, and its event; returns the event's id."""
        self.connection.execute(insert(table).values(**row, event_id=generation(self.connection) + 1))
        return self.append(kind, subject, **details)


def seal(before: str, event: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """An event's digest, from the previous digest, the event's columns and the rows that it wrote."""
    columns = {key: event[key] for key in ("id", "kind", "subject", "details", "created_by", "created_at")}
    return digest(canonical_json([before, columns, rows]).encode())


def written(
    connection: Connection, first: int, last: int, tables: MetaData = schema.metadata
) -> dict[int, list[dict[str, Any]]]:
    """Event id -> the rows that the event wrote, in a form that is the same in every database."""
    written: dict[int, list[dict[str, Any]]] = defaultdict(list)
    task, task_parent = tables.tables["task"], tables.tables["task_parent"]
    parent = task.alias()

    def of_task(name: str) -> Select[Any]:
        """Rows, without binary columns, with the name and version of their task."""
        columns = [column for column in tables.tables[name].c if not isinstance(column.type, LargeBinary)]
        return select(task.c.name, task.c.version, *columns).join_from(tables.tables[name], task)

    queries = {
        "backbone": select(tables.tables["backbone"]),
        "task": select(task),
        "task_parent": select(
            task.c.event_id, task.c.name, task.c.version, task_parent.c.position, parent.c.name.label("parent"),
            parent.c.version.label("parent_version"), parent.c.artifact.label("parent_artifact"),
        )
        .join_from(task_parent, task, task_parent.c.task_id == task.c.id)
        .join(parent, task_parent.c.parent_id == parent.c.id),
        "statistics": of_task("statistics").add_columns(task.c.event_id),
        **{name: of_task(name) for name in ("golden", "evaluation", "retirement")},
    }  # fmt: skip
    for name, query in queries.items():
        event_column = tables.tables[name].c.get("event_id", task.c.event_id)
        omitted = defaults(ROWS[name]) if name in ROWS else {}
        rows = []
        for row in connection.execute(query.where(event_column.between(first, last))).mappings():
            content = {key: value for key, value in row.items() if key not in omitted or value != omitted[key]}
            portable = {key: value for key, value in content.items() if key not in INTERNAL}
            rows.append((row["event_id"], {"table": name, **portable}))
        for event_id, portable in sorted(rows, key=lambda pair: canonical_json(pair[1])):
            written[event_id].append(portable)
    return written
