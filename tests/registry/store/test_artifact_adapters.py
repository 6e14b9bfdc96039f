"""Adapters in an artifact are complete, finite and of one rank, or rejected."""

from __future__ import annotations

import pytest
import torch

from addenda.exceptions import IntegrityError
from addenda.registry import ADAPTED, LowRank
from addenda.registry.store.task import encode
from tests.support.registries import a_task, adapters, keep, same_content


def test_an_adapted_task_comes_back_from_the_registry_as_it_went_in(book):
    task = a_task(adapters=adapters())
    registered = keep(book, task)
    loaded = book.get("digits")
    assert same_content(loaded, task)
    assert loaded.sha256 == registered.sha256 == task.sha256 != a_task().sha256
    assert (loaded.adapter_rank, tuple(loaded.adapters)) == (3, ADAPTED)
    assert book.record("digits").num_parameters == a_task().num_parameters + 2 * 3 * (4 * 8 + 2 * 20)
    with pytest.raises(TypeError, match="does not support item assignment"):
        loaded.adapters["q"] = None


@pytest.mark.parametrize("site", ADAPTED)
@pytest.mark.parametrize("factor", LowRank._fields)
def test_adapters_that_are_not_finite_are_refused(site, factor):
    changed = adapters()
    getattr(changed[site], factor)[1, 0, 0] = float("nan")
    with pytest.raises(IntegrityError, match=rf"its adapters\.{site}\.{factor} must be finite float32"):
        encode(a_task(adapters=changed))


@pytest.mark.parametrize(
    ("site", "down", "up"),
    [
        ("q", (2, 4, 8), (2, 8, 4)),  # another rank than the rest
        ("fc2", (2, 3, 12), (2, 8, 2)),  # two ranks
        ("proj", (3, 3, 8), (3, 8, 3)),  # another depth
        ("fc1", (2, 3, 7), (2, 12, 3)),  # another width
        ("fc1", (2, 3, 8), (2, 11, 3)),  # another hidden width than fc2's
        ("fc2", (2, 3, 12), (2, 7, 3)),
        ("q", (2, 3, 8), (2, 9, 3)),  # another width than proj's
        ("proj", (3, 8), (8, 3)),
        ("proj", (), ()),
    ],
)
def test_adapters_that_do_not_fit_are_refused(site, down, up):
    changed = {**adapters(), site: LowRank(torch.zeros(down), torch.zeros(up))}
    with pytest.raises(
        IntegrityError,
        match=r"its adapters \(down, up\) do not fit 2 layers of width 8 or each other, .* one rank .*'fc2': \[\[",
    ):
        encode(a_task(adapters=changed))


def test_the_first_layer_of_a_gated_mlp_is_twice_as_wide_as_the_second(book):
    gated = adapters() | {"fc1": LowRank(torch.zeros(2, 3, 8), torch.ones(2, 24, 3))}
    task = a_task(adapters=gated)
    keep(book, task)
    assert same_content(book.get("digits"), task)
    for outputs in (18, 36, 6):
        with pytest.raises(IntegrityError, match="do not fit 2 layers"):
            encode(a_task(adapters=gated | {"fc1": LowRank(torch.zeros(2, 3, 8), torch.ones(2, outputs, 3))}))


def test_adapters_of_rank_0_are_refused():
    with pytest.raises(IntegrityError, match="do not have one rank of at least 1"):
        encode(a_task(adapters=adapters(rank=0)))


def test_half_of_the_adapters_are_refused():
    incomplete = adapters()
    del incomplete["proj"]
    with pytest.raises(
        IntegrityError, match=r"its adapters lack \['adapters\.proj\.down', 'adapters\.proj\.up'\]: a task"
    ):
        encode(a_task(adapters=incomplete))


def test_adapters_of_another_layer_are_refused():
    with pytest.raises(IntegrityError, match=r"has the tensors \['adapters\.fc1\.down', .*'adapters\.k\.down', "):
        encode(a_task(adapters={**adapters(), "k": adapters()["q"]}))


def test_adapters_of_a_head_only_task_are_refused():
    with pytest.raises(IntegrityError, match="it has adapters but no class token"):
        encode(a_task(class_token=None, memory=None, pooled_weight=None, adapters=adapters()))
