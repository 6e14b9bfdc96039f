"""Probes: closed-form discriminants, cross-validation of their shrinkage, and sums of heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from addenda.learner import probes
from addenda.learner.objectives import MultiLabel, SingleLabel, single_label
from addenda.learner.objectives.single_label import SHRINKAGES
from addenda.learner.probes import (
    LayerFeatures,
    LinearHead,
    ProbeRecipe,
    Space,
    as_tensors,
    best_weight,
    from_linear_probe,
    out_of_fold,
    sharpness,
)


def data(num_images: int = 40, num_features: int = 60, num_classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around separable class means; one feature is constant and one has a large scale."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.arange(num_images) % num_classes
    means = torch.randn(num_classes, num_features, generator=random)
    features = means[targets] + torch.randn(num_images, num_features, generator=random)
    features[:, 0], features[:, 1] = 7.0, 1000 * features[:, 1]
    return features, targets


def standardised(features: Tensor) -> Tensor:
    x = features.double()
    variance = x.var(0, correction=0)
    return (x - x.mean(0)) / (variance + 1e-6 * variance.mean()).sqrt() / x.shape[1] ** 0.5


def discriminants(z: Tensor, targets: Tensor, num_classes: int, num_features: int) -> list[tuple[Tensor, Tensor]]:
    return SingleLabel().fit_layers(z, targets, num_classes, num_features)


def test_coordinates_keep_every_inner_product() -> None:
    features, _ = data()
    z = Space.of(features).coordinates(features)
    assert z.shape[1] <= len(features)
    torch.testing.assert_close(z @ z.T, standardised(features) @ standardised(features).T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_images", [40, 200])  # fewer and more than there are features
@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 0.95])
def test_a_discriminant_is_that_of_the_full_shrunken_covariance(
    num_images: int, shrinkage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_label, "SHRINKAGES", [shrinkage])
    features, targets = data(num_images)
    x, space = standardised(features), Space.of(features)
    means = torch.stack([x[targets == label].mean(0) for label in range(3)])
    centred = x - means[targets]
    covariance = centred.T @ centred / len(x)
    identity = torch.eye(x.shape[1], dtype=torch.float64) * covariance.trace() / x.shape[1]
    weight = torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * identity, means.T).T
    expected = x @ weight.T - 0.5 * (weight * means).sum(1)
    ((space_weight, bias),) = discriminants(space.coordinates(features), targets, 3, x.shape[1])
    logits = space.head(space_weight, bias)(torch.zeros(len(x), 1), features)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_many_images_are_fitted_in_the_space_that_a_sample_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = data(400)
    monkeypatch.setattr(probes, "MAX_ROWS", 30)
    monkeypatch.setattr(single_label, "SHRINKAGES", [0.1])
    space = Space.of(features)
    z = space.coordinates(features)
    assert z.shape[1] <= 30
    ((weight, bias),) = discriminants(z, targets, 3, features.shape[1])
    logits = space.head(weight, bias)(torch.zeros(len(features), 1), features)
    torch.testing.assert_close(logits, z @ weight.T + bias, rtol=0, atol=1e-6)
    assert SingleLabel().accuracy(logits, targets) > 0.95


@pytest.mark.parametrize("targets", [[0, 1, 2], [0, 0, 0, 1], [2, 2, 2, 2]])
def test_a_class_of_one_image_or_none_makes_no_nan(targets: list[int]) -> None:
    features, _ = data(len(targets))
    z = Space.of(features).coordinates(features)
    for weight, bias in discriminants(z, torch.tensor(targets), 3, 60):
        assert weight.isfinite().all()
        assert bias.isfinite().all()


def test_one_image_of_each_class_is_classified_by_the_nearest_mean() -> None:
    features, targets = data(3)
    z = Space.of(features).coordinates(features)
    ((weight, bias), *_) = discriminants(z, targets, 3, 60)
    assert (z @ weight.T + bias).argmax(1).tolist() == [0, 1, 2]


def test_identical_features_make_no_nan() -> None:
    space = Space.of(torch.ones(6, 5))
    z = space.coordinates(torch.ones(6, 5))
    for weight, bias in discriminants(z, torch.tensor([0, 1] * 3), 2, 5):
        assert space.head(weight, bias)(torch.zeros(6, 1), torch.ones(6, 5)).isfinite().all()


def test_folds_are_stratified_by_class() -> None:
    classes = torch.tensor([0] * 23 + [1] * 11 + [2])
    fold = SingleLabel().folds(classes, seed=3)
    for label, most in ((0, 5), (1, 3), (2, 1)):
        counts = fold[classes == label].bincount(minlength=5)
        assert counts.max() <= most
        assert counts.max() - counts.min() <= 1
    assert torch.equal(fold, SingleLabel().folds(classes, seed=3))
    assert not torch.equal(fold, SingleLabel().folds(classes, seed=4))


def test_a_group_is_in_one_fold() -> None:
    groups = [f"video {i // 4}" for i in range(80)]
    fold = SingleLabel().folds(torch.arange(80) % 3, seed=0, groups=groups)
    assert fold.unique().tolist() == [0, 1, 2, 3, 4]
    assert {len(fold[i : i + 4].unique()) for i in range(0, 80, 4)} == {1}


def test_every_image_gets_logits_of_a_fit_that_did_not_see_it() -> None:
    fold = SingleLabel().folds(torch.zeros(12, dtype=torch.int64), seed=0)
    held_out_sets: list[set[int]] = []

    def fit(rows: Tensor, held_out: Tensor) -> list[Tensor]:
        assert not set(rows.tolist()) & set(held_out.tolist())
        assert len(rows) + len(held_out) == 12
        held_out_sets.append(set(held_out.tolist()))
        return [held_out.double().unsqueeze(1), -held_out.double().unsqueeze(1)]

    first, second = out_of_fold(fold, 1, fit)
    assert torch.equal(first[:, 0], torch.arange(12).double())
    assert torch.equal(second, -first)
    assert len(held_out_sets) == 5


def test_adding_and_scaling_heads_adds_and_scales_their_logits() -> None:
    random = torch.Generator().manual_seed(0)
    pooled, layers = torch.randn(7, 4, generator=random), torch.randn(7, 9, generator=random)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    first = LinearHead(drawn(3), drawn(3, 4))
    second = LinearHead(drawn(3), None, drawn(3, 9))
    expected = 0.25 * first(pooled, layers) + 0.75 * second(pooled, layers)
    torch.testing.assert_close((first * 0.25 + second * 0.75)(pooled, layers), expected)


@pytest.mark.parametrize("objective", [SingleLabel(), MultiLabel()])
def test_the_better_of_two_heads_gets_the_weight(objective: SingleLabel | MultiLabel) -> None:
    random = torch.Generator().manual_seed(1)
    targets = torch.arange(60) % 3
    truth = torch.eye(3, dtype=torch.float64)[targets]
    good, noise = 4 * truth - 2, torch.randn(60, 3, generator=random, dtype=torch.float64)
    if isinstance(objective, MultiLabel):
        targets = truth.bool()
    assert best_weight(objective, good, 3 * noise, targets) == 0
    assert best_weight(objective, 3 * noise, good, targets) == 1
    assert 0 < best_weight(objective, good / 2 + 2 * noise, good / 2 - 2 * noise, targets) < 1


@pytest.mark.parametrize("views", [1, 3])
def test_a_layer_probe_follows_its_recipe(views: int) -> None:
    features, targets = data(60)
    random = torch.Generator().manual_seed(2)
    layers = features + 0.5 * torch.randn(views, *features.shape, generator=random)
    pooled, objective = torch.randn(60, 4, generator=random), SingleLabel()
    layer_features = LayerFeatures(objective, layers, targets, 3)
    recipe = layer_features.choose_recipe(pooled, 0.1, 0)
    assert recipe.weight > 0.5  # the pooled feature is noise
    probe = from_linear_probe(objective.fit_linear_probe(pooled, targets, 0.1))
    head = layer_features.probe(recipe, probe)
    fitted_views = layers if recipe.fit >= len(SHRINKAGES) else layers[:1]
    assert recipe.fit < len(SHRINKAGES) * min(views, 2)
    space = Space.of(layers.flatten(0, 1))
    z = space.coordinates(fitted_views.flatten(0, 1))
    fits = discriminants(z, targets.repeat(len(fitted_views)), 3, features.shape[1])
    fit = fits[recipe.fit % len(SHRINKAGES)]
    linear = probe * recipe.sharpness[0]
    expected = linear * (1 - recipe.weight) + space.head(*fit) * (recipe.sharpness[1] * recipe.weight)
    torch.testing.assert_close(head(pooled, features), expected(pooled, features))


@pytest.mark.parametrize("num_images", [30, 300])
def test_the_confidence_of_all_correct_predictions_is_bounded_by_their_number(num_images: int) -> None:
    targets = torch.arange(num_images) % 3
    correct = torch.eye(3, dtype=torch.float64)[targets]
    confidence = (sharpness(SingleLabel(), correct, targets) * correct).softmax(1).max(1).values
    assert confidence.mean().item() == pytest.approx(1 - 2 / 3 / num_images, abs=1e-4)


def test_random_views_are_used_if_they_help_on_unaugmented_images() -> None:
    features, targets = data(60)
    random = torch.Generator().manual_seed(2)
    pooled = torch.zeros(60, 4)
    helpful = torch.stack([features, *(data(60, seed=0)[0] + 0.8 * torch.randn(60, 60, generator=random),) * 3])
    harmful = torch.stack([features, features[torch.randperm(60, generator=random)]])
    assert LayerFeatures(SingleLabel(), helpful, targets, 3).choose_recipe(pooled, 0.1, 0).fit >= len(SHRINKAGES)
    assert LayerFeatures(SingleLabel(), harmful, targets, 3).choose_recipe(pooled, 0.1, 0).fit < len(SHRINKAGES)


def test_with_many_classes_a_layer_head_is_stored_as_two_factors() -> None:
    features, targets = data(400, 300, 80)
    layers, pooled, objective = features.unsqueeze(0), features[:, 2:7], SingleLabel()
    recipe = ProbeRecipe(3, (0.1, 1.0), 0.75)
    linear = from_linear_probe(objective.fit_linear_probe(pooled, targets, 0.1))
    head = LayerFeatures(objective, layers, targets, 80).probe(recipe, linear)
    tensors = as_tensors(head)
    assert tensors["layer_weight"].shape == (80, 64)
    assert tensors["layer_down"].shape == (64, 300)
    product = tensors["layer_weight"].double() @ tensors["layer_down"].double()
    torch.testing.assert_close(product, head.layer_weight, rtol=0, atol=1e-5 * product.abs().max().item())
    assert objective.accuracy(head(pooled, features), targets) > 0.95
    assert "layer_down" not in as_tensors(LinearHead(torch.zeros(3).double(), product[:3, :4], product[:3]))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_linear_probe_has_logits_of_classes_without_training_images(num_classes: int) -> None:
    features, targets = data(30)
    present = targets < num_classes - 1
    probe = SingleLabel().fit_linear_probe(features[present], targets[present], 0.1, num_classes)
    logits = features @ probe.weight.T + probe.bias
    assert logits.shape == (30, num_classes)
    assert (logits[present].argmax(1) == targets[present]).all()
    assert probe.bias[-1] == pytest.approx(-math.log(int(present.sum())))


def test_sharpness_minimises_the_loss() -> None:
    random = torch.Generator().manual_seed(1)
    targets = torch.arange(300) % 3
    logits = torch.eye(3, dtype=torch.float64)[targets] + torch.randn(300, 3, generator=random, dtype=torch.float64)
    objective = SingleLabel()
    factor = sharpness(objective, 1e-3 * logits, targets)
    losses = [objective.loss(1e-3 * logits * factor * change, targets, 1 / 300).item() for change in (0.9, 1, 1.1)]
    assert losses[1] == min(losses)
    assert sharpness(objective, logits, targets) == pytest.approx(factor / 1000, rel=1e-3)
