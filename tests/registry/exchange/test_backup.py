"""Backup and restore copy a registry row for row, between both databases, completely or not at all."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text

from addenda.exceptions import IntegrityError, RegistryError
from addenda.registry import Registry, restore
from addenda.registry.exchange import backup
from addenda.registry.store import schema
from tests.registry.audit.test_integrity import fill
from tests.support.databases import Database, raw, refused, rows, tamper
from tests.support.places import ROOT
from tests.support.registries import BACKBONE, a_large_task, a_task, keep


@pytest.fixture(scope="module")
def filled(database: Database) -> str:
    location = database.new()
    fill(location)
    return location


@pytest.fixture
def location(database: Database, filled: str) -> str:
    return database.copy(filled)


@pytest.fixture
def book(location: str) -> Iterator[Registry]:
    with Registry.open(location) as opened:
        yield opened


def plain(location: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row, with JSON parsed on both databases."""
    columns = {table.name: [column.name for column in table.c] for table in schema.metadata.sorted_tables}
    tables = {}
    with raw(location) as connection:
        for table in schema.metadata.sorted_tables:
            ordered = f"SELECT {', '.join(columns[table.name])} FROM {table.name} ORDER BY 1, 2"
            json_at = {i for i, column in enumerate(table.c) if str(column.type) == "JSON"}
            tables[table.name] = [
                tuple(
                    json.loads(value) if i in json_at and isinstance(value, str) else value
                    for i, value in enumerate(row)
                )
                for row in connection.execute(text(ordered))
            ]
    assert all(tables.values()), "a table without a row would prove nothing"
    return tables


def test_a_backup_is_the_registry_row_for_row(book, filled, tmp_path):
    integrity = book.backup(tmp_path / "safe.db")
    assert plain(str(tmp_path / "safe.db")) == plain(filled)
    assert [path.name for path in tmp_path.iterdir()] == ["safe.db"]
    with Registry.open(tmp_path / "safe.db") as copy:
        assert copy.check_integrity() == integrity == book.check_integrity()
        assert [task.sha256 for task in map(copy.get, ("digits", "strokes"))] == [
            task.sha256 for task in map(book.get, ("digits", "strokes"))
        ]


@pytest.mark.slow
def test_a_backup_is_restored_into_either_database_and_lives_on(book, database, filled, tmp_path):
    book.backup(tmp_path / "safe.db")
    before = plain(str(tmp_path / "safe.db"))
    for location in (database.new(), str(tmp_path / "restored.db")):
        integrity = restore(tmp_path / "safe.db", location)
        assert plain(location) == plain(filled) == before
        with Registry.open(location) as back:
            assert back.check_integrity() == integrity == book.check_integrity()
            keep(back, a_task("later", 9))
            assert back.generation == book.generation + 1
            assert back.check_integrity().ok
    assert plain(str(tmp_path / "safe.db")) == before


def test_a_backup_overwrites_nothing(book, tmp_path):
    (tmp_path / "safe.db").write_text("precious")
    with pytest.raises(RegistryError, match=r"'.*safe\.db' exists; a backup does not overwrite"):
        book.backup(tmp_path / "safe.db")
    assert [path.name for path in tmp_path.iterdir()] == ["safe.db"]
    assert (tmp_path / "safe.db").read_text() == "precious"


def test_a_backup_into_no_folder_is_refused(book, tmp_path):
    with pytest.raises(RegistryError, match=r"The backup's folder '.*nowhere' does not exist"):
        book.backup(tmp_path / "nowhere" / "safe.db")


@pytest.mark.parametrize("when", ["before the copy", "before its log is moved into its file"])
def test_a_backup_to_a_full_disk_leaves_no_file_and_names_the_one_asked_for(registry, tmp_path, monkeypatch, when):
    registry.add_backbone(BACKBONE)
    keep(registry, a_large_task())
    folder, copy, before = tmp_path / "full", backup._copy, resource.getrlimit(resource.RLIMIT_FSIZE)
    folder.mkdir()

    def copy_and_fill(*arguments):
        if when == "before the copy":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        integrity = copy(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        return integrity

    monkeypatch.setattr(backup, "_copy", copy_and_fill)
    try:
        with pytest.raises(RegistryError, match=rf"^'{folder}/safe\.db' was not written: "):
            registry.backup(folder / "safe.db")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(folder.iterdir()) == []


def test_a_backup_is_one_file_and_is_restored_though_it_is_write_protected(registry, tmp_path):
    registry.add_backbone(BACKBONE)
    keep(registry, a_task())
    registry.backup(tmp_path / "safe.db")
    with sqlite3.connect(tmp_path / "safe.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    (tmp_path / "safe.db").chmod(0o444)
    restore(tmp_path / "safe.db", tmp_path / "new.db")
    assert (tmp_path / "new.db").stat().st_mode & 0o777 == 0o644
    with Registry.open(tmp_path / "new.db") as restored:
        assert [record.ref for record in restored.tasks()] == ["digits:1"]


def test_a_copy_whose_log_cannot_be_read_is_refused(registry, tmp_path, monkeypatch):
    registry.add_backbone(BACKBONE)
    keep(registry, a_task())
    for suffix in ("", "-wal"):
        shutil.copy(f"{registry.location}{suffix}", tmp_path / f"snapshot.db{suffix}")
    opened = sqlite3.connect

    class Unreadable(sqlite3.Connection):
        def execute(self, *_):
            raise sqlite3.OperationalError("unable to open database file")  # as in a folder without write permission

    def connect(name, **options):
        factory: Any = Unreadable if "mode=rw" in name else sqlite3.Connection
        return opened(name, factory=factory, **options)

    monkeypatch.setattr(sqlite3, "connect", connect)
    with pytest.raises(RegistryError, match=r"snapshot.db-wal holds a part of it"):
        Registry.open(tmp_path / "snapshot.db", read_only=True)


def test_a_damaged_registry_is_not_backed_up(book, location, tmp_path):
    tamper(location, "artifact", "UPDATE artifact SET data = :data WHERE sha256 = "
           "(SELECT artifact FROM task WHERE name = 'old')", data=b"short")  # fmt: skip
    with pytest.raises(IntegrityError, match=r"is damaged and was not copied\. Number of faults: 1; .*: old:1 its art"):
        book.backup(tmp_path / "safe.db")
    assert list(tmp_path.iterdir()) == []


def test_a_registry_that_holds_anything_is_not_restored_over(book, database, tmp_path):
    book.backup(tmp_path / "safe.db")
    taken = database.new()
    with Registry.open(taken) as other:
        other.add_backbone(BACKBONE)
    with refused(taken, RegistryError, match=r"The registry '.*' is not empty; restore into an empty one"):
        restore(tmp_path / "safe.db", taken)


def test_a_backup_that_was_damaged_is_not_restored(book, database, tmp_path):
    book.backup(tmp_path / "safe.db")
    tamper(str(tmp_path / "safe.db"), "event", "UPDATE event SET created_by = 'eve' WHERE id = 4")
    location = database.new()
    with pytest.raises(
        IntegrityError,
        match=r"safe\.db' is damaged and .* the first: event 4 does not match its digest: it or a row that it wrote",
    ):
        restore(tmp_path / "safe.db", location)
    assert not any(rows(location).values())
    with Registry.open(location) as empty:
        assert (empty.generation, empty.tasks()) == (0, [])


def test_a_missing_or_empty_file_is_not_restored(database, tmp_path):
    with pytest.raises(RegistryError, match="There is no registry at"):
        restore(tmp_path / "none.db", database.new())
    (tmp_path / "empty.db").touch()
    with pytest.raises(RegistryError, match="There is no registry at"):
        restore(tmp_path / "empty.db", database.new())


def test_a_change_during_a_backup_is_in_the_next_one(book, location, tmp_path, monkeypatch):
    """The copy is a consistent snapshot, and a writer does not wait for it."""
    copy_table = backup._copy_table

    def slowly(read: Any, write: Any, table: Any) -> None:
        copy_table(read, write, table)
        if table is schema.backbone:
            with Registry.open(location) as other:
                other.note("digits", "written meanwhile")

    before = book.generation
    monkeypatch.setattr(backup, "_copy_table", slowly)
    assert book.backup(tmp_path / "safe.db").generation == before
    assert book.generation == before + 1


KILLED = """
import os, signal, sys
from addenda.registry import Registry, restore
from addenda.registry.exchange import backup
from tests.support.places import ROOT
copied = backup._copy_table
def die(read, write, table):
    copied(read, write, table)
    if table.name == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
backup._copy_table = die
if sys.argv[1] == "restore":
    restore(sys.argv[2], sys.argv[3])
Registry.open(sys.argv[2]).backup(sys.argv[3])
"""


def killed(*arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("table", ["artifact", "statistics"])
def test_a_copy_that_is_killed_leaves_nothing_and_can_be_made_again(book, location, database, tmp_path, table):
    killed("backup", location, tmp_path / "safe.db", table)
    assert not (tmp_path / "safe.db").exists()
    assert all(path.name.startswith(".backup-") for path in tmp_path.iterdir())
    integrity = book.backup(tmp_path / "safe.db")

    empty = database.new()
    killed("restore", tmp_path / "safe.db", empty, table)
    assert not any(rows(empty).values())
    assert restore(tmp_path / "safe.db", empty) == integrity


def test_a_registry_whose_name_is_not_utf8_is_backed_up_without_remains(tmp_path):
    name = os.fsdecode(b"na\xefme.db")
    with Registry.open(tmp_path / name) as registry:
        registry.add_backbone(BACKBONE)
        keep(registry, a_task("digits"))
        registry.backup(tmp_path / "copy.db")
        registry.export(["digits"], tmp_path / os.fsdecode(b"bu\xefn.addenda"))
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".")]) == 0
    with Registry.open(tmp_path / "copy.db") as copy:
        assert [record.ref for record in copy.tasks()] == ["digits:1"]
