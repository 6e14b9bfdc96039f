"""Backup of a registry to a file, and restore into an empty registry, row by row."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection, Engine, LargeBinary, Table, insert, select

from addenda.exceptions import IntegrityError, RegistryError
from addenda.files import Hold, discard, expanded, is_claimed, put, written
from addenda.registry.audit.integrity import Integrity, check_rows
from addenda.registry.store import schema
from addenda.registry.store.database import (
    connect,
    database_errors,
    display_location,
    file_mode,
    leave_wal,
    reading,
    writing,
)
from addenda.registry.store.digests import digest
from addenda.registry.store.ledger import notify
from addenda.registry.store.upgrade import check_readable, upgrade
from addenda.text import shown

_BATCH, _SMALL_BATCH = 500, 16
_MARKER, _COPY = "addenda-backup", "copy.db"
_FILES = rf"{re.escape(_COPY)}(-wal|-shm|-journal)?"


def backup(engine: Engine, path: str | Path) -> Integrity:
    """Backs up a registry, see `Reader.backup`; removes the folders that interrupted backups left at the target."""
    target = expanded(path).absolute()
    exists_error = RegistryError(f"The file {str(target)!r} exists; a backup does not overwrite. Choose another name.")
    if os.path.lexists(target):
        raise exists_error
    if not target.parent.is_dir():
        raise RegistryError(f"The backup's folder {str(target.parent)!r} does not exist; create it first.")
    try:
        for folder in remains(engine, target.parent):
            discard(folder, _FILES, _MARKER)
        with _staging(engine, target.parent) as staged:
            with _disposed(connect(staged, create=True)) as copy:
                integrity = _copy(engine, copy, str(target))
                leave_wal(copy, str(target))
            staged.chmod(file_mode(engine))
            put(staged, target, replace=False)
    except FileExistsError as error:
        raise exists_error from error
    except OSError as error:
        raise RegistryError(f"The backup {str(target)!r} could not be written: {error}.") from error
    return integrity


def restore(path: str | Path, location: str | Path) -> Integrity:
    """Copies a backup into an empty registry, on SQLite or PostgreSQL, in one transaction.

    Args:
        path: the backup, or any other registry in an SQLite file.
        location: the target's path or URL; created if it does not exist.

    Returns:
        The integrity check of the copy.

    Raises:
        RegistryError: there is no such backup, its schema is older than this version's, or the target is not empty.
        IntegrityError: the backup is damaged; nothing was restored.
    """
    with _disposed(connect(path, create=False, read_only=True)) as source:
        check_readable(source)
        with _disposed(connect(location, create=True)) as target:
            if target.dialect.name == "sqlite" and not os.path.lexists(display_location(target)):
                os.close(os.open(display_location(target), os.O_CREAT | os.O_EXCL | os.O_WRONLY, file_mode(source)))
            return _copy(source, target, display_location(target))


def remains(engine: Engine, folder: Path | None = None) -> list[Path]:
    """Folders that interrupted backups of a registry left in a folder, by default next to the registry's file."""
    if folder is None:
        if engine.dialect.name != "sqlite":
            return []
        folder = Path(display_location(engine)).parent
    prefix, marker_text = _folder_marks(engine)
    folders = []
    for path in folder.glob(f"{prefix}*"):
        if is_claimed(path, _MARKER, marker_text):
            with suppress(OSError):  # the backup is running, or has just finished
                Hold(path / _MARKER, shared=False).close()
                folders.append(path)
    return folders


@contextmanager
def _staging(engine: Engine, folder: Path) -> Iterator[Path]:
    """Yields the path of the unfinished copy, in a marked temporary folder."""
    prefix, marker_text = _folder_marks(engine)
    staging = folder / f"{prefix}{secrets.token_hex(4)}"
    staging.mkdir(mode=0o700)
    try:
        # Locked before it is renamed, so that `remains` never finds it free.
        with written(staging / _MARKER) as unfinished:
            unfinished.write_text(marker_text)
            hold = Hold(unfinished, shared=True)
    except BaseException:
        discard(staging, _FILES, _MARKER)
        raise
    with hold:
        try:
            yield staging / _COPY
        finally:
            discard(staging, _FILES, _MARKER)


def _folder_marks(engine: Engine) -> tuple[str, str]:
    """The name prefix of a registry's backup folders, and the text of their marker files."""
    location = display_location(engine)
    return f".backup-{digest(os.fsencode(location))[:8]}-", f"A backup of {shown(location)} that is being made.\n"


@contextmanager
def _disposed(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.dispose()


def _copy(source: Engine, target: Engine, location: str) -> Integrity:
    """Copies every row into an empty registry, in one transaction that is rolled back if the copy has faults.

    `location` names the target in errors: an unfinished backup has another path.
    """
    upgrade(target, create=True)
    with reading(source) as read, database_errors(f"{location!r} was not written"), writing(target) as write:
        for table in schema.metadata.sorted_tables:
            if write.execute(select(table).limit(1)).first() is not None:
                raise RegistryError(f"The registry {location!r} is not empty; restore into an empty one.")
        for table in schema.metadata.sorted_tables:
            _copy_table(read, write, table)
        integrity = check_rows(write)
        if not integrity.ok:
            first = integrity.faults[0]
            raise IntegrityError(
                f"{display_location(source)!r} is damaged and was not copied. Number of faults: "
                f"{len(integrity.faults)}; the first: {first.subject} {first.message}. See: addenda verify --deep"
            )
        notify(write, integrity.generation)
    return integrity


def _copy_table(read: Connection, write: Connection, table: Table) -> None:
    """Copies a table in primary-key order, in small batches if its rows are large."""
    large = any(isinstance(column.type, LargeBinary) for column in table.c)
    query = select(table).order_by(*table.primary_key)
    rows = read.execute(query.execution_options(yield_per=_SMALL_BATCH if large else _BATCH))
    for batch in rows.mappings().partitions():
        write.execute(insert(table), [dict(row) for row in batch])
