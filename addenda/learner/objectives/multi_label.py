"""Multi-label objective: any number of labels per image, with a sigmoid for each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision, binary_calibration_error, binary_f1_score

from addenda.combined.predictions import LIKELY
from addenda.learner.objectives.objective import (
    CERTAIN,
    STRENGTHS,
    Array,
    LayerFits,
    MultiHot,
    Objective,
    Weights,
    fit_logistic,
)
from addenda.registry import probabilities

LAYER_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""Values of scikit-learn's C for logistic regression on layer features, whose rows have norms of about 1."""


class MultiLabel(Objective):
    """Targets are multi-hot, Bool[N, C]."""

    name = "multi-label"
    learns_from_views = False  # logistic regressions per label take far longer than linear discriminants
    routable = False

    def has_form(self, targets: Tensor) -> bool:
        """Whether targets are multi-hot."""
        return targets.ndim == 2 and targets.dtype == torch.bool

    def counts(self, targets: MultiHot, num_classes: int) -> Int[Tensor, " C"]:
        """The number of images with each label."""
        return targets.sum(0)

    def label_text(self, target: Sequence[bool], labels: Sequence[str]) -> str:
        """The sorted labels of one target, as JSON."""
        return json.dumps(sorted(label for label, has in zip(labels, target, strict=True) if has))

    def reordered(self, targets: Bool[Tensor, "N c"], order: Int[Tensor, " c"], num_classes: int) -> MultiHot:
        """Targets with reordered columns; new labels are absent from every image."""
        reordered = torch.zeros(len(targets), num_classes, dtype=torch.bool, device="cpu")
        reordered[:, order] = targets
        return reordered

    def too_common(self, counts: Sequence[int], num_images: int) -> list[int]:
        """Labels that fewer than two images lack."""
        return [label for label, count in enumerate(counts) if count > num_images - 2]

    def losses(
        self, logits: Float[Tensor, "*S N C"], targets: MultiHot, smoothing: float = 0.0, class_weights: Weights = None
    ) -> Float[Tensor, "*S N"]:
        """Binary cross-entropy, summed over the labels of an image.

        It is a sum rather than a mean so that the gradient of a head row does not shrink with the number of labels, and
        a penalty has the same relative weight as with cross-entropy.
        """
        truth = targets.to(logits.dtype)
        smooth = truth * (1 - smoothing) + smoothing / 2
        if class_weights is None:
            class_weights = logits.new_ones(2, logits.shape[-1])
        absent, present = class_weights
        losses: Tensor = -present * smooth * F.logsigmoid(logits) - absent * (1 - smooth) * F.logsigmoid(-logits)
        return losses.sum(-1)

    def balanced_weights(self, targets: MultiHot, num_classes: int) -> Float[Tensor, "2 C"]:
        """Balances presence against absence for each label."""
        total, counts = len(targets), targets.sum(0)
        return total / (2 * torch.stack([total - counts, counts]).clamp(min=1).float())

    def accuracy(self, logits: Float[Tensor, "N C"], targets: MultiHot) -> float:
        """The share of correct predictions over all images and labels."""
        return ((logits >= 0) == targets).float().mean().item()

    def score(self, logits: Float[Tensor, "N C"], targets: MultiHot, labels: Sequence[str]) -> dict[str, Any]:
        """Mean average precision, F1 at probability 0.5, exact match and calibration error.

        Means are over the labels that some image has; the average precision of other labels is None. `exact_match` is
        the share of images with every label correct. `calibration_error` is the expected calibration error in 15 bins,
        over all images and labels.
        """
        logits, targets = logits.cpu(), targets.cpu()
        chance, truth = probabilities(logits, self.name), targets.int()
        predicted = chance >= LIKELY
        precision: dict[str, float | None] = dict.fromkeys(labels)
        f1 = []
        for i in targets.any(0).nonzero().flatten().tolist():
            precision[labels[i]] = binary_average_precision(_ranks(logits[:, i]), truth[:, i]).item()
            f1.append(binary_f1_score(predicted[:, i].int(), truth[:, i]).item())
        known = [value for value in precision.values() if value is not None]
        return {
            "mean_average_precision": sum(known) / len(known) if known else None,
            "f1_micro": binary_f1_score(predicted.int().flatten(), truth.flatten()).item() if known else None,
            "f1_macro": sum(f1) / len(f1) if f1 else None,
            "exact_match": (predicted == targets).all(1).float().mean().item(),
            "calibration_error": binary_calibration_error(chance.flatten().clamp(max=CERTAIN), truth.flatten()).item(),
            "per_class": precision,
            "num_images": len(targets),
        }

    def has_label(self, targets: MultiHot, label: int) -> Bool[Tensor, " N"]:
        """Which images have a label."""
        return targets[:, label]

    def fit_layers(
        self,
        z: Float64[Tensor, "N k"],
        targets: MultiHot,
        num_classes: int,
        num_features: int,
        class_weights: Weights = None,
    ) -> LayerFits:
        """A logistic regression per label, for each of LAYER_STRENGTHS."""
        models, heads = _Logistic(num_classes, None if class_weights is None else class_weights.double().numpy()), []
        for strength in LAYER_STRENGTHS:
            weight, bias = models.fit(z.numpy(), targets.numpy(), strength)
            heads.append((torch.from_numpy(weight), torch.from_numpy(bias)))
        return heads

    def _fold_losses(
        self, x: Array, y: NDArray[Any], folds: Sequence[NDArray[np.bool_]], class_weights: Array | None
    ) -> Iterator[float]:
        """Mean loss over all labels, which share one C; each fit starts from the previous solution."""
        models = [_Logistic(y.shape[1], class_weights) for _ in folds]
        for strength in STRENGTHS:
            total = 0.0
            for held_out, model in zip(folds, models, strict=True):
                weights, biases = model.fit(x[~held_out], y[~held_out], strength)
                for has, weight, bias in zip(y[held_out].T, weights, biases, strict=True):
                    margin = x[held_out] @ weight + bias
                    total += np.logaddexp(0, np.where(has, -margin, margin)).sum()
            yield total / y.size

    def _fit(
        self, x: Array, y: NDArray[Any], strength: float, num_classes: int | None, class_weights: Array | None
    ) -> tuple[Array, Array]:
        return _Logistic(y.shape[1], class_weights).fit(x, y, strength)


class _Logistic:
    """A logistic regression for each label; each fit starts from the solution of the previous one.

    `class_weights` has the weights of absence and presence of each label.

    A label that every image has, or none, gets weight 0 and a bias that gives it the probability
    (images with it + 1) / (images + 2), Laplace's rule of succession.
    """

    def __init__(self, num_labels: int, class_weights: Array | None) -> None:
        self._weights = class_weights
        self._models: list[LogisticRegression | None] = [None] * num_labels

    def fit(self, x: Array, y: NDArray[np.bool_], strength: float) -> tuple[Array, Array]:
        weight, bias = np.zeros((y.shape[1], x.shape[1])), np.zeros(y.shape[1])
        for label, has in enumerate(y.T):
            if has.all() or not has.any():
                bias[label] = math.log((has.sum() + 1) / ((~has).sum() + 1))
                continue
            weights = None if self._weights is None else np.where(has, self._weights[1, label], self._weights[0, label])
            self._models[label] = model = fit_logistic(x, has, strength, self._models[label], weights)
            weight[label], bias[label] = model.coef_[0], model.intercept_[0]
        return weight, bias


def _ranks(logits: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The ranks of logits, in 0..1: the sigmoids of large logits are all 1, which would lose their order."""
    order: Tensor = torch.unique(logits, return_inverse=True)[1]
    return order.double() / len(logits)
