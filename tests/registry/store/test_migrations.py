"""Upgrades keep every row and digest of an older registry, and leave other databases untouched."""

from __future__ import annotations

from typing import Any

import pytest
from mako.template import Template
from sqlalchemy import Column, String, text

from addenda.exceptions import RegistryError
from addenda.registry import Registry, digest
from addenda.registry.store import schema
from addenda.registry.store.database import connect, writing
from addenda.registry.store.upgrade import VERSION_TABLE, migrate, schema_faults
from tests.support.databases import Database, address, everything, raw
from tests.support.old_registries import Rows, as_it_was_told, make_old, mappings
from tests.support.places import ROOT
from tests.support.processes import all_at_once, killed_at_each_statement
from tests.support.registries import BACKBONE, HERE, a_task, keep, same_content, verify_ledger

OLD = ("0001", "0002")

pytestmark = pytest.mark.usefixtures("another_interpreter")


@pytest.fixture(scope="module")
def present(shelf: dict[str, str]) -> Rows:
    return as_it_was_told(shelf["full"])


@pytest.fixture(params=OLD)
def old(request: pytest.FixtureRequest, database: Database, present: Rows) -> tuple[str, Rows]:
    """The location of an old registry, and its rows."""
    location = database.new()
    return location, make_old(location, request.param, present)


def open_it(location: str, *start: Any) -> None:
    for barrier in start:
        barrier.wait(60)
    Registry.open(location).close()


def test_an_upgrade_keeps_every_column_of_every_row(old):
    location, before = old
    assert all(before.values())
    open_it(location)
    after = mappings(location)
    for table, old_rows in before.items():
        new_rows = [{name: row[name] for name in old_rows[0]} for row in after[table]]
        assert (new_rows[:-1] if table == "event" else new_rows) == old_rows
    assert all(digest(row["data"]) == row["sha256"] for row in after["artifact"] + after["statistics"])
    assert all(digest(row["logits"]) == row["digest"] for row in after["golden"])


def test_an_upgrade_seals_the_old_events_and_what_they_wrote(old, present):
    location, before = old
    open_it(location)
    after, last = mappings(location), len(before["event"]) + 1
    assert verify_ledger(location) == last
    assert after["event"][-1]["kind"] == "upgraded"
    assert {row["event_id"] for row in after["backbone"]} == {last}
    for table in ("task", "retirement", "golden", "evaluation"):
        assert [row["event_id"] for row in after[table]] == [row["event_id"] for row in present[table]]
    assert [(row["score"], row["packages"]) for row in after["task"]] == [(None, {}), (0.9, {}), (None, {})]


def test_an_upgrade_does_not_depend_on_columns_of_later_versions(old):
    """Simulates the next schema change: the live schema has a column that the migrations so far lack."""
    location, before = old
    assert all_at_once(upgrade_with_later_columns, [(location,)]) == [0]
    assert verify_ledger(location) == len(before["event"]) + 1


def upgrade_with_later_columns(location: str, *start: Any) -> None:
    for table in ("task", "golden", "backbone", "event", "statistics"):
        schema.metadata.tables[table].append_column(Column("later", String, nullable=False, server_default=""))
    engine = connect(location, create=False)
    with writing(engine) as connection:
        migrate(connection)
    engine.dispose()


def test_an_upgraded_registry_is_like_a_new_one(old):
    location, before = old
    with Registry.open(location) as registry:
        assert schema_faults(registry._engine) == []
        digits, strokes = registry.get("digits@production"), registry.get("strokes")
        assert same_content(strokes, a_task("strokes", 1))
        assert same_content(digits, a_task("digits", 2, parents=(strokes,)))
        assert registry.backbones() == [BACKBONE]
        assert (registry.statistics("digits") is None) == ("statistics" not in before)
        assert keep(registry, digits).ref == "digits:1"
        assert keep(registry, a_task("birds", 8, parents=(digits,))).ref == "birds:1"
        assert [task.ref for task in registry.load(HERE)] == ["strokes:1", "digits:1", "birds:1"]
    assert verify_ledger(location) == len(before["event"]) + 2


@pytest.mark.slow
@pytest.mark.parametrize("first", ["none", *OLD])
def test_eight_processes_that_open_a_registry_at_once_upgrade_it_once(database, present, first):
    location = database.new()
    old_events = [] if first == "none" else make_old(location, first, present)["event"]
    assert all_at_once(open_it, [(location,)] * 8) == [0] * 8
    with Registry.open(location) as registry:
        assert schema_faults(registry._engine) == []
        kinds = [event.kind for event in registry.events()]
    assert kinds == [row["kind"] for row in old_events] + ["upgraded"] * (first != "none")
    verify_ledger(location)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["none", OLD[0]])  # an upgrade from the first schema takes every later step too
def test_a_process_killed_at_any_statement_of_an_upgrade_leaves_the_old_schema(database, present, first):
    location = database.new()
    if first != "none":
        make_old(location, first, present)
    assert killed_at_each_statement(open_it, location) > 25
    with Registry.open(location) as registry:
        assert schema_faults(registry._engine) == []
    verify_ledger(location)


def test_a_new_migration_imports_only_what_exists():
    template = Template(filename=str(ROOT / "addenda" / "registry" / "migrations" / "script.py.mako"))
    source = template.render(message="Next", up_revision="9999", down_revision="0003", upgrades="")
    migration: dict[str, Any] = {}
    exec(source, migration)
    assert (migration["revision"], migration["down_revision"]) == ("9999", "0003")


def test_a_registry_of_a_newer_version_is_refused_untouched(full_book):
    with raw(full_book) as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    before = everything(full_book)
    with pytest.raises(RegistryError, match=r"has schema '9999', from a newer version of Addenda\. Upgrade"):
        Registry.open(address(full_book))
    assert everything(full_book) == before


@pytest.mark.parametrize("table", ["songs", "task"])
def test_another_programs_database_is_refused_untouched(database, table):
    location = database.new()
    with raw(location) as connection:
        connection.execute(text(f"CREATE TABLE {table} (title TEXT)"))
    before = everything(location)
    with pytest.raises(RegistryError, match="is another program's database, not a registry"):
        Registry.open(location)
    assert everything(location) == before


@pytest.mark.parametrize(
    ("sql", "fault"),
    [
        ("ALTER TABLE task ADD COLUMN extra TEXT", "remove_column"),
        ("ALTER TABLE tag RENAME TO label", "remove_table"),
        ("DROP INDEX ix_task_page", "add_index"),
        ("ALTER TABLE event RENAME COLUMN digest TO sha256", "add_column"),
    ],
)
def test_a_schema_that_was_changed_is_a_fault(full_book, sql, fault):
    with raw(full_book) as connection:
        connection.execute(text(sql))
    before = everything(full_book)
    assert any(fault in message for message in schema_faults(full_book._engine))
    assert everything(full_book) == before
