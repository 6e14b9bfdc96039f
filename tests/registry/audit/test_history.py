"""A scoring is equal to the one before it to the last digit, or has a named reason, or is called unexplained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from addenda.exceptions import UnknownTaskError
from addenda.registry import Golden, Registry, Scored, canonical_json, digest
from tests.support.databases import Database
from tests.support.registries import BACKBONE, a_task, keep, probe

OLD, NEW = {"torch": "2.14.1", "threads": 1}, {"torch": "2.15.0", "threads": 1}
UNKNOWN = "u" * 64
FACES, CATS = "f" * 64, "c" * 64


def name_of(numerics: dict[str, Any]) -> str:
    return digest(canonical_json(numerics).encode())


@pytest.fixture
def book(database: Database) -> Iterator[Registry]:
    """A task of two versions; numerics of which the golden probes of yet another task tell."""
    with Registry.open(database.new()) as opened:
        opened.add_backbone(BACKBONE)
        keep(opened, a_task("digits", 1))
        keep(opened, a_task("digits", 2), new_version=True)
        other = a_task("other", 3)
        made = probe(other)
        for numerics in (OLD, NEW):
            golden = Golden(numerics, name_of(numerics), made.logits, made.digest)
            if numerics is OLD:
                opened.register(other, golden)
            else:
                opened.add_golden("other", golden)
        yield opened


def score(
    book: Registry, ref: str = "digits:1", on: str = FACES, under: Any = OLD, accuracy: float = 0.5, logits: str = "a"
) -> int:
    fingerprint = under if isinstance(under, str) else name_of(under)
    return book.add_evaluation(ref, on, fingerprint, {"accuracy": accuracy, "num_images": 8}, 64 * logits).event_id


def verdicts(found: list[Scored]) -> list[str]:
    return [scored.verdict for scored in found]


def test_scorings_are_given_data_by_data_and_on_each_the_oldest_first(book):
    for ref, on in (
        ("digits:1", FACES),
        ("digits:1", CATS),
        ("digits:2", FACES),
        ("other:1", FACES),
        ("digits:1", FACES),
    ):
        score(book, ref, on)
    found = book.history("digits")
    assert [(scored.evaluation.task, scored.evaluation.data_fingerprint) for scored in found] == [
        ("digits:1", FACES), ("digits:2", FACES), ("digits:1", FACES), ("digits:1", CATS),
    ]  # fmt: skip
    assert verdicts(found) == ["first", "another version", "equal", "first"]
    assert found[2].evaluation == book.evaluations("digits:1")[-1]
    assert [scored.against for scored in found] == [None, None, found[0].evaluation.event_id, None]


def test_equal_bits_and_figures_are_equal_whatever_the_numerics(book):
    for under in (OLD, OLD, NEW, UNKNOWN):
        score(book, under=under)
    found = book.history("digits")
    assert verdicts(found) == ["first", "equal", "equal", "equal"]
    assert found[1].reason == "to the last digit and bit"
    assert found[2].reason == "to the last digit and bit, under other numerics"


def test_other_numerics_are_named_by_what_changed(book):
    score(book)
    score(book, under=NEW, logits="b")
    assert verdicts(book.history("digits")) == ["first", "other numerics"]
    assert book.history("digits")[1].reason == "torch 2.14.1 -> 2.15.0"


def test_numerics_that_nobody_described_are_said_to_be_unknown(book):
    score(book)
    score(book, under=UNKNOWN, logits="b")
    assert book.history("digits")[1].verdict == "other numerics"
    assert book.history("digits")[1].reason == (
        "what numerics uuuuuuuuuuuu… were is not known: no golden probe was recorded under them"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"logits": "b"}, "other logits under the same numerics: the same metrics"),
        ({"accuracy": 0.625, "logits": "b"}, "other logits under the same numerics: accuracy 0.5 -> 0.625"),
        ({"accuracy": 0.625}, "the same logits under the same numerics: accuracy 0.5 -> 0.625"),
    ],
)
def test_other_bits_or_figures_under_the_same_numerics_are_unexplained(book, change, reason):
    score(book)
    score(book, **change)
    assert verdicts(book.history("digits")) == ["first", "unexplained"]
    assert book.history("digits")[1].reason == reason


def test_a_change_is_not_hidden_by_a_scoring_under_other_numerics_between(book):
    first = score(book)
    score(book, under=NEW, logits="b")
    score(book, logits="c")
    found = book.history("digits")
    assert verdicts(found) == ["first", "other numerics", "unexplained"]
    assert found[2].against == first


def test_a_retired_name_has_a_history_and_an_unknown_one_none(book):
    score(book)
    book.retire("digits:1")
    book.retire("digits:2")
    assert verdicts(book.history("digits")) == ["first"]
    assert book.history("other") == []
    with pytest.raises(UnknownTaskError, match="'digit' is not registered"):
        book.history("digit")
