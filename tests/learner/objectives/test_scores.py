"""Metrics, compared with those of scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from addenda.learner.objectives import OBJECTIVES
from addenda.registry import headline
from addenda.terminal import PER_CLASS, SCORES

LABELS = ("a", "b", "c", "d")


def score(logits: torch.Tensor, targets: torch.Tensor, labels: Sequence[str], objective: str) -> dict[str, Any]:
    return OBJECTIVES[objective].score(logits, targets, labels)


def random_logits(seed: int = 0, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-label logits that are correct more often than not, and their targets."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, 4, generator=random) < torch.tensor([0.5, 0.3, 0.2, 0.1])
    return torch.randn(count, 4, generator=random) + 2 * targets - 1.5, targets


def test_the_keys_of_single_label_scores_are_stable() -> None:
    scores = score(torch.eye(4)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 3]), LABELS, "single-label")
    assert set(scores) == {
        "accuracy", "balanced_accuracy", "calibration_error", "per_class", "confusion", "num_images",
    }  # fmt: skip
    assert (scores["accuracy"], scores["per_class"]["d"], scores["num_images"]) == (0.75, 0.0, 4)


@pytest.mark.parametrize("seed", range(5))
def test_multi_label_scores_are_scikit_learns(seed: int) -> None:
    logits, targets = random_logits(seed)
    scores = score(logits, targets, LABELS, "multi-label")
    truth, chance, predicted = targets.numpy(), logits.sigmoid().numpy(), (logits >= 0).numpy()
    assert scores["mean_average_precision"] == pytest.approx(metrics.average_precision_score(truth, chance), abs=1e-6)
    assert scores["f1_micro"] == pytest.approx(metrics.f1_score(truth, predicted, average="micro"), abs=1e-6)
    assert scores["f1_macro"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro"), abs=1e-6)
    assert scores["exact_match"] == pytest.approx(metrics.accuracy_score(truth, predicted), abs=1e-6)
    each = metrics.average_precision_score(truth, chance, average=None)
    assert list(scores["per_class"].values()) == pytest.approx(list(each), abs=1e-6)
    assert tuple(scores["per_class"]) == LABELS
    assert scores["num_images"] == 60
    bins = np.digitize(chance.ravel(), np.linspace(0, 1, 16)[1:-1])
    gaps = [abs((chance.ravel()[bins == b] - truth.ravel()[bins == b]).sum()) for b in range(15)]
    assert scores["calibration_error"] == pytest.approx(sum(gaps) / truth.size, abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_last_bin_of_the_calibration_error_holds_what_is_certain(objective: str) -> None:
    logits = torch.tensor([[0.0, 200.0]] * 6 + [[0.0, 3.5]] * 4)  # confidences of 1 and 0.97
    classes = torch.tensor([1] * 5 + [0] + [1] * 4)
    targets = classes if objective == "single-label" else torch.stack([classes == 0, classes == 1], 1)
    logits = logits if objective == "single-label" else torch.stack([-logits[:, 1], logits[:, 1]], 1)
    confidence = (6 + 4 * torch.tensor(3.5).sigmoid().item()) / 10
    assert score(logits, targets, ("a", "b"), objective)["calibration_error"] == pytest.approx(
        confidence - 0.9, abs=1e-5
    )


def test_a_label_without_images_is_excluded_from_the_means() -> None:
    logits, targets = random_logits()
    targets[:, 1] = False
    present = [0, 2, 3]
    scores = score(logits, targets, LABELS, "multi-label")
    without = score(logits[:, present], targets[:, present], [LABELS[i] for i in present], "multi-label")
    assert scores["per_class"].pop("b") is None
    assert scores["per_class"] == without["per_class"]
    for mean in ("mean_average_precision", "f1_macro"):
        assert scores[mean] == pytest.approx(without[mean])


def test_without_any_label_the_means_are_none() -> None:
    scores = score(torch.ones(3, 2), torch.zeros(3, 2).bool(), ("a", "b"), "multi-label")
    assert scores["mean_average_precision"] is scores["f1_micro"] is scores["f1_macro"] is None
    assert scores["exact_match"] == 0


def test_a_single_label_is_scored() -> None:
    scores = score(
        torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([[True], [False], [False]]), ("a",), "multi-label"
    )
    assert (scores["mean_average_precision"], scores["exact_match"]) == (0.5, pytest.approx(2 / 3))


@settings(deadline=None, max_examples=30, database=None)
@given(shift=st.floats(-1e3, 1e3), scale=st.floats(0.01, 100))
def test_average_precision_depends_only_on_the_order_of_the_logits(shift: float, scale: float) -> None:
    logits, targets = random_logits()
    moved = score(logits.double() * scale + shift, targets, LABELS, "multi-label")
    assert moved["per_class"] == score(logits, targets, LABELS, "multi-label")["per_class"]


def test_the_displayed_metrics_of_each_objective_are_among_its_scores_and_are_json() -> None:
    logits, targets = random_logits()
    examples = {"single-label": targets.int().argmax(1).long(), "multi-label": targets}
    assert set(examples) == set(OBJECTIVES) == set(SCORES) == set(PER_CLASS)
    for objective, truth in examples.items():
        scores = score(logits, truth, LABELS, objective)
        assert 0 <= scores[headline(objective)] <= 1
        assert {headline(objective)} <= set(SCORES[objective]) <= set(scores)
        assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert headline("multi-label") == "mean_average_precision"
    assert headline("single-label") == "accuracy"
