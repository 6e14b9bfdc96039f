"""Routing statistics are stored bit for bit, checked against their task, and damage is detected."""

from __future__ import annotations

import pytest
import torch

from addenda.exceptions import IntegrityError, RegistryError, UnknownTaskError
from tests.support.databases import refused, tamper
from tests.support.registries import a_statistic, a_task, keep, probe


def test_statistics_come_back_bit_for_bit(book):
    task, vectors = a_task(), {"layer_lengths": torch.rand(2), "layer_directions": torch.randn(16)}
    original = a_statistic(**vectors, digests=torch.arange(15))
    book.register(task, probe(task), original)
    stored = book.statistics("digits:1")
    assert stored.sha256 == original.sha256
    assert list(stored.tensors) == list(original.tensors)
    for name, tensor in original.tensors.items():
        assert stored.tensors[name].numpy().tobytes() == tensor.numpy().tobytes()
    assert book.record("digits").statistics_bytes == len(original.data)


def test_a_task_without_statistics_has_none(book):
    task = a_task()
    book.register(task, probe(task))
    assert book.statistics("digits") is None
    with pytest.raises(UnknownTaskError, match="'cats'"):
        book.statistics("cats")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": torch.ones(2, dtype=torch.long)}, r"do not fit 3 classes or each other: .*'counts': \[2\]"),
        ({"gram": torch.ones(14)}, r"do not fit .*'gram': \[14\]"),
        ({"sample_targets": torch.ones(5, dtype=torch.long)}, r"do not fit .*'sample_targets': \[5\]"),
        ({"sums": torch.full((3, 9), torch.nan)}, "sums must be finite float32"),
        ({"sample_targets": torch.full((6,), 3)}, "negative counts or classes out of range"),
        ({"counts": torch.tensor([1, 1, -1])}, "negative counts or classes out of range"),
        ({"layer_gram": torch.ones(4)}, r"do not fit .*'layer_gram': \[4\]"),
        ({"layer_directions": torch.ones(4, 4)}, r"do not fit .*'layer_directions': \[4, 4\]"),
        ({"layer_sums": None, "layer_lengths": torch.ones(2)}, r"do not fit .*'layer_lengths': \[2\]"),
        ({"digests": torch.arange(14)}, r"do not fit .*'digests': \[14\]"),
        ({"digests": torch.ones(15)}, "digests must be int64"),
        ({"layer_sample": torch.full((6, 3), torch.nan)}, "layer_sample must be finite float32"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_and_nothing_is_registered(shared_book, changes, message):
    task = a_task()
    with refused(shared_book, IntegrityError, match=message):
        shared_book.register(task, probe(task), a_statistic(**changes))


def test_statistics_that_are_too_large_are_refused_and_nothing_is_registered(shared_book):
    task, targets = a_task(), torch.zeros(320_000, dtype=torch.long)
    large = a_statistic(sample=torch.zeros(320_000, 4), sample_targets=targets, layer_sample=torch.zeros(320_000, 1))
    with refused(shared_book, RegistryError, match=r"3 classes have [0-9,]+ bytes; the maximum is 5,000,000"):
        shared_book.register(task, probe(task), large)


@pytest.mark.parametrize("cut", [0, 40])
def test_statistics_whose_bytes_have_changed_are_refused(book, cut):
    keep(book, a_task())
    data = a_statistic().data
    tamper(book, "statistics", "UPDATE statistics SET data = :data", data=data[:-1] + b"?" if cut == 0 else data[:cut])
    with pytest.raises(
        IntegrityError, match="Task 'digits:1' cannot be used for routing: its statistics' stored bytes have"
    ):
        book.statistics("digits")
    assert book.get("digits").ref == "digits:1"
