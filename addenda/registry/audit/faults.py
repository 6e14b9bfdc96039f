"""Integrity faults, and reading a table although some of its rows are unreadable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, Select, select
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from addenda.exceptions import IntegrityError

K, V = TypeVar("K"), TypeVar("V")

VALUE_ERRORS = (ValueError, TypeError)
"""Errors that a damaged value raises: JSON that does not parse, bytes instead of text."""
READ_ERRORS = (SQLAlchemyError, *VALUE_ERRORS)
"""Errors that reading damaged rows raises."""
PAGE_SIZE = 500
"""Rows read at a time."""


@dataclass(frozen=True)
class Fault:
    """One integrity fault.

    Attributes:
        subject: the damaged object: a task `name:version`, an alias `name@alias`, `event 12`, a backbone's
            fingerprint, `artifact SHA256`, a row `table (key)`, `schema`, `history` or `database`.
        message: what is wrong, as a predicate of the subject ("is missing").
    """

    subject: str
    message: str


def pages(connection: Connection, key: Column[int]) -> Iterator[Sequence[int]]:
    """A table's ids in ascending order, PAGE_SIZE at a time."""
    query = select(key).order_by(key).limit(PAGE_SIZE)
    ids = connection.scalars(query).all()
    while ids:
        yield ids
        ids = connection.scalars(query.where(key > ids[-1])).all()


@contextmanager
def row_errors(connection: Connection) -> Iterator[None]:
    """Raises IntegrityError for errors caused by a row's content; a missing table or permission raises unchanged."""
    try:
        with connection.begin_nested():
            yield
    except READ_ERRORS as error:
        if isinstance(error, ProgrammingError) or "no such" in str(error):
            raise
        raise IntegrityError(f"cannot be read ({getattr(error, 'orig', None) or error})") from error


@contextmanager
def lenient_text(connection: Connection) -> Iterator[None]:
    """Makes SQLite escape invalid UTF-8 instead of raising; PostgreSQL never stores invalid UTF-8."""
    if connection.dialect.name != "sqlite":
        yield
        return
    driver: Any = connection.connection.driver_connection
    driver.text_factory = lambda data: data.decode(errors="backslashreplace")
    try:
        yield
    finally:
        driver.text_factory = str


def read_undamaged(
    connection: Connection, read: Callable[[Sequence[K]], Mapping[K, V]], keys: Sequence[K]
) -> dict[K, V]:
    """Calls `read` on the keys, and on each key alone if that fails; omits keys whose rows are unreadable."""
    try:
        with row_errors(connection):
            return dict(read(keys))
    except IntegrityError:
        batches = [[key] for key in keys] if len(keys) > 1 else []
        return {key: value for batch in batches for key, value in read_undamaged(connection, read, batch).items()}


def readable_rows(
    connection: Connection, query: Select[Any], key: Column[Any], keys: Sequence[Any]
) -> dict[Any, dict[str, Any]]:
    """Rows by key, without those that are unreadable."""

    def read(batch: Sequence[Any]) -> dict[Any, dict[str, Any]]:
        rows = connection.execute(query.where(key.in_(batch))).all()
        return {getattr(row, key.name): row._asdict() for row in rows}

    return read_undamaged(connection, read, keys)
