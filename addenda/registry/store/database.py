"""Connections and transactions on SQLite and PostgreSQL."""

from __future__ import annotations

import os
import re
import sqlite3
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from addenda.exceptions import RegistryError, RegistryFaultError, RegistryUnavailableError
from addenda.files import expanded, permissions
from addenda.registry.store.digests import canonical_json

OUTAGES = frozenset({
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_READONLY,
})  # fmt: skip
OUTAGE_CLASSES = frozenset({"08", "25", "40", "53", "55", "57", "58"})
"""Classes of PostgreSQL error codes: connection, read-only standby, deadlock, resources, lock, operator, system."""
WAIT_S = 30
"""Lock timeout of writers in seconds."""
READ_WAIT_S = 10
"""Lock timeout of readers in seconds: other programs, such as VACUUM FULL, may lock whole tables."""
_PRAGMAS = (
    "synchronous=FULL",
    "foreign_keys=ON",
    "recursive_triggers=ON",
    "trusted_schema=OFF",  # code that another program put into the schema may not call our functions
    "page_size=16384",  # of a new file; with 4 kB pages an artifact takes four times as many calls
)


def connect(location: str | Path, create: bool, read_only: bool = False) -> Engine:
    """Creates an engine for a location, see `Registry.open`; with `read_only` the database rejects every change."""
    url = _url(location)
    if url.get_backend_name() == "postgresql":
        return _postgresql(url, read_only)
    path = Path(url.database or "").resolve()
    if not path.exists() and not create:
        raise RegistryError(
            f"There is no registry at {str(path)!r}; check the path. `addenda learn` creates one at --registry."
        )
    if path.is_dir():
        raise RegistryError(f"{str(path)!r} is a folder; give a file, such as {str(path / 'addenda.db')!r}.")
    if not path.parent.is_dir():
        raise RegistryError(f"The registry's folder {str(path.parent)!r} does not exist; create it first.")
    options: dict[str, Any] = {"creator": lambda: _open_sqlite_read_only(path)} if read_only else {}
    engine = create_engine(URL.create("sqlite", database=str(path)), json_serializer=canonical_json, **options)

    @event.listens_for(engine, "connect")
    def configure(dbapi: Any, record: Any) -> None:
        dbapi.isolation_level = None  # pysqlite would commit before DDL; `_begin_sqlite` starts transactions
        for pragma in (f"busy_timeout={1000 * WAIT_S}", *_PRAGMAS, f"query_only={read_only:d}"):
            dbapi.execute(f"PRAGMA {pragma}")
        record.info["file"] = _identity(path)

    event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def database_errors(context: str, conclusion: str = " Nothing was changed.") -> Iterator[None]:
    """Turns errors of the database, and of values that it cannot store, into RegistryErrors with a context."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        if not isinstance(error, (SQLAlchemyError, sqlite3.Error)) and not _is_value_error(error):
            raise
        message = " ".join(str(getattr(error, "orig", None) or error).split()).rstrip(".")
        if "unable to open database file" in message or "readonly database" in message:
            message += " (SQLite needs write permission for the file and its folder, and free disk space)"
        rejected = isinstance(error, (ProgrammingError, OperationalError, sqlite3.OperationalError))
        permanent = RegistryFaultError if rejected else RegistryError
        error_class = RegistryUnavailableError if _is_outage(error) else permanent
        raise error_class(f"{context}: {message}.{conclusion}") from error


def _is_value_error(error: BaseException) -> bool:
    """Whether an error was raised while values were read or written, and not by our own code."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return str(last.f_globals.get("__name__")).partition(".")[0] in ("json", "psycopg", "sqlalchemy", "sqlite3")


def _is_outage(error: BaseException) -> bool:
    """Whether a retry may succeed, by the database's error code."""
    if isinstance(error, PoolTimeoutError):
        return True
    driver_error = getattr(error, "orig", None) or error
    if isinstance(driver_error, sqlite3.Error):
        return getattr(driver_error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in OUTAGES
    state = getattr(driver_error, "sqlstate", None)
    if state is not None:
        return state[:2] in OUTAGE_CLASSES
    return isinstance(error, (OperationalError, InterfaceError))


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A write transaction. It takes the write lock first, so that what it reads does not change before it commits."""
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A consistent read transaction, which never waits for writers; raises RegistryError if rows are unreadable."""
    with database_errors("The registry cannot be read", conclusion=""), engine.connect() as connection:
        try:
            yield connection
        except (ValueError, RecursionError) as error:  # a JSON column that no longer parses
            if not _is_value_error(error):
                raise
            raise RegistryError(
                f"The registry cannot be read: a record is damaged ({error}). See: addenda verify --deep"
            ) from error


def display_location(engine: Engine) -> str:
    """The registry's location for display: a path, or a URL without its password."""
    if engine.dialect.name == "sqlite":
        return str(engine.url.database)
    return _without_password(engine.url.set(drivername="postgresql"))


def file_mode(engine: Engine) -> int:
    """Permissions for copies of a registry: those of its SQLite file, writable; for PostgreSQL, the user's alone."""
    return 0o200 | permissions(Path(display_location(engine))) if engine.dialect.name == "sqlite" else 0o600


def _without_password(url: URL) -> str:
    """A URL without its password, which may also be in the query."""
    return url.difference_update_query([key for key in url.query if "password" in key]).render_as_string()


def _url(location: str | Path) -> URL:
    text = str(location)
    if ":memory:" in text or text.startswith("file:"):
        raise RegistryError(
            f"{text!r} cannot be a registry, which must outlive its process. Give a path; for a temporary registry, "
            "one in a temporary folder."
        )
    if "://" not in text:
        return URL.create("sqlite", database=str(expanded(text)))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        redacted = re.sub("//.*@", "//***@", text, flags=re.DOTALL)
        raise RegistryError(
            f"{redacted!r} is not a database URL; give a path, or postgresql://USER@HOST/DATABASE."
        ) from error
    if url.get_backend_name() not in ("sqlite", "postgresql") or not url.database:
        raise RegistryError(
            f"A registry is an SQLite file or a PostgreSQL database: give a path, sqlite:///PATH or "
            f"postgresql://USER@HOST/DATABASE, not {_without_password(url)!r}."
        )
    if url.get_backend_name() == "sqlite" and url.query:
        raise RegistryError(f"An SQLite URL takes no query parameters; remove them from {_without_password(url)!r}.")
    return url


def use_wal(engine: Engine) -> None:
    """Switches an SQLite registry to a write-ahead log, so that readers do not wait for a writer.

    The setting is stored in the file, so the file must be a registry.
    """
    deadline = time.monotonic() + WAIT_S
    with closing(engine.raw_connection()) as raw:
        while True:  # busy_timeout does not apply to this lock
            try:
                raw.cursor().execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def leave_wal(engine: Engine, location: str) -> None:
    """Moves a write-ahead log into its SQLite file; raises RegistryError if that fails, as on a full disk.

    Closing the file would try the same, but ignore an error.
    """
    with database_errors(f"{location!r} was not written"), closing(engine.raw_connection()) as raw:
        raw.cursor().execute("PRAGMA journal_mode=DELETE")


def _open_sqlite_read_only(path: Path) -> sqlite3.Connection:
    """Opens a file that may have concurrent writers; on a read-only medium, opens it as immutable."""
    uri = f"file:{quote(os.fsencode(path))}"
    # SQLite's read-only mode would leave new files of the write-ahead log behind.
    connection = sqlite3.connect(f"{uri}?mode=rw", uri=True, check_same_thread=False)
    try:
        connection.execute("SELECT name FROM sqlite_schema LIMIT 1")
    except sqlite3.OperationalError as error:
        connection.close()
        if "unable to open" not in str(error) and "readonly" not in str(error):
            raise
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:  # which an immutable file does not have
            raise RegistryError(
                f"{str(path)!r} cannot be read where it is: {log.name} holds a part of it, which SQLite reads only in "
                "a writable folder. Copy both files to one."
            ) from error
        connection = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    return connection


def _identity(path: Path) -> tuple[int, int] | None:
    """The device and inode of a file; None if it does not exist."""
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    if writes:
        path = Path(str(connection.engine.url.database))
        if _identity(path) != connection.connection.info["file"]:  # SQLite would write to the deleted file
            raise RegistryError(
                f"The registry's file {str(path)!r} was removed or replaced after it was opened. Nothing was changed; "
                "open it again."
            )
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgresql(url: URL, read_only: bool) -> Engine:
    try:
        engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            json_serializer=canonical_json,
            pool_pre_ping=True,  # the server may have restarted since the last transaction
            connect_args={"connect_timeout": 10, "tcp_user_timeout": 1000 * WAIT_S, "application_name": "addenda"},
        )
    except ImportError as error:
        raise RegistryError("A PostgreSQL registry requires psycopg: pip install 'addenda[postgres]'.") from error

    @event.listens_for(engine, "connect")
    def configure(dbapi: Any, record: Any) -> None:
        dbapi.execute(f"SET lock_timeout = '{READ_WAIT_S}s'")
        if read_only:  # not as an option of the connection, which would replace those of the URL
            dbapi.execute("SET default_transaction_read_only = on")
        dbapi.commit()

    event.listen(engine, "begin", _begin_postgresql)
    return engine


def _begin_postgresql(connection: Connection) -> None:
    """Starts a transaction; writers hold the registry's lock until they commit, so event ids appear in order."""
    if connection.get_execution_options().get("writes", False):
        # Not the server's default: a snapshot taken before the lock would miss the previous writers' changes.
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{WAIT_S}s'")
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('addenda.' || current_schema()))")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
