"""The ledger: every change is an event with author and time, in a hash chain without gaps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import select

from addenda.exceptions import RegistryError
from addenda.registry import Registry
from addenda.registry.store import ledger, schema
from addenda.registry.store.database import reading
from tests.support.databases import address, refused, tamper, unchanged
from tests.support.registries import BACKBONE, EVALUATION, HERE, a_task, keep, probe, verify_ledger

Change = Callable[[Registry], object]
CHANGES: dict[str, Change] = {
    "backbone": lambda book: book.add_backbone({**BACKBONE, "fingerprint": "c" * 64}),
    "registered": lambda book: keep(book, a_task("birds", 8)),
    "golden": lambda book: book.add_golden("digits", probe(a_task(), "other")),
    "evaluated": lambda book: book.add_evaluation("digits", *vars(EVALUATION).values()),
    "alias": lambda book: book.set_alias("digits", "staging", 1),
    "alias removed": lambda book: book.remove_alias("digits", "production"),
    "tagged": lambda book: book.tag("digits", "new"),
    "untagged": lambda book: book.untag("digits", "shop"),
    "noted": lambda book: book.note("digits", "labelled again in May"),
    "retired": lambda book: book.retire("digits", "old"),
}
SAME: dict[str, Change] = {
    "the backbone again": lambda book: book.add_backbone(BACKBONE),
    "the content again": lambda book: keep(book, book.get("digits")),
    "the probe again": lambda book: book.add_golden("digits", probe(a_task())),
    "the alias as it is": lambda book: book.set_alias("digits", "production", 1),
    "the tag again": lambda book: book.tag("digits", "shop"),
    "reading": lambda book: (book.load(HERE), book.tasks(), book.goldens("digits"), book.events()),
}
REFUSED: dict[str, Change] = {
    "a name that is taken": lambda book: keep(book, a_task("digits", 9)),
    "an alias from elsewhere": lambda book: book.set_alias("digits", "production", 1, expected=0),
    "an alias that is not there": lambda book: book.remove_alias("digits", "none"),
    "a tag that is not there": lambda book: book.untag("digits", "none"),
    "a parent without its child": lambda book: book.retire("strokes"),
    "a task that an alias points at": lambda book: book.retire("digits"),
    "an alias for a retired task": lambda book: book.set_alias("old", "production", 1),
    "a task retired before": lambda book: book.retire("old:1"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_one_event_and_the_ledger_verifies(full_book, kind):
    if kind == "retired":
        full_book.remove_alias("digits", "production")
    before = full_book.events()
    CHANGES[kind](full_book)
    *earlier, event = full_book.events()
    assert earlier == before
    assert (event.id, event.kind) == (len(before) + 1, kind.split()[0])
    assert event.created_at >= before[-1].created_at
    assert verify_ledger(address(full_book)) == event.id == full_book.generation


@pytest.mark.parametrize("what", SAME)
def test_a_call_that_changes_nothing_adds_no_event(full_book, what):
    with unchanged(full_book):
        SAME[what](full_book)


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_change_adds_no_event(full_book, what):
    with refused(full_book, RegistryError):
        REFUSED[what](full_book)


def test_events_have_kind_subject_and_details(full_book):
    events = [(event.id, event.kind, event.subject, event.details) for event in full_book.events()]
    sha256 = {name: full_book.record(f"{name}:1").sha256 for name in ("strokes", "digits", "old")}
    assert events == [
        (1, "backbone", BACKBONE["fingerprint"], {}),
        (2, "registered", "strokes:1", {"sha256": sha256["strokes"]}),
        (3, "registered", "digits:1", {"sha256": sha256["digits"]}),
        (4, "registered", "old:1", {"sha256": sha256["old"]}),
        (5, "retired", "old:1", {"reason": "superseded"}),
        (6, "alias", "digits@production", {"before": None, "version": 1}),
        (7, "evaluated", "digits:1", {"data": "d" * 64}),
        (8, "golden", "digits:1", {"numerics": "m" * 64}),
        (9, "tagged", "digits:1", {"tag": "shop"}),
    ]


def test_events_of_a_name_are_those_of_its_versions_and_aliases(full_book):
    keep(full_book, a_task("digits-2", 5))
    assert [event.id for event in full_book.events("digits")] == [3, 6, 7, 8, 9]
    assert [event.id for event in full_book.events("digits-2")] == [10]
    assert full_book.events("digit") == full_book.events("d%") == full_book.events("digits_2") == []


def test_events_come_in_pages(full_book):
    def ids(**options: object) -> list[int]:
        return [event.id for event in full_book.events(**options)]

    assert ids(after=6) == [7, 8, 9]
    assert ids(limit=2) == [8, 9]
    assert ids(name="digits", after=3, limit=3) == [7, 8, 9]
    assert ids(after=9) == []


def test_the_author_is_the_user_who_opened_the_registry(book):
    with Registry.open(address(book), user="ada@lab") as opened:
        keep(opened, a_task())
        opened.retire("digits")
    keep(book, a_task(seed=1), new_version=True)
    names = [event.created_by for event in book.events()]
    assert names[1:3] == ["ada@lab"] * 2
    assert "ada@lab" not in (names[0], names[3])
    assert [record.created_by for record in book.tasks()] == [names[3]]
    assert book.record("digits:1").created_by == "ada@lab"


@pytest.mark.parametrize(
    ("table", "sql"),
    [
        ("event", "UPDATE event SET created_by = 'mallory' WHERE id = 3"),
        ("event", "UPDATE event SET digest = 'none' WHERE id = 9"),
        ("event", "DELETE FROM event WHERE id = 9"),
        ("backbone", "UPDATE backbone SET source = 'elsewhere'"),
        ("task", "UPDATE task SET score = 0.99 WHERE name = 'digits'"),
        ("task_parent", "DELETE FROM task_parent"),
        ("evaluation", "UPDATE evaluation SET logits_digest = 'other'"),
        ("retirement", "DELETE FROM retirement"),
        ("golden", "UPDATE golden SET digest = 'other' WHERE task_id = 1"),
        ("statistics", "UPDATE statistics SET sha256 = 'other' WHERE task_id = 1"),
    ],
)
def test_a_changed_or_missing_row_breaks_the_ledger(full_book, table, sql):
    full_book.note("digits", "the last event")
    location = address(full_book)
    assert verify_ledger(location) == 10
    tamper(location, table, sql)
    with pytest.raises(AssertionError, match=r"does not verify|left out"):
        verify_ledger(location)


def test_a_changed_event_with_a_recomputed_digest_breaks_the_next_event(full_book):
    location = address(full_book)
    with reading(full_book._engine) as connection:
        query = select(schema.event).where(schema.event.c.id.in_([2, 3])).order_by(schema.event.c.id)
        before, event = connection.execute(query).all()
        written = ledger.written(connection, 3, 3).get(3, [])
    sealed = ledger.seal(before.digest, {**event._mapping, "created_by": "mallory"}, written)
    tamper(location, "event", "UPDATE event SET created_by = 'mallory', digest = :sealed WHERE id = 3", sealed=sealed)
    with pytest.raises(AssertionError, match=r"event 4 .* does not verify"):
        verify_ledger(location)
