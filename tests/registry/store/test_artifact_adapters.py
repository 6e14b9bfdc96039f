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


INCOMPLETE = {site: update for site, update in adapters().items() if site != "proj"}
HEAD_ONLY = {"class_token": None, "memory": None, "pooled_weight": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"adapters": adapters(rank=0)}, "do not have one rank of at least 1"),
        ({"adapters": INCOMPLETE}, r"its adapters lack \['adapters\.proj\.down', 'adapters\.proj\.up'\]: a task"),
        ({"adapters": adapters() | {"k": adapters()["q"]}}, r"has the tensors \['adapters\.fc1.*'adapters\.k\.down', "),
        ({"adapters": adapters(), **HEAD_ONLY}, "it has adapters but no class token"),
    ],
    ids=["rank 0", "half of them", "of another layer", "of a head-only task"],
)
def test_adapters_that_no_task_can_have_are_refused(content, message):
    with pytest.raises(IntegrityError, match=message):
        encode(a_task(**content))
