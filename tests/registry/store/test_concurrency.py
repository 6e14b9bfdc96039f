"""Concurrent processes: no change is lost or duplicated, no writer fails, and readers do not wait."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import make_url

from addenda.exceptions import NameTakenError
from addenda.registry import Registry, TaskFilter
from addenda.registry.store.upgrade import schema_faults
from tests.support.databases import Database, address
from tests.support.processes import FORKS, all_at_once, exit_code
from tests.support.registries import BACKBONE, HERE, a_large_task, a_task, keep, verify_ledger

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("another_interpreter")]

TAKEN = 3


def open_and_register(locations: list[str], name: str, seed: int, start: Any) -> None:
    for location in locations:
        start.wait(60)
        with Registry.open(location) as registry:
            registry.add_backbone(BACKBONE)
            try:
                keep(registry, a_task(name, seed))
            except NameTakenError:
                sys.exit(TAKEN)


def test_several_processes_can_open_a_fresh_registry_at_once(database):
    locations, names = [database.new() for _ in range(3)], ["a", "b", "c", "d"]
    asked = [(locations, name, seed) for seed, name in enumerate(names)]
    assert all_at_once(open_and_register, asked) == [0] * len(names)
    for location in locations:
        with Registry.open(location) as registry:
            assert sorted(task.ref for task in registry.load(HERE)) == ["a:1", "b:1", "c:1", "d:1"]
            assert registry.backbones() == [BACKBONE]
        assert verify_ledger(location) == 5


def test_of_several_processes_one_gets_the_name(shelf, database):
    location = database.copy(shelf["book"])
    asked = [([location], "digits", seed) for seed in range(4)]
    assert Counter(all_at_once(open_and_register, asked)) == Counter([0, TAKEN, TAKEN, TAKEN])
    assert verify_ledger(location) == 2


def test_the_same_content_from_several_processes_is_registered_once(shelf, database):
    location = database.copy(shelf["book"])
    assert all_at_once(open_and_register, [([location], "digits", 0)] * 4) == [0] * 4
    assert verify_ledger(location) == 2


def move_the_alias(location: str, steps: int, start: Any) -> None:
    """Moves an alias from 1 to 2 and back, with its current version as precondition."""
    start.wait(60)
    with Registry.open(location) as registry:
        done = 0
        while done < steps:
            seen = registry.get("digits@production").version
            try:
                registry.set_alias("digits", "production", 3 - seen, expected=seen)
                done += 1
            except Exception as error:
                if "as expected" not in str(error):
                    raise


def test_an_alias_that_several_processes_move_misses_no_step(book):
    for seed in range(2):
        keep(book, a_task(seed=seed), new_version=True)
    book.set_alias("digits", "production", 1)
    location = address(book)
    assert all_at_once(move_the_alias, [(location, 5)] * 4) == [0] * 4
    steps = [(e.details["before"], e.details["version"]) for e in book.events() if e.kind == "alias"]
    assert steps == [(None, 1), *[(1, 2), (2, 1)] * 10]
    verify_ledger(location)


def register_some(location: str, number: int, each: int, start: Any) -> None:
    """Registers half of the tasks under unique names, half as versions of names that all processes use."""
    start.wait(60)
    with Registry.open(location, user=f"process {number}") as registry:
        for turn in range(each):
            seed = 1000 * number + turn
            if turn % 2:
                keep(registry, a_task(f"shared-{turn}", seed), new_version=True)
            else:
                keep(registry, a_task(f"own-{number}-{turn}", seed))


def register_together(location: str, processes: int, each: int) -> None:
    """Registers from several processes at once, and checks that each task is registered once."""
    asked = [(location, number, each) for number in range(processes)]
    assert all_at_once(register_some, asked) == [0] * processes
    assert verify_ledger(location) == 1 + processes * each
    with Registry.open(location) as registry:
        records = registry.tasks(TaskFilter(retired=True))
        assert len({record.sha256 for record in records}) == len(records) == processes * each
        assert Counter(record.created_by for record in records) == {
            f"process {number}": each for number in range(processes)
        }
        versions: dict[str, list[int]] = {}
        for record in records:
            versions.setdefault(record.name, []).append(record.version)
        shared = [numbers for name, numbers in versions.items() if name.startswith("shared")]
        assert shared == [list(range(1, processes + 1))] * (each // 2)
        assert {tuple(numbers) for name, numbers in versions.items() if name.startswith("own")} == {(1,)}
        assert schema_faults(registry._engine) == []


def strict(location: str, database: Database) -> str:
    """A location whose server defaults to the isolation level that is worst for a registry."""
    if database.kind == "sqlite":
        return location
    options = {"options": "-c default_transaction_isolation=serializable"}
    return make_url(location).update_query_dict(options).render_as_string(hide_password=False)


def test_four_processes_register_at_once_whatever_isolation_the_server_prefers(shelf, database):
    register_together(strict(database.copy(shelf["book"]), database), 4, 6)


def test_sixteen_processes_register_fifty_tasks_each(shelf, database):
    register_together(database.copy(shelf["book"]), 16, 50)


def hold_open(location: str, changed: Any, go_on: Any) -> None:
    """Registers more than SQLite buffers in memory, retires, moves an alias; waits for a barrier before each commit."""

    def hold(connection: Connection) -> None:
        if connection.get_execution_options().get("writes"):
            changed.wait(60)
            go_on.wait(60)

    with Registry.open(location) as registry:
        event.listen(Engine, "commit", hold)
        keep(registry, a_large_task())
        registry.retire("large")
        registry.set_alias("digits", "staging", 1)


def read_all(location: str, generation: int) -> None:
    with Registry.open(location) as registry:
        assert registry.generation == generation
        registry.tasks(), registry.load(HERE), registry.events(), registry.goldens("strokes")
        registry.record("strokes"), registry.evaluations("digits:1"), registry.wait(generation, 0.01)


def test_readers_wait_for_no_writer_and_see_what_was_committed(full_book):
    location = address(full_book)
    full_book.close()
    changed, go_on = FORKS.Barrier(2), FORKS.Barrier(2)
    writer = FORKS.Process(target=hold_open, args=(location, changed, go_on))
    writer.start()
    for generation in (9, 10, 11):
        changed.wait(60)
        assert exit_code(read_all, location, generation, timeout_s=20) == 0
        go_on.wait(60)
    writer.join(60)
    assert writer.exitcode == 0
    assert exit_code(read_all, location, 12) == 0
