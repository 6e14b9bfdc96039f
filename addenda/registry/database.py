"""Opening a registry's database: where it is, how its transactions run, and bringing its schema up to date."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, StatementError

from addenda.exceptions import RegistryError
from addenda.registry.artifact import canonical_json

VERSION_TABLE = "addenda_version"


def connect(location: str | Path, create: bool) -> Engine:
    """Makes an engine for a path or a sqlite:/// URL, and the schema where there is none yet.

    Raises:
        RegistryError: the location cannot be opened, is no registry, or was written by a newer version.
    """
    path = _path(location)
    if not path.exists() and not create:
        raise RegistryError(
            f"There is no registry at {str(path)!r}. `addenda learn` makes one; --registry names another."
        )
    if not path.parent.is_dir():
        raise RegistryError(f"The folder {str(path.parent)!r} of the registry does not exist.")
    engine = create_engine(URL.create("sqlite", database=str(path)), json_serializer=canonical_json)
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    with database_errors(f"Registry {str(path)!r} cannot be opened"):
        _migrate(engine)
    return engine


@contextmanager
def database_errors(context: str) -> Iterator[None]:
    """Turns the database's errors into a RegistryError that begins with what was being done."""
    try:
        yield
    except (StatementError, sqlite3.Error) as error:
        raise RegistryError(f"{context}: {getattr(error, 'orig', error)}. Nothing was changed.") from error


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One write transaction; it takes the write lock first, so that what it reads stays true until it commits."""
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One consistent view; damage that keeps it from being read is a RegistryError."""
    with database_errors("The registry cannot be read"), engine.connect() as connection:
        try:
            yield connection
        except ValueError as error:  # a JSON column that no longer parses
            raise RegistryError(f"The registry cannot be read: a record is damaged ({error}).") from error


def _path(location: str | Path) -> Path:
    text = str(location)
    if "://" not in text:
        return Path(text).expanduser().resolve()
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise RegistryError(f"{text!r} is not a database URL.") from error
    if url.get_backend_name() != "sqlite" or not url.database:
        raise RegistryError(
            f"A registry is an SQLite file: give a path or sqlite:///PATH, not {url.render_as_string()!r}."
        )
    return Path(url.database).resolve()


def _configure(dbapi: Any, record: object) -> None:
    dbapi.isolation_level = None  # pysqlite's own transactions would commit before DDL; `_begin` starts ours
    for pragma in ("busy_timeout=30000", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON"):
        dbapi.execute(f"PRAGMA {pragma}")
    deadline = time.monotonic() + 30
    while True:  # SQLite does not wait for this lock, whatever the busy_timeout
        try:
            dbapi.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    scripts = ScriptDirectory.from_config(config)

    def revision(connection: Connection) -> str | None:
        return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()

    with engine.connect() as connection:
        found = revision(connection)
        if found is None and inspect(connection).get_table_names():
            raise RegistryError(f"{engine.url.database!r} is another program's database, not a registry.")
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise RegistryError(
            f"The registry's schema is {found!r}, from a newer version of Addenda. Upgrade Addenda to open it."
        )
    if found == scripts.get_current_head():
        return
    with writing(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
