"""Waiting for the next change: PostgreSQL tells of it, SQLite is asked for its last event."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, text

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
