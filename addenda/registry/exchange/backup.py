"""Copies of a whole registry, row for row: to a file for safekeeping, and from one into an empty registry."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, LargeBinary, Table, insert, select

from addenda.exceptions import IntegrityError, RegistryError
from addenda.files import Hold, discard, is_claimed, put, written
from addenda.registry.audit.integrity import Integrity, check_rows
from addenda.registry.store import schema
from addenda.registry.store.database import connect, database_errors, described, mode, reading, writing
from addenda.registry.store.ledger import tell
from addenda.registry.store.upgrade import check_readable, upgrade

_BATCH, _FEW = 500, 16
_MARKER, _COPY = "addenda-backup", "copy.db"
_FILES = rf"{re.escape(_COPY)}(-wal|-shm|-journal)?"


def backup(engine: Engine, path: str | Path) -> Integrity:
    """Copies a registry, as it is at one moment, into a new SQLite file; who writes meanwhile does not wait.

    The file appears under its name when it is whole and its history was checked, and is no more open to others than the
    registry. A process that is killed leaves a folder `.backup-…`, which the next backup of this registry into the same
    folder removes.
    """
    target = Path(path).expanduser().absolute()
    _refuse_to_overwrite(target)
    if not target.parent.is_dir():
        raise RegistryError(f"The folder {str(target.parent)!r} of the backup does not exist.")
    try:
        for folder in remains(engine, target.parent):
            discard(folder, _FILES, _MARKER)
        with _staging(engine, target.parent) as part:
            copy = connect(part, create=True)
            try:
                upgrade(copy, create=True)
                found = _copy(engine, copy)
            finally:
                copy.dispose()
            part.chmod(mode(engine))
            put(part, target, replace=False)
    except FileExistsError:
        _refuse_to_overwrite(target)
        raise
    except OSError as error:
        raise RegistryError(f"The backup {str(target)!r} could not be written: {error}.") from error
    return found


def restore(path: str | Path, location: str | Path) -> Integrity:
    """Copies a backup into an empty registry, on SQLite or PostgreSQL; wholly or not at all.

    Args:
        path: the backup; any registry in an SQLite file will do.
        location: where to, a path or a URL; made where there is none.

    Returns:
        What the check of the copy found.

    Raises:
        RegistryError: there is no such backup, its schema is older than this version's, or the target holds anything.
        IntegrityError: the backup is damaged; nothing was restored.
    """
    source = connect(path, create=False, read_only=True)
    try:
        check_readable(source)
        target = connect(location, create=True)
        if target.dialect.name == "sqlite" and not os.path.lexists(described(target)):
            os.close(os.open(described(target), os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode(source)))
        try:
            upgrade(target, create=True)
            return _copy(source, target)
        finally:
            target.dispose()
    finally:
        source.dispose()


def remains(engine: Engine, folder: Path | None = None) -> list[Path]:
    """Folders that killed backups of a registry left in a folder; by default in that of the registry's own file."""
    if folder is None:
        if engine.dialect.name != "sqlite":
            return []
        folder = Path(described(engine)).parent
    found = []
    for path in folder.glob(f".backup-{_identity(engine)}-*"):
        if is_claimed(path, _MARKER, _text(engine)):
            try:
                Hold(path / _MARKER, shared=False).close()
                found.append(path)
            except OSError:  # a backup that is running, or one that has just ended
                continue
    return found


@contextmanager
def _staging(engine: Engine, folder: Path) -> Iterator[Path]:
    """A place for a copy while it is made, in a marked folder of its own."""
    made = folder / f".backup-{_identity(engine)}-{secrets.token_hex(4)}"
    made.mkdir(mode=0o700)
    with written(made / _MARKER) as unfinished:  # held before it has its name, so that nobody takes it for remains
        unfinished.write_text(_text(engine))
        hold = Hold(unfinished, shared=True)
    with hold:
        try:
            yield made / _COPY
        finally:
            discard(made, _FILES, _MARKER)


def _identity(engine: Engine) -> str:
    return hashlib.sha256(described(engine).encode()).hexdigest()[:8]


def _text(engine: Engine) -> str:
    return f"A backup of {described(engine)} that is being made.\n"


def _refuse_to_overwrite(target: Path) -> None:
    if os.path.lexists(target):
        raise RegistryError(f"{str(target)!r} exists already: a backup overwrites nothing. Choose another name.")


def _copy(source: Engine, target: Engine) -> Integrity:
    """Copies every row into an empty registry, in one transaction, which a fault in what was copied rolls back."""
    where = described(target)
    with reading(source) as read, database_errors(f"{where!r} was not filled"), writing(target) as write:
        for table in schema.metadata.sorted_tables:
            if write.execute(select(table).limit(1)).first() is not None:
                raise RegistryError(f"{where!r} holds tasks or a history already: only an empty registry is filled.")
        for table in schema.metadata.sorted_tables:
            _copy_table(read, write, table)
        found = check_rows(write)
        if not found.ok:
            first = found.faults[0]
            raise IntegrityError(
                f"{described(source)!r} is damaged, so that it was not copied; {len(found.faults)} faults, the first: "
                f"{first.subject} {first.said}. See: addenda verify --deep"
            )
        tell(write, found.generation)
    return found


def _copy_table(read: Connection, write: Connection, table: Table) -> None:
    """Copies a table's rows in the order of its key; those with large values a few at a time."""
    large = any(isinstance(column.type, LargeBinary) for column in table.c)
    ordered = select(table).order_by(*table.primary_key)
    rows = read.execute(ordered.execution_options(yield_per=_FEW if large else _BATCH))
    for some in rows.mappings().partitions():
        write.execute(insert(table), [dict(row) for row in some])
