"""A learning run: what the validation split selects, and which tasks are extended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from addenda import CombinedModel, FrozenBackbone, LearnConfig, Learner, Registry, Task
from addenda.combined import golden
from addenda.learner import ActivationCache, Augmentation, trainer
from addenda.learner.activations import Activations
from addenda.learner.context import Epoch
from addenda.learner.data import open_images
from addenda.learner.learn_config import AUTO_RANK
from addenda.learner.learning_run import MAX_TRIED_PARENTS, fused, pays, promising
from addenda.learner.objectives import objective_of
from addenda.learner.probes import LinearHead
from tests.learner.test_learner import CountingDataset, noise
from tests.support.tasks import random_task


def register(registry: Registry, backbone: FrozenBackbone, *tasks: Task) -> None:
    registry.add_backbone(backbone.record())
    for task in tasks:
        registry.register(task, golden(backbone, task))


def labelled_by(backbone: FrozenBackbone, teacher: Task, count: int = 320) -> CountingDataset:
    """Images of noise whose class is whether a logit of one task is above its median."""
    images = noise(count)[0] - 0.0
    feature = CombinedModel(backbone, [teacher])(images)[teacher.name]
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
    features = activations_of(tiny, CountingDataset(images, targets), tmp_path, budget_gb).features(tasks)
    expected = CombinedModel(tiny, tasks)(images)
    for task, feature in zip(tasks, features, strict=True):
        logits = feature @ task.head_weight.T + task.head_bias
        # The activations are cached in half precision.
        assert (logits - expected[task.name]).abs().max() < 5e-3 * expected[task.name].abs().max()


@pytest.mark.slow
def test_tasks_are_ranked_by_what_their_features_add_to_the_linear_probe(tiny: FrozenBackbone, tmp_path: Path) -> None:
    pool = [random_task(tiny, f"task-{i}", seed=10 + i) for i in range(6)]
    data = labelled_by(tiny, random_task(tiny, "teacher", seed=3, pooled=False))
    activations = activations_of(tiny, data, tmp_path, None)
    pooled, targets = activations.pooled, activations.targets
    train, validation = torch.arange(240), torch.arange(240, 320)
    probe = objective_of(targets[train]).fit_linear_probe(pooled[train], targets[train], 1.0)

    def validation_loss(features: torch.Tensor) -> float:
        x, y = features.double().numpy(), targets.numpy()
        reference = LogisticRegression(C=1.0, solver="newton-cg", tol=1e-8).fit(x[:240], y[:240])
        return log_loss(y[240:], reference.predict_proba(x[240:]))

    losses = [validation_loss(torch.cat([pooled, feature], dim=1)) for feature in activations.features(pool)]
    better = sorted(loss for loss in losses if loss < validation_loss(pooled))
    assert len(better) > MAX_TRIED_PARENTS
    ranked = promising(activations, pool, probe, train, validation)
    assert [losses[pool.index(task)] for task in ranked] == better[:MAX_TRIED_PARENTS]
    assert promising(activations, [], probe, train, validation) == []

    objective, weights = objective_of(targets), torch.linspace(0.1, 4.0, len(probe.weight))

    def weighted_loss(feature: torch.Tensor) -> float:
        both = torch.cat([pooled, feature], dim=1)
        fitted = objective.fit_linear_probe(both[train], targets[train], 1.0, len(weights), weights)
        logits = both[validation] @ fitted.weight.T + fitted.bias
        return objective.loss(logits, targets[validation]).item()

    losses = [weighted_loss(feature) for feature in activations.features(pool)]
    ranked = promising(activations, pool, probe, train, validation, weights)
    assert [pool.index(task) for task in ranked] == sorted(range(6), key=losses.__getitem__)[: len(ranked)]
    assert ranked != promising(activations, pool, probe, train, validation)


@pytest.mark.slow
def test_extends_auto_takes_the_task_that_helps_and_records_what_was_tried(
    tiny: FrozenBackbone, registry: Registry
) -> None:
    teacher = random_task(tiny, "teacher", memory=8, seed=3, pooled=False, classes=2)
    register(registry, tiny, random_task(tiny, "other", seed=10), teacher)
    config = LearnConfig(epochs=6, batch_size=16, extends="auto", layer_head=False, refit=False)
    task = Learner(tiny, registry).learn("new", labelled_by(tiny, teacher), config=config)
    tried = task.metrics["extensions"]
    assert [row["task"] for row in tried if row["taken"]] == list(task.extends) == ["teacher:1"]
    assert task.config["extends"] == "auto"


def test_extends_auto_takes_nothing_if_nothing_is_registered_or_helps(tiny: FrozenBackbone, registry: Registry) -> None:
    images, targets = noise(48)
    images[:, 0] += 20 * targets[:, None, None]  # easy without any other task
    learner = Learner(tiny, registry)
    config = LearnConfig(optimizer="sgd", epochs=1, extends="auto", learning_rate=0.1)
    first = learner.learn("first", CountingDataset(images, targets), config=config)
    assert (first.extends, first.metrics["extensions"]) == ((), [])
    register(registry, tiny, random_task(tiny, "other", seed=10))
    second = learner.learn("second", CountingDataset(images.flip(0), targets.flip(0)), config=config)
    assert second.extends == ()
    generation = registry.generation
    assert learner.learn("first", CountingDataset(images, targets), config=config).sha256 == first.sha256
    assert registry.generation == generation  # further tasks in the pool do not make it another run


def easy(count: int = 48) -> CountingDataset:
    """Images whose class is their brightness, which no token predicts better than a probe."""
    images, targets = noise(count)
    images[:, 0] += 20 * targets[:, None, None]
    return CountingDataset(images, targets)


@pytest.mark.slow
def test_a_search_that_cannot_pay_ends_after_a_third_of_its_epochs(
    tiny: FrozenBackbone, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LearnConfig(epochs=18, batch_size=16, optimizer="sgd", learning_rate=(0.5, 1.0))
    task = Learner(tiny, registry).learn("new", easy(), config=config)
    assert len(task.metrics["curves"]) == 6
    assert {row["stopped"] for row in task.metrics["candidates"]} == {"hopeless"}

    kept = Learner(tiny, registry).learn("kept", easy(), config=replace(config, fall_back=False))
    assert len(kept.metrics["curves"]) == 18
    monkeypatch.setattr(trainer, "MIN_TRIAL_EPOCHS", 18)
    whole = Learner(tiny, registry).learn("whole", easy(), config=config)
    assert len(whole.metrics["curves"]) == 18
    for name in ("head_weight", "layer_weight", "head_bias"):
        assert torch.equal(getattr(whole, name), getattr(task, name))


@pytest.mark.slow
@pytest.mark.parametrize("interrupted_after", [5, 6])
def test_a_resumed_search_ends_where_the_uninterrupted_one_does(
    tiny: FrozenBackbone, tmp_path: Path, interrupted_after: int
) -> None:
    def interrupt(epoch: Epoch) -> None:
        if epoch.epoch == interrupted_after:
            raise KeyboardInterrupt

    def learner(name: str) -> Learner:
        return Learner(tiny, Registry.open(tmp_path / f"{name}.db"), ActivationCache(tmp_path / name))

    config = LearnConfig(epochs=18, batch_size=16, optimizer="sgd", learning_rate=1.0)
    with pytest.raises(KeyboardInterrupt):
        learner("interrupted").learn("new", easy(), config=config, on_epoch=interrupt)
    resumed = learner("interrupted").learn("new", easy(), config=config)
    assert len(resumed.metrics["curves"]) == 6
    assert resumed.metrics == learner("uninterrupted").learn("new", easy(), config=config).metrics


@pytest.mark.slow
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


def test_a_costlier_option_must_win_by_more_than_a_standard_error() -> None:
    cheap = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pays(cheap - 0.5, cheap)
    assert not pays(cheap, cheap)
    assert not pays(cheap + torch.tensor([-3.0, 1.0, 1.0, 0.5]), cheap)  # one image decides
    assert not pays(cheap[:1] - 1, cheap[:1])


def test_a_dropped_token_leaves_no_adapters(tiny: FrozenBackbone, registry: Registry) -> None:
    images, targets = noise(48)
    images[:, 0] += 20 * targets[:, None, None]
    config = LearnConfig(optimizer="sgd", epochs=1, learning_rate=1.0, adapter_rank=4)
    task = Learner(tiny, registry).learn("new", CountingDataset(images, targets), config=config)
    assert (task.metrics["chosen"], task.adapters) == (None, None)


@pytest.mark.parametrize("classes", [3, 70])  # with more than 64 the layer weight is two factors
def test_a_fused_task_has_the_logits_of_token_and_probe_added(classes: int) -> None:
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64)

    feature, pooled, layers = draw(5, 8), draw(5, 8), draw(5, 12)
    token = {"head_weight": draw(classes, 8), "pooled_weight": draw(classes, 8), "head_bias": draw(classes)}
    probe = LinearHead(draw(classes), draw(classes, 8), draw(classes, 12))
    expected = feature @ token["head_weight"].T + pooled @ token["pooled_weight"].T + token["head_bias"]
    alone = fused({**token, "memory": draw(2)}, 0.5, None)
    assert alone.keys() == {*token, "memory"}
    both = fused(token, 0.5, probe)
    rows = layers @ both["layer_down"].double().T if "layer_down" in both else layers
    logits = feature @ both["head_weight"].T + pooled @ both["pooled_weight"].T + both["head_bias"]
    torch.testing.assert_close(
        logits + rows @ both["layer_weight"].double().T, 0.5 * expected + probe(pooled, layers), rtol=0, atol=1e-4
    )
