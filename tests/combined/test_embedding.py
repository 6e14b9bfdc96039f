"""Features of images: what they are, and that their bits depend on no other image, feature or task."""

from __future__ import annotations

import pytest
import torch

from addenda import CombinedModel, FrozenBackbone, Task
from addenda.exceptions import DataError, UnknownTaskError
from tests.support.models import backbone, head_only, wide_backbone
from tests.support.tasks import random_task

EVERY = ("layers", "task:token", "pooled", "task:child", "task:head-only")


@pytest.fixture(scope="module")
def tasks(tiny: FrozenBackbone) -> list[Task]:
    return tasks_on(tiny)


def tasks_on(tiny: FrozenBackbone) -> list[Task]:
    token = random_task(tiny, "token", memory=5, layers=0)
    child = random_task(tiny, "child", memory=0, rank=4, parents=(token,), seed=2)
    alone = head_only(random_task(tiny, "head-only", seed=3))
    others = [random_task(tiny, f"other-{number}", memory=number, seed=10 + number) for number in range(5)]
    return [token, child, alone, *others]


def images_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["registers", "average", "dinov3", "wide"])
def test_features_have_the_same_bits_in_any_company(variant: str) -> None:
    on = wide_backbone(torch.float32) if variant == "wide" else backbone(variant)
    tasks, size = tasks_on(on), on.preprocessing["input_size"][1]
    model = CombinedModel(on, tasks)
    images = torch.randn(11, 3, size, size, generator=torch.Generator().manual_seed(7))
    together = model.embed(images, EVERY)
    assert tuple(together) == EVERY
    for name in EVERY:
        own = [task for task in tasks if name == f"task:{task.name}"]
        small = CombinedModel(on, own)
        for start, end in ((0, 1), (3, 4), (2, 7), (0, 11)):
            alone = small.embed(images[start:end], [name])[name]
            assert alone.dtype == torch.float32
            assert alone.numpy().tobytes() == together[name][start:end].numpy().tobytes(), (name, start, end)


@pytest.mark.slow
def test_a_tasks_feature_is_what_its_head_reads(tiny: FrozenBackbone, tasks: list[Task]) -> None:
    model, images = CombinedModel(tiny, tasks), images_of(3)
    features, logits = model.embed(images, EVERY), model(images, features=True)
    assert torch.equal(torch.cat([features["pooled"], features["layers"]], 1), logits.features), (
        "as a router reads them"
    )
    assert torch.equal(features["task:head-only"], features["pooled"])
    assert not torch.equal(features["task:token"], features["pooled"])
    for task in tasks[:3]:
        computed = features[f"task:{task.name}"] @ task.head_weight.T + task.head_bias
        if task.pooled_weight is not None:
            computed = computed + features["pooled"] @ task.pooled_weight.T
        if task.layer_weight is not None:
            computed = computed + features["layers"] @ task.layer_weight.T
        assert torch.allclose(computed, logits[task.name], atol=1e-4)


def test_an_unknown_feature_is_refused_by_name(tiny: FrozenBackbone, tasks: list[Task]) -> None:
    model, images = CombinedModel(tiny, tasks), images_of(1)
    with pytest.raises(DataError, match="There is no feature 'final'"):
        model.embed(images, ["pooled", "final"])
    with pytest.raises(DataError, match="No feature is named"):
        model.embed(images, [])
    with pytest.raises(UnknownTaskError, match="Task 'cars' is not in this model"):
        model.embed(images, ["task:cars"])
