"""Copies of a whole registry, row for row: to a file for safekeeping, and from one into an empty registry."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection, Engine, LargeBinary, Table, insert, select

from addenda.exceptions import IntegrityError, RegistryError
from addenda.files import Hold, discard, is_claimed, put, written
from addenda.registry.audit.integrity import Integrity, check_rows
from addenda.registry.store import schema
from addenda.registry.store.database import connect, database_errors, described, mode, reading, writing
from addenda.registry.store.digests import digest
from addenda.registry.store.ledger import tell
from addenda.registry.store.upgrade import check_readable, upgrade

_BATCH, _FEW = 500, 16
_MARKER, _COPY = "addenda-backup", "copy.db"
_FILES = rf"{re.escape(_COPY)}(-wal|-shm|-journal)?"


def backup(engine: Engine, path: str | Path) -> Integrity:
    """Copies a registry as `Reader.backup` says; a killed one leaves a folder, which the next one there removes."""
    target = Path(path).expanduser().absolute()
    _refuse_to_overwrite(target)
    if not target.parent.is_dir():
        raise RegistryError(f"The folder {str(target.parent)!r} of the backup does not exist.")
    try:
        for folder in remains(engine, target.parent):
            discard(folder, _FILES, _MARKER)
        with _staging(engine, target.parent) as part:
            with _disposed(connect(part, create=True)) as copy:
                found = _copy(engine, copy)
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
    with _disposed(connect(path, create=False, read_only=True)) as source:
        check_readable(source)
        with _disposed(connect(location, create=True)) as target:
            if target.dialect.name == "sqlite" and not os.path.lexists(described(target)):
                os.close(os.open(described(target), os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode(source)))
            return _copy(source, target)


def remains(engine: Engine, folder: Path | None = None) -> list[Path]:
    """Folders that killed backups of a registry left in a folder; by default in that of the registry's own file."""
    if folder is None:
        if engine.dialect.name != "sqlite":
            return []
        folder = Path(described(engine)).parent
    stem, text = _marks(engine)
    found = []
    for path in folder.glob(f"{stem}*"):
        if is_claimed(path, _MARKER, text):
            with suppress(OSError):  # of a backup that is running, or that has just ended
                Hold(path / _MARKER, shared=False).close()
                found.append(path)
    return found


@contextmanager
def _staging(engine: Engine, folder: Path) -> Iterator[Path]:
    """A place for a copy while it is made, in a marked folder of its own."""
    stem, text = _marks(engine)
    made = folder / f"{stem}{secrets.token_hex(4)}"
    made.mkdir(mode=0o700)
    with written(made / _MARKER) as unfinished:  # held before it has its name, so that nobody takes it for remains
        unfinished.write_text(text)
        hold = Hold(unfinished, shared=True)
    with hold:
        try:
            yield made / _COPY
        finally:
            discard(made, _FILES, _MARKER)


def _marks(engine: Engine) -> tuple[str, str]:
    """What the names of the folders of a registry's backups begin with, and what their markers say."""
    where = described(engine)
    return f".backup-{digest(where.encode())[:8]}-", f"A backup of {where} that is being made.\n"


def _refuse_to_overwrite(target: Path) -> None:
    if os.path.lexists(target):
        raise RegistryError(f"{str(target)!r} exists already: a backup overwrites nothing. Choose another name.")


@contextmanager
def _disposed(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.dispose()


def _copy(source: Engine, target: Engine) -> Integrity:
    """Copies every row into an empty registry, in one transaction, which a fault in what was copied rolls back."""
    upgrade(target, create=True)
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
