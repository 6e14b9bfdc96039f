"""What is wrong with a registry, and reading on where some of its rows can no longer be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, Select, select
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from addenda.exceptions import IntegrityError

K, V = TypeVar("K"), TypeVar("V")

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


@contextmanager
def rows_alone(connection: Connection) -> Iterator[None]:
    """Raises IntegrityError for what rows alone can cause; that there is no such table, or no permission, as it is."""
    try:
        with connection.begin_nested():
            yield
    except UNREADABLE as error:
        if isinstance(error, ProgrammingError) or "no such" in str(error):
            raise
        raise IntegrityError(f"cannot be read ({getattr(error, 'orig', None) or error})") from error


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


def undamaged(connection: Connection, read: Callable[[Sequence[K]], Mapping[K, V]], keys: Sequence[K]) -> dict[K, V]:
    """What `read` gives of some keys, without those whose rows cannot be read."""
    try:
        with rows_alone(connection):
            return dict(read(keys))
    except IntegrityError:
        alone = [[key] for key in keys] if len(keys) > 1 else []
        return {key: value for one in alone for key, value in undamaged(connection, read, one).items()}


def readable(
    connection: Connection, query: Select[Any], key: Column[Any], keys: Sequence[Any]
) -> dict[Any, dict[str, Any]]:
    """The rows of some keys, without those that cannot be read."""

    def read(some: Sequence[Any]) -> dict[Any, dict[str, Any]]:
        rows = connection.execute(query.where(key.in_(some))).all()
        return {getattr(row, key.name): row._asdict() for row in rows}

    return undamaged(connection, read, keys)
