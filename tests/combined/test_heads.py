"""Heads in groups: the bits of each head alone, only where that is proven, whatever tasks come and go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined import CombinedModel, loaded_bytes
from addenda.combined.heads import HeadGroup, head_rows, load_head
from addenda.combined.shapes import HEAD_GROUP, head_shape
from addenda.registry import Task
from tests.support.models import backbone, bits, family, fresh_backbone, head_only, images, threads, wide_backbone
from tests.support.tasks import random_task


def layer_heads(on: FrozenBackbone, count: int, classes: int = 3, layers: int = 0, token: bool = False) -> list[Task]:
    tasks = [random_task(on, f"task-{i}", classes=classes + i % 2, seed=i, layers=layers) for i in range(count)]
    return tasks if token else [head_only(task) for task in tasks]


def groups(model: CombinedModel) -> list[HeadGroup]:
    return list(dict.fromkeys(head.group for head in model.heads if head.group is not None))


def without_groups(monkeypatch: pytest.MonkeyPatch, on: FrozenBackbone, tasks: list[Task], picture: Tensor) -> dict:
    with monkeypatch.context() as patch:
        patch.setattr("addenda.combined.selftest.SelfTest.proven_group", lambda self, shape: False)
        model = CombinedModel(on, tasks)
    assert not groups(model)
    return {name: bits(logits) for name, logits in model(picture).items()}


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("layers", [0, 5], ids=["full", "low rank"])
@pytest.mark.parametrize("token", [False, True], ids=["head-only", "token"])
def test_a_group_of_heads_has_the_bits_of_each_alone(
    token: bool, layers: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on, tasks = backbone(), layer_heads(backbone(), HEAD_GROUP + 3, layers=layers, token=token)
    with threads(num_threads):
        model = CombinedModel(on, tasks)
        assert len(groups(model)) == len(model.shapes.heads) == 1
        for count in (1, 9):
            logits = model(images(count))
            expected = without_groups(monkeypatch, on, tasks, images(count))
            assert {name: bits(each) for name, each in logits.items()} == expected
            assert all(
                each.is_contiguous() and each.untyped_storage().nbytes() == each.nbytes for each in logits.values()
            )


def test_a_group_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    on, original = fresh_backbone(), HeadGroup.__call__

    def biased(self: HeadGroup, *inputs: Tensor) -> Tensor:
        logits = original(self, *inputs).clone()
        logits[-1, 2, 1] *= 1 + 2**-20
        return logits

    monkeypatch.setattr(HeadGroup, "__call__", biased)
    tasks = layer_heads(on, HEAD_GROUP)
    model = CombinedModel(on, tasks)
    assert not model.shapes.heads
    assert not groups(model)


def test_a_subset_and_a_model_that_lost_a_task_compute_the_remaining_heads_alone() -> None:
    on, tasks = backbone(), layer_heads(backbone(), 2 * HEAD_GROUP)
    model, picture = CombinedModel(on, tasks), images(2)
    expected = {name: bits(logits) for name, logits in model(picture).items()}
    names = [task.name for task in tasks[1 : HEAD_GROUP + 2]]
    assert {name: bits(logits) for name, logits in model(picture, names).items()} == {n: expected[n] for n in names}
    fewer = model.with_tasks(tasks[1:])
    assert groups(fewer) == groups(model)[1:]
    assert {name: bits(logits) for name, logits in fewer(picture).items()} == {
        name: each for name, each in expected.items() if name != tasks[0].name
    }
    assert loaded_bytes(fewer) < loaded_bytes(model)
    assert all(head.weight.untyped_storage().nbytes() == head.weight.nbytes for head in fewer.heads[: HEAD_GROUP - 1])
    again = fewer.with_tasks(tasks)
    assert groups(model)[1] in groups(again)
    assert len(groups(again)) == 2
    assert {name: bits(logits) for name, logits in again(picture).items()} == expected


def test_a_joining_task_leaves_complete_groups_as_they_are() -> None:
    on, tasks = backbone(), layer_heads(backbone(), 2 * HEAD_GROUP)
    model = CombinedModel(on, tasks[:-1])
    (before,) = groups(model)
    joined = groups(model.with_tasks(tasks))
    assert joined[0] is before
    assert len(joined) == 2


def test_only_small_heads_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    tasks = layer_heads(on, HEAD_GROUP)
    monkeypatch.setattr("addenda.combined.selftest.MAX_GROUPED_WEIGHTS", head_shape(tasks[0]).num_weights - 1)
    assert not groups(CombinedModel(on, tasks))


def test_a_groups_memory_is_not_doubled() -> None:
    on, tasks = backbone(), layer_heads(backbone(), HEAD_GROUP)
    model = CombinedModel(on, tasks)
    storages = {head.layer_weight.untyped_storage().data_ptr() for head in model.heads}
    assert len(storages) == 1


@pytest.mark.parametrize("name", ["five", "nine", "layers", "low-rank-layers", "layers-only", "head-only"])
def test_a_heads_shape_is_that_of_its_tensors(name: str) -> None:
    on = backbone()
    task = family(on)[name]
    head, shape = load_head(on, task), head_shape(task)
    weights = [head.weight, head.pooled_weight, head.layer_down, head.layer_weight]
    assert head.shape == shape
    assert shape.num_weights == sum(each.numel() for each in weights if each is not None)
    assert (head.weight.shape, len(head.bias)) == ((shape.rows, shape.width), shape.rows)
    assert len(head.layer_down if head.layer_down is not None else ()) == shape.rank


def test_labels_beyond_a_tasks_own_are_not_returned() -> None:
    on = backbone()
    tasks = [replace(head_only(random_task(on, f"t{i}", classes=1 + i, seed=i))) for i in range(HEAD_GROUP)]
    logits = CombinedModel(on, tasks)(images(3))
    assert [logits[task.name].shape for task in tasks] == [torch.Size((3, 1 + i)) for i in range(HEAD_GROUP)]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_head_of_many_labels_has_the_same_bits_for_one_image_and_for_many(num_threads: int) -> None:
    on = wide_backbone(torch.float32)
    task = random_task(on, "task", classes=144, seed=1)
    assert task.pooled_weight is not None
    with threads(num_threads):
        model = CombinedModel(on, [task])
        assert bits(model(images(1))["task"]) == bits(model(images(9))["task"])[:1]


def test_heads_read_contiguous_rows_however_a_feature_lies_in_memory() -> None:
    on = backbone()
    tokens = torch.randn(8, 4, on.embed_dim, generator=torch.Generator().manual_seed(0))
    for count in (8, 4):
        rows = head_rows(tokens[:count, 0], on)
        assert rows.is_contiguous()
        assert torch.equal(rows[:count], tokens[:count, 0])
        assert not rows[count:].any()
