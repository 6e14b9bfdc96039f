"""Locations of registries, and errors when one cannot be opened, which never contain a password."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ProgrammingError

from addenda.exceptions import RegistryError, RegistryUnavailableError
from addenda.registry import Registry
from addenda.registry.store import database as databases
from tests.support.databases import ON_POSTGRESQL, address, everything, raw, rows
from tests.support.places import ROOT
from tests.support.registries import BACKBONE, EVALUATION, HERE, a_task, keep, probe


def test_a_registry_stays_when_it_is_closed_and_opened_again(full_book, database):
    full_book.close()
    before = rows(full_book)
    locations = [full_book.location, address(full_book)] if database.kind == "sqlite" else [address(full_book)]
    for again in locations:
        with Registry.open(again, create=False) as opened:
            assert opened.get("digits").extends == ("strokes:1",)
            assert opened.generation == 9
    assert rows(full_book) == before


def test_a_registry_is_not_created_without_create(database):
    location = database.new()
    with pytest.raises(RegistryError, match=r"There is no registry at '.*'; check the .*`addenda learn` creates one"):
        Registry.open(location, create=False)
    if database.kind == "sqlite":
        assert not Path(location).exists()
    else:
        assert not any(everything(location).values())


def test_a_locked_registry_is_a_registry_error(full_book, monkeypatch):
    monkeypatch.setattr(databases, "WAIT_S", 1)
    with Registry.open(address(full_book)) as impatient, databases.writing(full_book._engine):
        with pytest.raises(RegistryError, match=r"Task 'birds' was not registered: .*lock.*\. Nothing was changed"):
            keep(impatient, a_task("birds", 8))
        assert [record.ref for record in impatient.tasks()] == ["strokes:1", "digits:1"]
    assert keep(full_book, a_task("birds", 8)).ref == "birds:1"


@pytest.mark.parametrize("folder", ["a b", "é", "a?b", "a#b", "a%20b", "a%b", "a+b", "a=b&c", "it's"])
def test_a_path_is_a_path_whatever_its_letters(tmp_path, folder):
    (tmp_path / folder).mkdir()
    with Registry.open(tmp_path / folder / "tasks.db") as opened:
        assert opened.generation == 0
        assert (tmp_path / folder / "tasks.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_a_file_that_is_not_a_database_is_refused_untouched(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database\n" * 500)
    with pytest.raises(RegistryError, match=r"Registry '.*notes\.txt' cannot be opened: file is not a database"):
        Registry.open(path)
    assert path.read_text() == "not a database\n" * 500


NEITHER = "A registry is an SQLite file or a PostgreSQL database: give a path, sqlite:///PATH or postgresql://"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{}/no/tasks.db", "The registry's folder '{}/no' does not exist"),
        ("sqlite:///{}/no/tasks.db", "The registry's folder '{}/no' does not exist"),
        ("{}", "'{}' is a folder; give a file, such as '{}/addenda.db'."),
        ("sqlite://", NEITHER),
        ("mysql://me:secret@host/db", f"{NEITHER}USER@HOST/DATABASE, not 'mysql://me:***@host/db'"),
        ("mysql://host/db?password=secret", f"{NEITHER}USER@HOST/DATABASE, not 'mysql://host/db'"),
        ("postgresql://me:secret@host", NEITHER),
        ("postgresql://me:secret@host:port/db", "'postgresql://***@host:port/db' is not a database URL"),
        ("postgresql ://me:se@secret@host/db", "'postgresql ://***@host/db' is not a database URL"),
        ("://", "'://' is not a database URL"),
        ("postgresql://me:secret@127.0.0.1:1/db", "Registry 'postgresql://me:***@127.0.0.1:1/db' cannot be opened: "),
        ("postgresql://me@127.0.0.1:1/db?password=secret", "Registry 'postgresql://me@127.0.0.1:1/db' cannot be op"),
        ("postgresql://me@127.0.0.1:1/db?sslpassword=secret", "Registry 'postgresql://me@127.0.0.1:1/db' cannot be"),
        ("postgresql://me:secret@127.0.0.1:1/db?colour=red", "Registry 'postgresql://me:***@127.0.0.1:1/db?colour=r"),
    ],
)
def test_a_location_that_cannot_be_opened_is_refused(tmp_path, location, message):
    with pytest.raises(RegistryError) as refusal:
        Registry.open(location.format(tmp_path))
    assert str(refusal.value).startswith(message.replace("{}", str(tmp_path)))
    assert "secret" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_without_psycopg_a_postgresql_registry_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(RegistryError, match=r"requires psycopg: pip install 'addenda\[postgres\]'"):
        Registry.open("postgresql://me@127.0.0.1:1/db")


@ON_POSTGRESQL
def test_a_missing_postgresql_database_is_a_registry_error(database):
    nowhere = make_url(database.new()).set(database="nowhere").render_as_string(hide_password=False)
    with pytest.raises(RegistryError, match=r"cannot be opened: .*database \"nowhere\" does not exist"):
        Registry.open(nowhere)


@contextmanager
def a_role(location: str, *rights: str) -> Iterator[str]:
    """The location for a role that may log in and has only these rights."""
    name = f"role_{uuid4().hex}"
    with raw(location) as connection:
        connection.execute(text(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'"))
        for right in rights:
            connection.execute(text(f"GRANT {right} TO {name}"))
    yield make_url(location).set(username=name, password="secret").render_as_string(hide_password=False)
    with raw(location) as connection:
        connection.execute(text(f"DROP OWNED BY {name}"))
        connection.execute(text(f"DROP ROLE {name}"))


@ON_POSTGRESQL
def test_a_postgresql_role_that_may_only_read_reads(full_book):
    before = rows(full_book)
    reading = "SELECT ON ALL TABLES IN SCHEMA public"
    with a_role(address(full_book), reading) as location, Registry.open(location) as reader:
        assert [task.ref for task in reader.load(HERE)] == ["strokes:1", "digits:1"]
        assert reader.wait(9, 0.1) == 9
        for change in (lambda: keep(reader, a_task("birds", 8)), lambda: reader.note("digits", "read")):
            with pytest.raises(RegistryError, match=r"permission denied for table .*\. Nothing was changed"):
                change()
        assert "secret" not in reader.location
    assert rows(full_book) == before


@ON_POSTGRESQL
def test_a_postgresql_role_with_the_documented_rights_can_write_but_not_alter(full_book):
    page = (ROOT / "docs" / "registry.md").read_text()
    rights = re.findall(r"^GRANT (.*) TO (?:\w+, )*writer\b.*;$", page, re.MULTILINE)
    assert len(rights) == 4
    with a_role(address(full_book), *rights) as location, Registry.open(location) as writer:
        keep(writer, a_task("birds", 8))
        writer.set_alias("birds", "production", 1)
        writer.set_alias("digits", "production", 1)
        writer.remove_alias("birds", "production")
        writer.tag("birds", "new")
        writer.untag("birds", "new")
        writer.note("birds", "seen")
        writer.add_evaluation("birds", *vars(EVALUATION).values())
        writer.add_golden("birds", probe(a_task("birds", 8), "o" * 64))
        writer.retire("birds")
        assert writer.check_integrity().ok
        for sql in ("ALTER TABLE task DISABLE TRIGGER ALL", "UPDATE task SET name = 'x'", "TRUNCATE event"):
            with pytest.raises(ProgrammingError, match=r"permission denied|must be owner"), raw(location) as connection:
                connection.execute(text(sql))


@ON_POSTGRESQL
def test_a_postgresql_role_without_rights_is_refused(full_book, database):
    with a_role(address(full_book)) as location:
        with pytest.raises(RegistryError, match=r"cannot be opened: permission denied for table") as refusal:
            Registry.open(location)
        assert "secret" not in str(refusal.value)
    with a_role(database.new()) as location, pytest.raises(RegistryError, match="permission denied for schema public"):
        Registry.open(location)


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_nothing_is_written_to_a_file_that_was_removed_or_replaced(registry, tmp_path, change):
    registry.add_backbone(BACKBONE)
    registry.tasks()
    (tmp_path / "tasks.db").rename(tmp_path / "moved.db")
    if change == "replaced":
        with Registry.open(tmp_path / "tasks.db") as other:
            other.add_backbone(BACKBONE)
    with pytest.raises(RegistryError, match=r"'.*tasks\.db' was removed or replaced after it was opened\. Nothing was"):
        keep(registry, a_task())


@pytest.mark.slow
@ON_POSTGRESQL
def test_a_registry_in_a_schema_is_read_from_that_schema(database, tmp_path):
    location, schema = database.new(), "s" * 60  # as long as PostgreSQL allows
    with raw(location) as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    options = {"options": f"-csearch_path={schema}"}
    within = make_url(location).update_query_dict(options).render_as_string(hide_password=False)
    for place, name in ((location, "outside"), (within, "inside")):
        with Registry.open(place) as registry:
            registry.add_backbone(BACKBONE)
            keep(registry, a_task(name))
    with Registry.open(tmp_path / "merged.db") as merged:
        for place, ref in ((within, "inside:1"), (location, "outside:1")):
            with Registry.open(place, read_only=True) as source:
                assert [received.ref for received in merged.merge(source)] == [ref]


@ON_POSTGRESQL
def test_a_reader_does_not_wait_for_long_when_a_table_is_locked(full_book, monkeypatch):
    monkeypatch.setattr(databases, "READ_WAIT_S", 1)
    with Registry.open(address(full_book)) as impatient, raw(full_book) as other:
        other.execute(text("LOCK TABLE task, event IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(RegistryUnavailableError, match=r"canceling .* due to lock timeout") as refused:
            impatient.tasks()
        assert "Nothing was changed" not in str(refused.value)
    assert [record.ref for record in full_book.tasks()] == ["strokes:1", "digits:1"]
