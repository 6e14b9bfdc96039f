"""Outages and internal faults are distinguished."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text as sql

from addenda import Registry
from addenda.exceptions import RegistryError, RegistryFaultError, RegistryUnavailableError
from addenda.registry.store.database import OUTAGES, database_errors, reading, writing
from tests.support.databases import Database, raw
from tests.support.registries import BACKBONE, a_task, keep
from tests.support.servers import AppClient


def test_an_invalid_statement_is_not_an_outage(full_book: Registry) -> None:
    with pytest.raises(RegistryError) as wrong, reading(full_book._engine) as connection:
        connection.execute(sql("SELECT nothing FROM task"))
    assert isinstance(wrong.value, RegistryFaultError)
    with pytest.raises(RegistryError) as wrong, database_errors("It"), writing(full_book._engine) as connection:
        connection.execute(sql("INSERT INTO nowhere VALUES (1)"))
    assert isinstance(wrong.value, RegistryFaultError)


def test_a_damaged_schema_is_500_and_logged(
    client: AppClient, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with raw(registry.location) as connection:
        connection.execute(sql("ALTER TABLE task RENAME COLUMN score TO points"))
    failed = client.get("/api/v1/tasks")
    assert failed.status_code == 500
    assert "no such column" in caplog.text


def test_a_read_only_database_is_an_outage(database: Database) -> None:
    with Registry.open(location := database.new()) as opened:
        opened.add_backbone(BACKBONE)
    if database.kind == "sqlite":
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY
        with pytest.raises(RegistryUnavailableError), database_errors("It"):
            raise error
        return
    standby = f"{location}{'&' if '?' in location else '?'}options=-c%20default_transaction_read_only%3Don"
    with Registry.open(standby) as opened, pytest.raises(RegistryUnavailableError, match="read-only transaction"):
        keep(opened, a_task())


def test_sqlite_outages_are_recognized_by_their_codes(registry: Registry) -> None:
    for code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        assert code in OUTAGES
        error = sqlite3.OperationalError("something")
        error.sqlite_errorcode = code | 0x100
        with pytest.raises(RegistryUnavailableError), database_errors("It"):
            raise error


@pytest.mark.parametrize("error", [TypeError("ours"), ValueError("ours"), OverflowError("ours")])
def test_internal_errors_are_not_reported_as_database_errors(full_book: Registry, error: Exception) -> None:
    with pytest.raises(type(error), match=r"^ours$"), database_errors("It"), writing(full_book._engine):
        raise error
    with pytest.raises(type(error), match=r"^ours$"), reading(full_book._engine):
        raise error


@pytest.mark.parametrize("metrics", [{"x": {1, 2}}, {"x": float("nan")}, {"x": "\ud800"}])
def test_values_that_no_database_can_store_are_rejected(full_book: Registry, metrics: dict[str, Any]) -> None:
    with pytest.raises(RegistryError, match=r"was not recorded: .* Nothing was changed"):
        full_book.add_evaluation("digits", "d", "n", metrics, "l")


@pytest.mark.parametrize(
    "location", [":memory:", "sqlite:///:memory:", "file:tasks.db?mode=memory", "sqlite:///tasks.db?mode=ro"]
)
def test_an_unsupported_location_is_rejected_and_nothing_is_created(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegistryError, match=r"cannot be a registry|An SQLite URL takes no query parameters"):
        Registry.open(location)
    assert list(tmp_path.iterdir()) == []
