"""A learning run: what validation chooses, and which tasks are extended, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from addenda import CombinedModel, FrozenBackbone, LearnConfig, Learner, Registry, Task
from addenda.combined import golden
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.activations import Activations
from addenda.learner.data import open_images
from addenda.learner.learn_config import AUTO_RANK
from addenda.learner.learning_run import TRIED, pays, promising
from addenda.learner.objectives import objective_of
from tests.learner.test_learner import CountingDataset, noise
from tests.support.tasks import random_task


def keep(registry: Registry, backbone: FrozenBackbone, *tasks: Task) -> None:
    registry.add_backbone(backbone.record())
    for task in tasks:
        registry.register(task, golden(backbone, task))


def told_by(backbone: FrozenBackbone, teller: Task, count: int = 320) -> CountingDataset:
    """Images of noise whose class is the sign of what one task's token sees, and no more."""
    images = noise(count)[0] - 0.0
    feature = CombinedModel(backbone, [teller])(images)[teller.name]
    return CountingDataset(images, (feature[:, 0] > feature[:, 0].median()).long())


def activations_of(
    backbone: FrozenBackbone, data: CountingDataset, cache: Path, budget_gb: float | None
) -> Activations:
    return Activations(backbone, open_images(data), Augmentation(), ActivationCache(cache, budget_gb))


@pytest.mark.parametrize("budget_gb", [None, 0.0])
def test_a_tasks_features_over_the_images_are_those_of_the_combined_model(
    tiny: FrozenBackbone, tmp_path: Path, budget_gb: float | None
) -> None:
    images, targets = noise(21)
    tasks = [random_task(tiny, f"task-{i}", memory=i, seed=i, pooled=False) for i in range(3)]
    tasks.append(random_task(tiny, "child", parents=(tasks[0],), pooled=False))
    found = activations_of(tiny, CountingDataset(images, targets), tmp_path, budget_gb).features(tasks)
    expected = CombinedModel(tiny, tasks)(images)
    for task, feature in zip(tasks, found, strict=True):
        logits = feature @ task.head_weight.T + task.head_bias
        assert (logits - expected[task.name]).abs().max() < 5e-3 * expected[task.name].abs().max()  # kept in half


def test_tasks_are_ranked_by_what_their_features_add_to_the_regression(tiny: FrozenBackbone, tmp_path: Path) -> None:
    pool = [random_task(tiny, f"task-{i}", seed=10 + i) for i in range(6)]
    found = activations_of(tiny, told_by(tiny, random_task(tiny, "teller", seed=3, pooled=False)), tmp_path, None)
    train, validation = torch.arange(240), torch.arange(240, 320)
    fitted = objective_of(found.targets[train]).fit_linear_probe(found.pooled[train], found.targets[train], 1.0)

    def reached(features: torch.Tensor) -> float:
        x, y = features.double().numpy(), found.targets.numpy()
        other = LogisticRegression(C=1.0, solver="newton-cg", tol=1e-8).fit(x[:240], y[:240])
        return log_loss(y[240:], other.predict_proba(x[240:]))

    losses = [reached(torch.cat([found.pooled, feature], dim=1)) for feature in found.features(pool)]
    better = sorted(loss for loss in losses if loss < reached(found.pooled))
    assert len(better) > TRIED
    ranked = promising(found, pool, fitted, train, validation)
    assert [losses[pool.index(task)] for task in ranked] == better[:TRIED]
    assert promising(found, [], fitted, train, validation) == []


@pytest.mark.slow
def test_extends_auto_takes_the_task_that_helps_and_says_what_was_tried(
    tiny: FrozenBackbone, registry: Registry
) -> None:
    teller = random_task(tiny, "teller", memory=8, seed=3, pooled=False, classes=2)
    keep(registry, tiny, random_task(tiny, "other", seed=10), teller)
    config = LearnConfig(epochs=6, batch_size=16, extends="auto", refit=False)
    task = Learner(tiny, registry).learn("new", told_by(tiny, teller), config=config)
    tried = task.metrics["extensions"]
    assert [row["task"] for row in tried if row["taken"]] == list(task.extends)
    assert "teller:1" in [row["task"] for row in tried]
    assert task.config["extends"] == "auto"


def test_extends_auto_takes_nothing_where_nothing_is_registered_or_helps(
    tiny: FrozenBackbone, registry: Registry
) -> None:
    images, targets = noise(48)
    images[:, 0] += 20 * targets[:, None, None]  # plain to see without any other task
    learner = Learner(tiny, registry)
    config = LearnConfig(optimizer="sgd", epochs=1, extends="auto", learning_rate=0.1)
    first = learner.learn("first", CountingDataset(images, targets), config=config)
    assert (first.extends, first.metrics["extensions"]) == ((), [])
    keep(registry, tiny, random_task(tiny, "other", seed=10))
    second = learner.learn("second", CountingDataset(images.flip(0), targets.flip(0)), config=config)
    assert second.extends == ()
    generation = registry.generation
    assert learner.learn("first", CountingDataset(images, targets), config=config).sha256 == first.sha256
    assert registry.generation == generation  # more tasks to extend do not make it another run


@pytest.mark.parametrize("fall_back", [True, False])
def test_adapter_rank_auto_tries_adapters_beside_none(
    tiny: FrozenBackbone, registry: Registry, fall_back: bool
) -> None:
    config = LearnConfig(
        optimizer="sgd", epochs=2, batch_size=16, adapter_rank="auto", learning_rate=0.1, fall_back=fall_back
    )
    task = Learner(tiny, registry).learn("new", CountingDataset(*noise(48)), config=config)
    assert {row["adapter_rank"] for row in task.metrics["candidates"]} == {0, AUTO_RANK}
    chosen = task.metrics["chosen"]
    assert task.adapter_rank == (0 if chosen is None else chosen["adapter_rank"])


def test_what_costs_more_must_be_better_by_more_than_chance() -> None:
    cheap = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pays(cheap - 0.5, cheap)
    assert not pays(cheap, cheap)
    assert not pays(cheap + torch.tensor([-3.0, 1.0, 1.0, 0.5]), cheap)  # one image decides
    assert not pays(cheap[:1] - 1, cheap[:1])


def test_a_silenced_token_carries_no_adapters(tiny: FrozenBackbone, registry: Registry) -> None:
    images, targets = noise(48)
    images[:, 0] += 20 * targets[:, None, None]
    config = LearnConfig(optimizer="sgd", epochs=1, learning_rate=1.0, adapter_rank=4)
    task = Learner(tiny, registry).learn("new", CountingDataset(images, targets), config=config)
    assert (task.metrics["chosen"], task.adapters) == (None, None)
