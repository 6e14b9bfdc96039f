"""The ledger: an event for every change, each sealing the rows that it wrote and the event before it.

The digest of an event is the sha256 of its own columns, the rows that it wrote and the digest of the event before: a
changed, added or lost row anywhere breaks it, and the last digest stands for the whole history.
"""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, Select, Table, func, insert, select, text

from addenda.registry.store import schema
from addenda.registry.store.digests import canonical_json, digest
from addenda.registry.store.records import ROWS, defaults

POLL_S = 0.2
_CHANNEL = "'addenda.' || current_schema()"


def tell(connection: Connection, generation: int) -> None:
    """Has PostgreSQL tell all who wait, when this transaction commits; on SQLite they ask."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_notify({_CHANNEL}, :id)"), {"id": str(generation)})


def wait(engine: Engine, read: Callable[[], int], after: int, timeout_s: float) -> int:
    """The generation, which `read` gives, as soon as it is past `after`, or as it is when the time is over."""
    deadline = time.monotonic() + timeout_s
    with _pauses(engine) as pause:
        while (found := read()) <= after and (left := deadline - time.monotonic()) > 0:
            pause(left)
    return found


@contextmanager
def _pauses(engine: Engine) -> Iterator[Callable[[float], Any]]:
    """Gives a call that returns when something may have changed, or so many seconds are over."""
    if engine.dialect.name == "sqlite":
        yield lambda left: time.sleep(min(POLL_S, left))
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        [channel] = connection.execute(text(f"SELECT quote_ident({_CHANNEL})")).one()
        connection.execute(text(f"LISTEN {channel}"))
        driver: Any = connection.connection.driver_connection
        yield lambda left: next(driver.notifies(timeout=left, stop_after=1), None)
        connection.execute(text("UNLISTEN *"))


_INTERNAL = {"id", "task_id", "parent_id", "event_id"}  # numbers within one database; sealed as what they point at
_BLOBS = {"logits", "data"}  # of golden probes and statistics; each has its sha256 in its row


def stamp(user: str | None = None) -> dict[str, str]:
    """Who and when; the operating system says who, unless somebody is named."""
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
    """The first free number of a table; the write lock keeps it free."""
    return (connection.scalar(select(func.max(table.c.id))) or 0) + 1


@dataclass(frozen=True)
class Writer:
    """Writes to a registry inside a write transaction, in one name and at one time, with an event for each change."""

    connection: Connection
    who: Mapping[str, str]  # and when
    told: Mapping[str, str]  # what the details of each of its events say too

    def append(self, kind: str, subject: str, **details: Any) -> int:
        """Adds the event of a change whose rows are written, under the id that they name; returns it."""
        number = generation(self.connection) + 1
        columns = {"id": number, "kind": kind, "subject": subject, "details": details | {**self.told}, **self.who}
        before = self.connection.scalar(select(schema.event.c.digest).where(schema.event.c.id == number - 1)) or ""
        sealed = seal(before, columns, written(self.connection, number, number).get(number, []))
        self.connection.execute(insert(schema.event).values(**columns, digest=sealed))
        tell(self.connection, number)
        return number

    def add(self, table: Table, row: Mapping[str, Any], kind: str, subject: str, **details: Any) -> int:
        """Inserts a row, without its event_id, and the event that seals it; returns the event's id."""
        self.connection.execute(insert(table).values(**row, event_id=generation(self.connection) + 1))
        return self.append(kind, subject, **details)


def seal(before: str, event: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The digest of an event: over the one before, its columns, and the rows that it wrote."""
    columns = {key: event[key] for key in ("id", "kind", "subject", "details", "created_by", "created_at")}
    return digest(canonical_json([before, columns, rows]).encode())


def written(connection: Connection, first: int, last: int) -> dict[int, list[dict[str, Any]]]:
    """Event id -> the rows that it wrote, in a form that is the same in every database."""
    written: dict[int, list[dict[str, Any]]] = {}
    parent, of = schema.task.alias(), schema.task
    tables = {
        "backbone": select(schema.backbone),
        "task": select(of),
        "task_parent": select(
            of.c.event_id, of.c.name, of.c.version, schema.task_parent.c.position, parent.c.name.label("parent"),
            parent.c.version.label("parent_version"), parent.c.artifact.label("parent_artifact"),
        )
        .join_from(schema.task_parent, of, schema.task_parent.c.task_id == of.c.id)
        .join(parent, schema.task_parent.c.parent_id == parent.c.id),
        "statistics": _of_task(schema.statistics).add_columns(of.c.event_id),
        **{name: _of_task(schema.metadata.tables[name]) for name in ("golden", "evaluation", "retirement")},
    }  # fmt: skip
    for name, query in tables.items():
        number = schema.metadata.tables[name].c.get("event_id", of.c.event_id)
        before = defaults(ROWS[name]) if name in ROWS else {}
        found = []
        for row in connection.execute(query.where(number.between(first, last))).mappings():
            content = {key: value for key, value in row.items() if key not in before or value != before[key]}
            sealed = {key: value for key, value in content.items() if key not in _INTERNAL}
            found.append((row["event_id"], {"table": name, **sealed}))
        for event_id, sealed in sorted(found, key=lambda pair: canonical_json(pair[1])):
            written.setdefault(event_id, []).append(sealed)
    return written


def _of_task(table: Any) -> Select[Any]:
    """A table's rows with the name and version of the task that each is of."""
    columns = [column for column in table.c if column.name not in _BLOBS]
    return select(schema.task.c.name, schema.task.c.version, *columns).join_from(table, schema.task)
