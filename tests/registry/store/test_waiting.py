"""Waiting for the next change returns at once on a change, and on timeout."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import text

from addenda.exceptions import RegistryError
from addenda.registry import Registry
from tests.support.databases import ON_POSTGRESQL, address, raw
from tests.support.moments import meanwhile
from tests.support.processes import FORKS

LONG_S = 30
WAITS = "datname = current_database() AND application_name = 'addenda' AND query LIKE 'LISTEN %'"
"""SQL condition for a waiting connection of Addenda in PostgreSQL."""

pytestmark = pytest.mark.usefixtures("another_interpreter")


def note_soon(location: str) -> None:
    with Registry.open(location) as registry:
        time.sleep(0.3)
        registry.note("digits", "from another process")


def test_a_wait_for_an_earlier_generation_returns_at_once(full_book):
    before = time.monotonic()
    assert full_book.wait(8, LONG_S) == 9
    assert full_book.wait(0, LONG_S) == 9
    assert time.monotonic() - before < LONG_S


def test_a_change_by_another_process_ends_the_wait(full_book):
    process = FORKS.Process(target=note_soon, args=(address(full_book),))
    process.start()
    before = time.monotonic()
    assert full_book.wait(9, LONG_S) == 10
    assert time.monotonic() - before < LONG_S
    process.join()
    assert process.exitcode == 0


def test_a_timeout_returns_the_unchanged_generation(full_book):
    before = time.monotonic()
    assert full_book.wait(9, 0.5) == 9
    assert 0.5 <= time.monotonic() - before < LONG_S
    assert full_book.wait(9, 0) == 9


@ON_POSTGRESQL
def test_a_lost_postgresql_connection_while_waiting_is_a_registry_error(full_book):
    def waits() -> bool:
        with raw(location) as connection:
            return connection.scalar(text(f"SELECT count(*) FROM pg_stat_activity WHERE {WAITS}")) == 1

    def hang_up() -> None:
        with raw(location) as connection:
            connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {WAITS}"))

    location = address(full_book)
    message = "Cannot wait for the registry: the connection is lost"
    with meanwhile(waits, hang_up), pytest.raises(RegistryError, match=message):
        full_book.wait(9, LONG_S)
    assert full_book.generation == 9
