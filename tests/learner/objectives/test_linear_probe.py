"""The linear probe: one logistic regression for a single-label task, one per label for a multi-label task."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold

from addenda.learner.objectives import LinearProbe, objective_of
from addenda.learner.objectives.objective import STRENGTHS


def choose_strength(features: torch.Tensor, targets: torch.Tensor, seed: int) -> float:
    return objective_of(targets).choose_strength(features, targets, seed)


def fit_linear_probe(features: torch.Tensor, targets: torch.Tensor, strength: float) -> LinearProbe:
    return objective_of(targets).fit_linear_probe(features, targets, strength)


def test_the_linear_probe_is_converged_and_agrees_with_another_solver() -> None:
    random = torch.Generator().manual_seed(0)
    features, targets = torch.randn(90, 6, generator=random), torch.arange(90) % 3
    features[:, 0] += targets
    for classes in (3, 2):
        rows = targets < classes
        x, y = features[rows], targets[rows]
        fitted = fit_linear_probe(x, y, 0.3)
        assert fitted.weight.shape == (classes, 6)
        ours = (x @ fitted.weight.T + fitted.bias).softmax(1)
        other = LogisticRegression(C=0.3, solver="newton-cg", tol=1e-8).fit(x.double().numpy(), y.numpy())
        assert torch.allclose(ours, torch.from_numpy(other.predict_proba(x.double().numpy())).float(), atol=1e-4)


def test_the_penalty_is_strong_for_noise_and_weak_for_signal() -> None:
    random = torch.Generator().manual_seed(0)
    targets = torch.arange(120) % 2
    noise_only = torch.randn(120, 40, generator=random)
    signal = torch.nn.functional.one_hot(targets).float() + 0.01 * torch.randn(120, 2, generator=random)
    assert choose_strength(noise_only, targets, 0) < choose_strength(signal, targets, 0)


def tagged(count: int = 120, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=random)
    targets = features[:, :3] + torch.randn(count, 3, generator=random) > torch.tensor([0.0, 0.5, 1.5])
    return features, targets


def test_each_label_has_its_own_logistic_regression() -> None:
    features, targets = tagged()
    fitted = fit_linear_probe(features, targets, 0.3)
    assert fitted.weight.shape == (3, 6)
    ours = (features @ fitted.weight.T + fitted.bias).sigmoid()
    for i in range(3):
        other = LogisticRegression(C=0.3, solver="newton-cg", tol=1e-8).fit(features.double(), targets[:, i])
        expected = torch.from_numpy(other.predict_proba(features.double())[:, 1]).float()
        assert torch.allclose(ours[:, i], expected, atol=1e-4)


def test_a_constant_label_gets_its_smoothed_frequency_as_probability() -> None:
    features, targets = tagged(8)
    targets[:, 0], targets[:, 2] = True, False
    targets[:4, 1], targets[4:, 1] = True, False
    fitted = fit_linear_probe(features, targets, 1.0)
    assert not fitted.weight[[0, 2]].any()
    assert fitted.weight[1].any()
    assert fitted.bias[[0, 2]].sigmoid().tolist() == pytest.approx([0.9, 0.1])


def reference_losses(features: torch.Tensor, targets: torch.Tensor, seed: int) -> list[float]:
    """Mean binary log loss for each strength, with every fit from scratch."""
    x, y = features.double().numpy(), targets.numpy()
    means = []
    for strength in STRENGTHS:
        chances = np.zeros(y.shape)
        for train, held_out in KFold(5, shuffle=True, random_state=seed).split(x):
            for i in range(y.shape[1]):
                seen = y[train, i]
                if seen.all() or not seen.any():
                    chances[held_out, i] = (seen.sum() + 1) / (len(seen) + 2)
                else:
                    model = LogisticRegression(C=strength, tol=1e-6, max_iter=10_000).fit(x[train], seen)
                    chances[held_out, i] = model.predict_proba(x[held_out])[:, 1]
        means.append(log_loss(y.ravel(), chances.ravel()))
    return means


@pytest.mark.parametrize("seed", range(3))
def test_the_strength_minimises_the_mean_binary_log_loss(seed: int) -> None:
    features, targets = tagged(60, width=12, seed=seed)
    expected = reference_losses(features, targets, seed)
    assert choose_strength(features, targets, seed) == STRENGTHS[int(np.argmin(expected))]


def test_labels_missing_from_a_fold_keep_the_loss_finite() -> None:
    features, targets = tagged(40)
    targets[:, 2] = False
    targets[[0, 1], 2] = True
    expected = reference_losses(features, targets, 0)
    assert all(map(math.isfinite, expected))
    assert choose_strength(features, targets, 0) == STRENGTHS[int(np.argmin(expected))]
    targets[1, 2] = False  # its only image is held out in one fold
    assert choose_strength(features, targets, 0) in STRENGTHS


def test_the_penalty_is_strong_for_noise_and_weak_for_signal_of_many_labels() -> None:
    random = torch.Generator().manual_seed(0)
    targets = torch.rand(120, 4, generator=random) < 0.5
    noise = torch.randn(120, 40, generator=random)
    signal = targets.float() + 0.01 * torch.randn(120, 4, generator=random)
    assert choose_strength(noise, targets, 0) < choose_strength(signal, targets, 0)
