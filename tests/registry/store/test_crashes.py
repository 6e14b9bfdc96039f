"""A killed process or a full disk leaves no partial change, and a retry succeeds."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Pool, event

from addenda.exceptions import RegistryError
from addenda.registry import Registry
from addenda.registry.store.upgrade import schema_faults
from tests.support.databases import ON_SQLITE, everything, rows
from tests.support.processes import FORKS, KILLED, killed_at_each_statement
from tests.support.registries import (
    BACKBONE,
    EVALUATION,
    a_large_task,
    a_statistic,
    a_task,
    keep,
    probe,
    same_content,
    verify_ledger,
)

pytestmark = pytest.mark.usefixtures("another_interpreter")


def register_a_large_task(registry: Registry) -> None:
    """Registers a large task with parents, statistics and evaluations."""
    task = a_large_task(parents=(registry.get("strokes"), registry.get("digits")))
    registry.register(task, probe(task), a_statistic(), evaluations=[EVALUATION, EVALUATION])


CHANGES: dict[str, Callable[[Registry], object]] = {
    "a backbone": lambda registry: registry.add_backbone({**BACKBONE, "fingerprint": "c" * 64}),
    "a task": register_a_large_task,
    "a version": lambda registry: keep(registry, a_task("digits", 6), new_version=True),
    "a probe": lambda registry: registry.add_golden("digits:1", probe(a_task(), "o" * 64)),
    "an evaluation": lambda registry: registry.add_evaluation("digits:1", *vars(EVALUATION).values()),
    "an alias": lambda registry: registry.set_alias("digits", "staging", 2, expected=0),
    "an alias moved": lambda registry: registry.set_alias("digits", "production", 2, expected=1),
    "an alias removed": lambda registry: registry.remove_alias("digits", "production", expected=2),
    "a tag": lambda registry: registry.tag("digits:1", "new"),
    "a tag removed": lambda registry: registry.untag("digits:1", "new"),
    "a note": lambda registry: registry.note("digits:1", "a note"),
    "retirements": lambda registry: registry.retire("strokes", "all three", along=("digits:1", "large")),
}
AGAIN = ("a backbone", "a task", "a version", "a probe", "a tag")
"""Idempotent changes."""


def make(location: str, change: str) -> None:
    with Registry.open(location) as registry:
        CHANGES[change](registry)


def complete_tasks(location: str) -> set[str]:
    """The registered references; checks that each loads with its golden probe and that there are no other rows."""
    verify_ledger(location)
    with Registry.open(location) as registry:
        assert schema_faults(registry._engine) == []
        registered = [event.subject for event in registry.events() if event.kind == "registered"]
        for ref in registered:
            assert registry.get(ref).ref == ref
            assert len(registry.goldens(ref)) >= 1
            registry.statistics(ref)
    tables = rows(location)
    assert sorted(f"{row[1]}:{row[2]}" for row in tables["task"]) == sorted(registered)
    assert {row[0] for row in tables["artifact"]} == {row[4] for row in tables["task"]}
    return set(registered)


@pytest.mark.slow
def test_a_process_killed_at_any_statement_of_any_change_leaves_nothing_of_it(shelf, database):
    location, kills = database.copy(shelf["full"]), 0
    for change in CHANGES:
        kills_of_change = killed_at_each_statement(make, location, change)
        assert kills_of_change > 8
        kills += kills_of_change
        complete_tasks(location)
        if change in AGAIN:
            once = everything(location)
            make(location, change)
            assert everything(location) == once
    assert kills >= 200
    assert complete_tasks(location) == {"strokes:1", "digits:1", "digits:2", "old:1", "large:1"}
    with Registry.open(location) as registry:
        assert same_content(registry.get("large:1"), a_large_task(parents=registry.get("large:1").parents))
        assert [record.ref for record in registry.tasks()] == ["digits:2"]


def register_many(location: str, first: int, sender: Any) -> None:
    with Registry.open(location) as registry:
        for number in count(first):
            keep(registry, a_task(f"task-{number}", number))
            sender.send(number)


@pytest.mark.slow
def test_a_process_killed_at_any_time_leaves_complete_tasks_and_all_that_it_reported(shelf, database):
    location, generator, reported, kills = database.copy(shelf["book"]), random.Random(0), set(), 5
    for round_ in range(kills):
        receiver, sender = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=register_many, args=(location, 1000 * round_, sender))
        process.start()
        sender.close()
        reported.add(f"task-{receiver.recv()}:1")
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        process.join(60)
        assert process.exitcode == KILLED
        with closing(receiver):
            while receiver.poll():
                try:
                    reported.add(f"task-{receiver.recv()}:1")
                except EOFError:
                    break
        assert reported <= complete_tasks(location)
    assert len(reported) > kills
    with Registry.open(location) as registry:
        assert same_content(registry.get("task-0"), a_task(seed=0))


@contextmanager
def database_full(registry: Registry) -> Iterator[None]:
    """Limits SQLite to the pages it has, as on a full disk."""

    def limit(dbapi: Any, *_: object) -> None:
        [used] = dbapi.execute("PRAGMA page_count").fetchone()
        dbapi.execute(f"PRAGMA max_page_count={used}")

    def lift(dbapi: Any, *_: object) -> None:
        dbapi.execute("PRAGMA max_page_count=1073741823")

    event.listen(Pool, "checkout", limit)
    try:
        yield
    finally:
        event.remove(Pool, "checkout", limit)
        event.listen(Pool, "checkout", lift)
        assert registry.generation == 1
        event.remove(Pool, "checkout", lift)


@contextmanager
def files_limited(registry: Registry) -> Iterator[None]:
    """Limits the size of this process's files to 1 MB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@ON_SQLITE
@pytest.mark.parametrize("full", [database_full, files_limited])
def test_a_full_disk_under_sqlite_registers_nothing_and_a_retry_works(book, full):
    before = rows(book)
    with full(book):
        with pytest.raises(RegistryError, match=r"Task 'large' was not registered: .*Nothing was changed\."):
            keep(book, a_large_task())
        assert book.tasks() == []
    assert rows(book) == before
    assert same_content(keep(book, a_large_task()), a_large_task())
    assert complete_tasks(book.location) == {"large:1"}
