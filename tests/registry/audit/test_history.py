"""An evaluation equals the previous one to the last bit, differs for a stated reason, or is called unexplained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from addenda.exceptions import UnknownTaskError
from addenda.registry import ComparedEvaluation, Golden, Registry, canonical_json, digest
from tests.support.databases import Database
from tests.support.registries import BACKBONE, a_task, keep, probe

OLD, NEW = {"torch": "2.14.1", "threads": 1}, {"torch": "2.15.0", "threads": 1}
UNKNOWN = "u" * 64
FACES, CATS = "f" * 64, "c" * 64


def name_of(numerics: dict[str, Any]) -> str:
    return digest(canonical_json(numerics).encode())


@pytest.fixture
def book(database: Database) -> Iterator[Registry]:
    """A task with two versions, and another task whose golden probes describe two numerics."""
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


def verdicts(history: list[ComparedEvaluation]) -> list[str]:
    return [compared.verdict for compared in history]


def test_evaluations_are_grouped_by_data_and_the_oldest_comes_first(book):
    for ref, on in (
        ("digits:1", FACES),
        ("digits:1", CATS),
        ("digits:2", FACES),
        ("other:1", FACES),
        ("digits:1", FACES),
    ):
        score(book, ref, on)
    history = book.history("digits")
    assert [(compared.evaluation.task, compared.evaluation.data_fingerprint) for compared in history] == [
        ("digits:1", FACES), ("digits:2", FACES), ("digits:1", FACES), ("digits:1", CATS),
    ]  # fmt: skip
    assert verdicts(history) == ["first", "another version", "equal", "first"]
    assert history[2].evaluation == book.evaluations("digits:1")[-1]
    assert [compared.against for compared in history] == [None, None, history[0].evaluation.event_id, None]


def test_equal_bits_and_metrics_are_equal_whatever_the_numerics(book):
    for under in (OLD, OLD, NEW, UNKNOWN):
        score(book, under=under)
    history = book.history("digits")
    assert verdicts(history) == ["first", "equal", "equal", "equal"]
    assert history[1].reason == "the same metrics; logits bitwise identical"
    assert history[2].reason == "the same metrics; logits bitwise identical, under other numerics"


def test_other_numerics_are_named_by_what_changed(book):
    score(book)
    score(book, under=NEW, logits="b")
    assert verdicts(book.history("digits")) == ["first", "other numerics"]
    assert book.history("digits")[1].reason == "torch 2.14.1 -> 2.15.0"


def test_numerics_without_a_golden_probe_are_reported_as_unknown(book):
    score(book)
    score(book, under=UNKNOWN, logits="b")
    assert book.history("digits")[1].verdict == "other numerics"
    assert book.history("digits")[1].reason == (
        "numerics uuuuuuuuuuuu… are unknown: no golden probe was recorded under them"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"logits": "b"}, "other logits under the same numerics: the same metrics"),
        ({"accuracy": 0.625, "logits": "b"}, "other logits under the same numerics: accuracy 0.5 -> 0.625"),
        ({"accuracy": 0.625}, "the same logits under the same numerics: accuracy 0.5 -> 0.625"),
    ],
)
def test_other_bits_or_metrics_under_the_same_numerics_are_unexplained(book, change, reason):
    score(book)
    score(book, **change)
    assert verdicts(book.history("digits")) == ["first", "unexplained"]
    assert book.history("digits")[1].reason == reason


def test_a_change_is_not_hidden_by_an_evaluation_under_other_numerics_between(book):
    first = score(book)
    score(book, under=NEW, logits="b")
    score(book, logits="c")
    history = book.history("digits")
    assert verdicts(history) == ["first", "other numerics", "unexplained"]
    assert history[2].against == first


def test_a_retired_name_has_a_history_and_an_unknown_one_none(book):
    score(book)
    book.retire("digits:1")
    book.retire("digits:2")
    assert verdicts(book.history("digits")) == ["first"]
    assert book.history("other") == []
    with pytest.raises(UnknownTaskError, match="'digit' is not registered"):
        book.history("digit")
