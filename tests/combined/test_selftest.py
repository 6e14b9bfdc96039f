"""The self-test refuses machines whose bits depend on slot, neighbours or batch position, and tests shapes once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.backbones import Adapter, FrozenBackbone, KeyValue
from addenda.backbones.family import Family
from addenda.combined import CombinedModel, forward
from addenda.combined.forward import attend
from addenda.combined.shapes import TILE, TILE_SIZES, Shapes
from addenda.exceptions import ExactnessError
from tests.support.models import alone, backbone, bits, fresh_backbone, images, random_registry, threads
from tests.support.tasks import random_task


def nudge(tensor: Tensor, where: object) -> Tensor:
    """Changes the last bits of a slice of a tensor."""
    moved = tensor.clone()
    moved[where] *= 1 + 2**-20
    return moved


def perturb_finish(monkeypatch: pytest.MonkeyPatch, when: Callable[[Tensor], bool], where: object) -> None:
    """Changes the last bits of some rows in the task stream's blocks."""
    original = Family.finish

    def biased(self: Family, block: object, tokens: Tensor, *rest: object) -> Tensor:
        result = original(self, block, tokens, *rest)
        return nudge(result, where) if when(tokens) else result

    monkeypatch.setattr(Family, "finish", biased)


def test_bits_that_depend_on_the_slot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    perturb_finish(monkeypatch, lambda tokens: len(tokens) == TILE, 5)
    with pytest.raises(
        ExactnessError,
        match=r"Exact mode is refused .* tiles of 16 slots by 8 images, 1 private tokens and 8 memory keys\. Another",
    ):
        CombinedModel(on, [random_task(on, "task")])


def test_bits_that_depend_on_the_neighbour_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()

    def leaky(scale: float, queries: Tensor, frozen: KeyValue, *private: object) -> Tensor:
        return attend(scale, queries + 1e-6 * queries.roll(1, 0), frozen, *private)

    monkeypatch.setattr(forward, "attend", leaky)
    with pytest.raises(ExactnessError, match="its neighbours"):
        CombinedModel(on, [random_task(on, "task")])


def test_an_adapter_that_reaches_the_neighbour_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    original = Adapter.__call__
    monkeypatch.setattr(Adapter, "__call__", lambda self, x: original(self, x) + 1e-6 * original(self, x).roll(1, 0))
    CombinedModel(on, [random_task(on, "plain")])
    with pytest.raises(ExactnessError, match=r"its neighbours .* 1 private tokens and 8 memory keys, rank 4\. Another"):
        CombinedModel(on, [random_task(on, "adapted", rank=3)])


@pytest.mark.parametrize("position", [0, 7])
def test_frozen_bits_that_depend_on_the_position_are_refused(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    original = FrozenBackbone.embed
    monkeypatch.setattr(FrozenBackbone, "embed", lambda self, pictures: nudge(original(self, pictures), position))
    with pytest.raises(ExactnessError, match="keys and values depend on its position in a batch of 8"):
        CombinedModel(on, [random_task(on, "task")])


def test_a_head_whose_bits_depend_on_the_position_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    original = F.linear

    def biased(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return nudge(original(inputs, weight, bias), 1)

    for module in ("model", "selftest"):  # which would detect it too
        monkeypatch.setattr(f"addenda.combined.{module}.operations_sample", bytes)
    CombinedModel(on, [random_task(on, "narrow", classes=3)])
    monkeypatch.setattr("addenda.combined.heads.F.linear", biased)
    with pytest.raises(ExactnessError, match="a head of 32 rows on 8 images"):
        CombinedModel(on, [random_task(on, "wide", classes=20)])


def test_a_size_that_gives_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    perturb_finish(monkeypatch, lambda tokens: len(tokens) == 64, 0)
    tasks = [random_task(on, f"task-{i}", seed=i) for i in range(70)]
    model = CombinedModel(on, tasks)
    assert model.shapes.slots == tuple(size for size in TILE_SIZES if size != 64) != TILE_SIZES
    sizes = [len(tile.class_tokens) for tile in model.layout.tiles]
    assert sum(sizes) >= 70
    assert set(sizes) <= set(model.shapes.slots)
    logits = model(images(2))
    assert all(bits(logits[task.name]) == alone(on, task, images(2)) for task in tasks[::9])


def test_one_image_runs_alone_only_if_that_was_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    task = random_task(on, "task")
    proven = CombinedModel(on, [task]).shapes.images
    if proven != (1, 4, 8):
        pytest.skip(f"on this machine, batches of one and eight images give different bits: {proven}")
    other = fresh_backbone()
    original = FrozenBackbone.embed
    monkeypatch.setattr(
        FrozenBackbone,
        "embed",
        lambda self, pictures: nudge(original(self, pictures), 0) if len(pictures) == 1 else original(self, pictures),
    )
    model = CombinedModel(other, [dataclasses.replace(task, backbone=other.fingerprint)])
    assert model.shapes.images == (4, 8)
    assert bits(model(images(1))["task"]) == bits(model(images(4))["task"])[:1]


def test_in_bfloat16_only_canonical_shapes_are_used() -> None:
    """There, rounding hides nearly every difference in the order of additions, so a few images prove nothing."""
    on = backbone("plain", torch.bfloat16)
    model = CombinedModel(on, [random_task(on, "task")])
    assert model.shapes == Shapes((model.micro_batch,), (TILE,))
    assert [len(tile.class_tokens) for tile in model.layout.tiles] == [TILE]


@pytest.mark.slow
def test_inexact_mode_tests_and_pads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    tasks = random_registry(on, 20, seed=8)
    exact = CombinedModel(on, tasks)
    perturb_finish(monkeypatch, lambda tokens: True, 0)
    other = fresh_backbone()
    with pytest.raises(ExactnessError):
        CombinedModel(other, tasks)
    inexact = CombinedModel(other, tasks, exact=False)
    outputs, expected = inexact(images(5)), exact(images(5))
    assert (outputs.exact, expected.exact) == (False, True)
    assert all((outputs[name] - logits).abs().max() <= 1e-4 * logits.abs().max() for name, logits in expected.items())
    sizes = [len(tile.class_tokens) for tile in inexact.layout.tiles]
    assert sum(sizes) == sum(task.class_token is not None for task in tasks)


def test_a_shape_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    CombinedModel(on, [random_task(on, "task", memory=5)])
    batches: list[int] = []
    original = FrozenBackbone.embed
    monkeypatch.setattr(
        FrozenBackbone, "embed", lambda self, batch: batches.append(len(batch)) or original(self, batch)
    )
    CombinedModel(on, [random_task(on, "other", memory=7, classes=9)])
    assert batches == []
    with threads(torch.get_num_threads() + 1):
        CombinedModel(on, [random_task(on, "other", memory=7)])
    assert batches == [8, 8, 1, 1, 4, 4]


def test_a_head_is_tested_with_and_without_a_pooled_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    original = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *inputs: nudge(original(*inputs), 1))
    CombinedModel(on, [random_task(on, "token-only", pooled=False)])
    with pytest.raises(ExactnessError, match="a head of 16 rows on 8 images"):
        CombinedModel(on, [random_task(on, "both")])
