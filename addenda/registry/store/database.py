"""Where a registry's database is, and how its transactions run; SQLite and PostgreSQL alike."""

from __future__ import annotations

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
from addenda.files import permissions
from addenda.registry.store.digests import canonical_json

OUTAGES = frozenset({
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_READONLY,
})  # fmt: skip
OUTAGE_CLASSES = frozenset({"08", "25", "40", "53", "55", "57", "58"})
"""Of PostgreSQL's codes: connections, a standby that only reads, deadlocks, resources, locks, operators, the system."""
WAIT_S = 30
"""How long a transaction waits for another's lock."""
_PRAGMAS = (
    "synchronous=FULL",
    "foreign_keys=ON",
    "recursive_triggers=ON",
    "trusted_schema=OFF",  # what another program wrote into the schema calls no function of ours
    "page_size=16384",  # of a new file; an artifact in 4 kB pages costs four times the calls
)


def connect(location: str | Path, create: bool, read_only: bool = False) -> Engine:
    """Makes an engine for a location as `Registry.open` takes it; what is only read refuses every change by itself."""
    url = _url(location)
    if url.get_backend_name() == "postgresql":
        return _postgresql(url, read_only)
    path = Path(url.database or "").resolve()
    if not path.exists() and not create:
        raise RegistryError(
            f"There is no registry at {str(path)!r}: check the path. `addenda learn` makes one where --registry says."
        )
    if path.is_dir():
        raise RegistryError(f"{str(path)!r} is a folder, and a registry is a file: {str(path / 'addenda.db')!r}, say.")
    if not path.parent.is_dir():
        raise RegistryError(f"The folder {str(path.parent)!r} of the registry does not exist.")
    options: dict[str, Any] = {"creator": lambda: _open_sqlite_read_only(path)} if read_only else {}
    engine = create_engine(URL.create("sqlite", database=str(path)), json_serializer=canonical_json, **options)

    @event.listens_for(engine, "connect")
    def configure(dbapi: Any, record: Any) -> None:
        dbapi.isolation_level = None  # pysqlite's own would commit before DDL; `_begin_sqlite` starts transactions
        for pragma in (f"busy_timeout={1000 * WAIT_S}", *_PRAGMAS, f"query_only={read_only:d}"):
            dbapi.execute(f"PRAGMA {pragma}")
        record.info["file"] = _identity(path)

    event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def database_errors(context: str) -> Iterator[None]:
    """Has errors of the database, and of values that it cannot hold, say what was being done, as RegistryErrors."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        if not isinstance(error, (SQLAlchemyError, sqlite3.Error)) and not _is_of_a_value(error):
            raise
        said = " ".join(str(getattr(error, "orig", None) or error).split()).rstrip(".")
        if "unable to open database file" in said or "readonly database" in said:
            said += " (SQLite writes beside it: may this user write to it and to its folder, and is its disk not full?)"
        refused = isinstance(error, (ProgrammingError, OperationalError, sqlite3.OperationalError))
        other = RegistryFaultError if refused else RegistryError
        kind = RegistryUnavailableError if _is_outage(error) else other
        raise kind(f"{context}: {said}. Nothing was changed.") from error


def _is_of_a_value(error: BaseException) -> bool:
    """Whether an error came up where values are written or read, rather than in our own code."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return str(last.f_globals.get("__name__")).partition(".")[0] in ("json", "psycopg", "sqlalchemy", "sqlite3")


def _is_outage(error: BaseException) -> bool:
    """Whether what failed may work later, by the database's own code: a wrong statement will not."""
    if isinstance(error, PoolTimeoutError):
        return True
    raised = getattr(error, "orig", None) or error
    if isinstance(raised, sqlite3.Error):
        return getattr(raised, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in OUTAGES
    state = getattr(raised, "sqlstate", None)
    if state is not None:
        return state[:2] in OUTAGE_CLASSES
    return isinstance(error, (OperationalError, InterfaceError))


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One write transaction; it takes the write lock first, so that what it reads stays true until it commits."""
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One consistent view, which waits for no writer; damage that keeps it from being read is a RegistryError."""
    with database_errors("The registry cannot be read"), engine.connect() as connection:
        try:
            yield connection
        except (ValueError, RecursionError) as error:  # a JSON column that no longer parses
            if not _is_of_a_value(error):
                raise
            raise RegistryError(f"The registry cannot be read: a record is damaged ({error}).") from error


def described(engine: Engine) -> str:
    """Where the registry is, for people: a path, or a URL without its password."""
    if engine.dialect.name == "sqlite":
        return str(engine.url.database)
    return _shown(engine.url.set(drivername="postgresql"))


def mode(engine: Engine) -> int:
    """Permissions of files that hold what a registry holds: those of its own; of a server's, the user's alone."""
    return permissions(Path(described(engine))) if engine.dialect.name == "sqlite" else 0o600


def _shown(url: URL) -> str:
    """A URL without its password, which may stand in its query too."""
    return url.difference_update_query([key for key in url.query if "password" in key]).render_as_string()


def _url(location: str | Path) -> URL:
    text = str(location)
    if ":memory:" in text or text.startswith("file:"):
        raise RegistryError(
            f"{text!r} is no place for a registry, which must outlive its process and be opened by others: give a "
            "path. One that nobody needs later can lie in a temporary folder."
        )
    if "://" not in text:
        return URL.create("sqlite", database=str(Path(text).expanduser()))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        shown = re.sub("//.*@", "//***@", text, flags=re.DOTALL)
        raise RegistryError(f"{shown!r} is not a database URL.") from error
    if url.get_backend_name() not in ("sqlite", "postgresql") or not url.database:
        raise RegistryError(
            f"A registry is an SQLite file or a PostgreSQL database: give a path, sqlite:///PATH or "
            f"postgresql://USER@HOST/DATABASE, not {_shown(url)!r}."
        )
    if url.get_backend_name() == "sqlite" and url.query:
        raise RegistryError(f"{_shown(url)!r} has settings behind its path, and none is taken: give the path alone.")
    return url


def use_wal(engine: Engine) -> None:
    """Lets readers of an SQLite file go on beside a writer; the file remembers it, so it must be a registry."""
    deadline = time.monotonic() + WAIT_S
    with closing(engine.raw_connection()) as raw:
        while True:  # SQLite does not wait for this lock, whatever the busy_timeout
            try:
                raw.cursor().execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _open_sqlite_read_only(path: Path) -> sqlite3.Connection:
    """Opens a file of somebody else's, beside its writers; on a read-only medium, which has none, as it is."""
    where = f"file:{quote(str(path))}"
    # SQLite's own read-only mode would leave files of its log behind where there were none.
    opened = sqlite3.connect(f"{where}?mode=rw", uri=True, check_same_thread=False)
    try:
        opened.execute("SELECT name FROM sqlite_schema LIMIT 1")
    except sqlite3.OperationalError as error:
        opened.close()
        if "unable to open" not in str(error) and "readonly" not in str(error):
            raise
        opened = sqlite3.connect(f"{where}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    return opened


def _writes(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("writes", False))


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path leads to; None where there is none."""
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def _begin_sqlite(connection: Connection) -> None:
    if _writes(connection):
        path = Path(str(connection.engine.url.database))
        if _identity(path) != connection.connection.info["file"]:  # SQLite would write to what has no name any more
            raise RegistryError(
                f"The registry's file {str(path)!r} was removed or replaced since it was opened: nothing was changed. "
                "Open it again."
            )
    connection.exec_driver_sql("BEGIN IMMEDIATE" if _writes(connection) else "BEGIN")


def _postgresql(url: URL, read_only: bool) -> Engine:
    options = {"options": "-c default_transaction_read_only=on"} if read_only else {}
    try:
        engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            json_serializer=canonical_json,
            pool_pre_ping=True,  # a server may have been restarted since the last transaction
            connect_args={"connect_timeout": 10, "application_name": "addenda"} | options,
        )
    except ImportError as error:
        raise RegistryError("A registry on PostgreSQL needs psycopg: pip install 'addenda[postgres]'.") from error
    event.listen(engine, "begin", _begin_postgresql)
    return engine


def _begin_postgresql(connection: Connection) -> None:
    """Writers wait for one lock of the registry, held until they commit: so event ids become visible in order."""
    if _writes(connection):
        # Whatever the server's default is: a snapshot from before the lock would not show what the others wrote.
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{WAIT_S}s'")
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('addenda.' || current_schema()))")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
