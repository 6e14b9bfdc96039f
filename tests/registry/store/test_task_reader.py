"""Loading many tasks takes few queries, and checks each artifact."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sqlalchemy import event

from addenda.exceptions import IntegrityError
from addenda.registry import Registry
from tests.support.databases import Database, tamper
from tests.support.filled import BACKBONES, fill_registry

FLIP = {
    "sqlite": "CAST(substr(data, 1, length(data) - 1) || x'ff' AS BLOB)",
    "postgresql": "set_byte(data, length(data) - 1, 255)",
}
ON_FIRST, ON_SECOND = (SimpleNamespace(fingerprint=fingerprint) for fingerprint in BACKBONES[:2])


@pytest.fixture(scope="module")
def filled(database: Database) -> str:
    return fill_registry(database.new(), 400)


def flip(location: str, kind: str, ref: str) -> None:
    """Changes the last byte of a task's artifact."""
    with Registry.open(location) as registry:
        sha256 = registry.record(ref).sha256
    tamper(location, "artifact", f"UPDATE artifact SET data = {FLIP[kind]} WHERE sha256 = :sha256", sha256=sha256)


def test_a_hundred_tasks_and_their_parents_are_read_by_few_queries(filled: str) -> None:
    queries = []
    with Registry.open(filled) as registry:
        event.listen(registry._engine, "before_cursor_execute", lambda *call: queries.append(call[2]))
        tasks = registry.load(ON_FIRST)
    assert len(tasks) == 100
    assert [task.ref for task in tasks if task.parents] == [
        f"line-{number:02}-{suffix}:1" for suffix in (0, 1) for number in range(0, 100, 10)
    ][1:]
    assert len({id(parent) for task in tasks for parent in task.parents}) == 1
    assert len([query for query in queries if query.startswith("SELECT")]) < 15


@pytest.mark.parametrize("ref", ["line-02-0:1", "line-98-0:1", "line-98-1:1"])
def test_a_flipped_byte_of_one_task_of_many_is_found_and_named(filled: str, database: Database, ref: str) -> None:
    location = database.copy(filled)
    flip(location, database.kind, ref)
    with Registry.open(location) as registry:
        with pytest.raises(
            IntegrityError, match=f"Task '{ref}' cannot be trusted: its artifact was stored with sha256"
        ):
            registry.load(ON_FIRST)
        assert len(registry.load(ON_SECOND)) == 100
        assert registry.get("line-00-0:1").version == 1


def test_a_flipped_byte_of_a_parent_is_reported_for_the_requested_task(filled: str, database: Database) -> None:
    location = database.copy(filled)
    flip(location, database.kind, "line-00-0:1")
    with Registry.open(location) as registry:
        with pytest.raises(
            IntegrityError, match="'line-90-1:1' cannot be trusted: Task 'line-00-0:1' cannot be trusted"
        ):
            registry.get("line-90-1:1")
        assert registry.get("line-91-1:1").version == 1
