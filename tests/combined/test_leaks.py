"""Planted faults: leaks between tasks and wrong masks change bits that other tests compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from addenda.backbones import BlockAdapters
from addenda.backbones.family import Family
from addenda.combined import CombinedModel, TileStore
from addenda.combined.tiles import Tile
from addenda.registry import Task
from tests.support.dense_mask import DenseMask
from tests.support.models import alone, assert_company_moves_no_bit, backbone, bits, images, lively_vit
from tests.support.tasks import random_task


def sabotage(monkeypatch: pytest.MonkeyPatch, harm: Callable[[Tile], None]) -> None:
    """Applies a fault to every new tile, and disables the self-test."""
    build = TileStore._build

    def harmed(self: TileStore, size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Tile:
        tile = build(self, size, tasks, offered)
        harm(tile)
        return tile

    monkeypatch.setattr(TileStore, "_build", harmed)
    monkeypatch.setattr("addenda.combined.selftest._equal", lambda one, other: True)


def first_slot_sees_the_last_offered_token(tile: Tile) -> None:
    tile.ancestors[0, 0] = 2


def first_slot_sees_the_next_memory(tile: Tile) -> None:
    for layer in tile.memories:
        layer.keys[0, :, -1], layer.values[0, :, -1] = layer.keys[1, :, 0], layer.values[1, :, 0]


def first_slot_has_the_next_ones_adapters(tile: Tile) -> None:
    for layer in tile.updates:
        layer.fc1.up[0] = layer.fc1.up[1]


def first_slot_has_some_of_the_next_ones_queries(tile: Tile) -> None:
    tile.updates[-1].q.down[0, -1], tile.updates[-1].q.up[0, :, -1] = (
        tile.updates[-1].q.down[1, -1],
        tile.updates[-1].q.up[1, :, -1],
    )


def padding_counts(tile: Tile) -> None:
    tile.bias.zero_()


def own_token_is_hidden(tile: Tile) -> None:
    tile.bias[:, 0] = float("-inf")


def two_families() -> tuple[Task, list[Task]]:
    """A task with two parents, and another task of the same size class."""
    on = backbone()
    kin = [random_task(on, f"kin-{i}", memory=2, seed=i) for i in range(4)]
    task = random_task(on, "task", memory=4, parents=tuple(kin[:2]), seed=7, rank=3)
    return task, [random_task(on, "other", memory=4, parents=tuple(kin[2:]), seed=8, rank=4)]


@pytest.mark.parametrize(
    "harm",
    [
        first_slot_sees_the_last_offered_token,
        first_slot_sees_the_next_memory,
        first_slot_has_the_next_ones_adapters,
        first_slot_has_some_of_the_next_ones_queries,
    ],
)
def test_a_leak_between_tasks_would_move_bits(harm: Callable[[Tile], None], monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone()
    task, company = two_families()
    assert_company_moves_no_bit(on, task, company)

    def harm_children(tile: Tile) -> None:
        if tile.ancestors.shape[1]:
            harm(tile)

    sabotage(monkeypatch, harm_children)
    with pytest.raises(AssertionError):
        assert_company_moves_no_bit(on, task, company)


@pytest.mark.parametrize("harm", [padding_counts, own_token_is_hidden])
def test_a_wrong_mask_would_differ_from_the_dense_one(
    harm: Callable[[Tile], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A padding key that counts depends on no other task, so only this test detects it."""
    on = backbone("plain", torch.float64)
    task, other = random_task(on, "task", memory=5), random_task(on, "other", memory=5, seed=1)
    expected = DenseMask(lively_vit())(images(2), [task])["task"]
    assert (CombinedModel(on, [task, other])(images(2))["task"] - expected).abs().max() <= 1e-10
    sabotage(monkeypatch, harm)
    assert (CombinedModel(on, [task, other])(images(2))["task"] - expected).abs().max() > 1e-3


def padded_rank_counts(tile: Tile) -> None:
    for layer in tile.updates:
        for down, up in layer:
            down[:, -1], up[:, :, -1] = 0.3, 0.3


def every_layer_has_the_firsts_adapters(tile: Tile) -> None:
    for layer in tile.updates:
        for (down, up), (first_down, first_up) in zip(layer, tile.updates[0], strict=True):
            down.copy_(first_down), up.copy_(first_up)


def fc2_is_not_updated(tile: Tile) -> None:
    for layer in tile.updates:
        layer.fc2.up.zero_()


@pytest.mark.parametrize("whose", ["task", "parent"])
@pytest.mark.parametrize("harm", [padded_rank_counts, every_layer_has_the_firsts_adapters, fc2_is_not_updated])
def test_wrong_adapters_would_differ_from_the_dense_mask(
    harm: Callable[[Tile], None], whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = backbone("plain", torch.float64)
    parent = random_task(on, "parent", memory=5, rank=3)
    task = parent if whose == "task" else random_task(on, "child", memory=5, parents=(parent,), seed=1)
    expected = DenseMask(lively_vit())(images(2), [task])[task.name]
    assert (CombinedModel(on, [task])(images(2))[task.name] - expected).abs().max() <= 1e-10
    sabotage(monkeypatch, harm)
    assert (CombinedModel(on, [task])(images(2))[task.name] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("whose", ["task", "parent"])
def test_adapted_keys_or_values_would_differ_from_the_dense_mask(
    part: str, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of a task's token must come from the backbone's own weights."""
    on = backbone("plain", torch.float64)
    parent = random_task(on, "parent", memory=5, rank=3)
    task = parent if whose == "task" else random_task(on, "child", memory=5, parents=(parent,), seed=1)
    expected = DenseMask(lively_vit())(images(2), [task])[task.name]
    original = Family.project

    def adapted(self: Family, block: Any, tokens: Tensor, adapters: BlockAdapters | None = None) -> object:
        projected = dict(zip(("queries", "keys", "values"), original(self, block, tokens, adapters), strict=True))
        if adapters is not None:
            update = adapters.q(block.norm1(tokens))
            projected[part] = projected[part] + update.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)
        return tuple(projected.values())

    monkeypatch.setattr(Family, "project", adapted)
    assert (CombinedModel(on, [task])(images(2))[task.name] - expected).abs().max() > 1e-3


def test_memory_shared_by_two_tasks_would_move_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone()
    task, other = random_task(on, "task", memory=5), random_task(on, "other", memory=5, seed=1)
    original = TileStore.memory
    first: dict[str, Task] = {}
    expected = alone(on, task, images(2))
    monkeypatch.setattr(TileStore, "memory", lambda self, task: original(self, first.setdefault("task", task)))
    assert bits(CombinedModel(on, [other, task])(images(2))["task"]) != expected
