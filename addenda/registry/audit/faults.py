"""What is wrong with a registry, and reading on where some of its rows can no longer be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, Select, select
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

NO_VALUES = (ValueError, TypeError)
"""What a damaged value raises: JSON that does not parse, bytes where text was."""

UNREADABLE = (SQLAlchemyError, *NO_VALUES)
"""And all that a database raises."""

PAGE = 500
"""Rows that are looked at together."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        subject: with what: a task `name:version`, an alias `name@alias`, `event 12`, a backbone's fingerprint,
            `artifact SHA256`, a row `table (key)`, `schema`, `history` or `database`.
        said: what, as a sentence about it.
    """

    subject: str
    said: str


def pages(connection: Connection, key: Column[int]) -> Iterator[Sequence[int]]:
    """A table's numbers in order, some hundred at a time."""
    query = select(key).order_by(key).limit(PAGE)
    found = connection.scalars(query).all()
    while found:
        yield found
        found = connection.scalars(query.where(key > found[-1])).all()


class DamagedError(Exception):
    """Some of the rows that were asked for cannot be read."""


@contextmanager
def rows_alone(connection: Connection) -> Iterator[None]:
    """Raises DamagedError for what rows alone can cause; that there is no such table, or no permission, as it is."""
    try:
        with connection.begin_nested():
            yield
    except UNREADABLE as error:
        if isinstance(error, ProgrammingError) or "no such" in str(error):
            raise
        raise DamagedError(f"cannot be read ({getattr(error, 'orig', None) or error})") from error


@contextmanager
def any_text(connection: Connection) -> Iterator[None]:
    """Has SQLite give text that is no UTF-8 as other text, rather than refuse it; PostgreSQL holds none."""
    if connection.dialect.name != "sqlite":
        yield
        return
    driver: Any = connection.connection.driver_connection
    driver.text_factory = lambda data: data.decode(errors="backslashreplace")
    try:
        yield
    finally:
        driver.text_factory = str


def readable(
    connection: Connection, query: Select[Any], key: Column[Any], keys: Sequence[Any]
) -> dict[Any, dict[str, Any]]:
    """The rows of some keys, without those that cannot be read."""
    try:
        with rows_alone(connection):
            rows = connection.execute(query.where(key.in_(keys))).all()
    except DamagedError:
        if len(keys) < 2:
            return {}
        return {k: row for one in keys for k, row in readable(connection, query, key, [one]).items()}
    return {getattr(row, key.name): row._asdict() for row in rows}
