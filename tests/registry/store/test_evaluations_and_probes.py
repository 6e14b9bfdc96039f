"""Evaluations and golden probes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from addenda.exceptions import RegistryError
from tests.support.databases import refused
from tests.support.registries import a_task, keep, probe


def test_evaluations_come_back_oldest_first(book):
    keep(book, a_task())
    book.set_alias("digits", "production", 1)
    added = [book.add_evaluation("digits@production", "d" * 64, "n" * 64, {"accuracy": a}, "l") for a in (0.5, 0.25)]
    stored = book.evaluations("digits")
    assert stored == added
    assert [(e.task, e.metrics["accuracy"], e.generation) for e in stored] == [
        ("digits:1", 0.5, 4),
        ("digits:1", 0.25, 5),
    ]
    assert (stored[0].data_fingerprint, stored[0].numerics_fingerprint, stored[0].logits_digest) == (
        "d" * 64,
        "n" * 64,
        "l",
    )


def test_a_golden_probe_comes_back_bit_for_bit(book):
    task = a_task()
    keep(book, task)
    [stored] = book.goldens("digits")
    original = probe(task)
    assert torch.equal(stored.logits, original.logits)
    assert (stored.digest, stored.numerics, stored.numerics_fingerprint) == (
        original.digest,
        {"torch": "any"},
        "n" * 64,
    )


def test_a_golden_probe_of_other_labels_is_refused(shared_book):
    with refused(shared_book, RegistryError, match="'digits' has 3 labels; its golden probe has 2 columns"):
        shared_book.register(a_task(), replace(probe(a_task()), logits=torch.zeros(4, 2)))


def test_a_golden_probe_with_a_wrong_digest_is_refused(shared_book):
    with refused(shared_book, RegistryError, match="golden probe"):
        shared_book.register(a_task(), replace(probe(a_task()), digest="0" * 64))


@pytest.mark.parametrize("field", ["config", "metrics", "data"])
@pytest.mark.parametrize("value", [float("nan"), Path("x")], ids=["nan", "path"])
def test_a_value_that_json_cannot_hold_is_refused(shared_book, field, value):
    with refused(shared_book, RegistryError, match="Task 'digits' was not registered"):
        keep(shared_book, a_task(**{field: {"value": value}}))


def test_a_probe_under_other_numerics_is_added(book):
    keep(book, a_task())
    book.add_golden("digits", probe(a_task(), "m" * 64))
    assert [golden.numerics_fingerprint for golden in book.goldens("digits")] == ["m" * 64, "n" * 64]
    with refused(book, RegistryError, match="'digits:1' has 3 labels; its golden probe has 2 columns"):
        book.add_golden("digits", replace(probe(a_task(), "o" * 64), logits=torch.zeros(4, 2)))
    with refused(book, RegistryError, match="does not match its digest"):
        book.add_golden("digits", replace(probe(a_task(), "o" * 64), digest="0" * 64))
