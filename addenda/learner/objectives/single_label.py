"""Single-label objective: one class per image, with a softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchmetrics.functional import classification as metrics

from addenda.learner.objectives.objective import (
    CERTAIN,
    STRENGTHS,
    Array,
    Classes,
    Groups,
    LayerFits,
    Objective,
    Rows,
    Weights,
    fit_logistic,
)
from addenda.registry import probabilities

SHRINKAGES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""Candidate shrinkages of the covariance towards a multiple of the identity."""


class SingleLabel(Objective):
    """Targets are class indices, Int[N]."""

    name = "single-label"
    learns_from_views = True
    routable = True

    def has_form(self, targets: Tensor) -> bool:
        """Whether targets are class indices."""
        return targets.ndim == 1 and not targets.is_floating_point()

    def counts(self, targets: Classes, num_classes: int) -> Int[Tensor, " C"]:
        """The number of images of each class."""
        return targets.bincount(minlength=num_classes)

    def label_text(self, target: int, labels: Sequence[str]) -> str:
        """The label of the class."""
        return labels[target]

    def reordered(self, targets: Classes, order: Int[Tensor, " c"], num_classes: int) -> Classes:
        """Targets with renumbered classes."""
        return order[targets]

    def split(self, targets: Classes, num_classes: int, fraction: float, seed: int, groups: Groups = None) -> Rows:
        """Rows of the training and the validation split; without groups, it is stratified by scikit-learn."""
        if groups is not None:
            return super().split(targets, num_classes, fraction, seed, groups)
        class_of, several = targets.tolist(), self.counts(targets, num_classes) > 1
        rows, num_divided = several[targets].nonzero()[:, 0].tolist(), int(several.sum())
        num_held_out = min(max(num_divided, round(fraction * len(rows))), len(rows) - num_divided)
        train, validation = train_test_split(
            rows, test_size=num_held_out, stratify=[class_of[row] for row in rows], random_state=seed
        )
        for source, destination in ((validation, train), (train, validation)):  # may lack a small class
            held = {class_of[row] for row in destination}
            for label in several.nonzero()[:, 0].tolist():
                if label not in held:
                    destination.append(next(row for row in source if class_of[row] == label))
                    source.remove(destination[-1])
        train += (~several)[targets].nonzero()[:, 0].tolist()
        first, second = (torch.tensor(rows, dtype=torch.int64, device="cpu") for rows in (train, validation))
        return first, second

    def losses(
        self, logits: Float[Tensor, "*S N C"], targets: Classes, smoothing: float = 0.0, class_weights: Weights = None
    ) -> Float[Tensor, "*S N"]:
        """Cross-entropy."""
        flat = logits.reshape(-1, logits.shape[-1])
        classes = targets.expand(logits.shape[:-1]).reshape(-1)
        each = F.cross_entropy(flat, classes, class_weights, reduction="none", label_smoothing=smoothing)
        return each.view(logits.shape[:-1])

    def balanced_weights(self, targets: Classes, num_classes: int) -> Float[Tensor, " C"]:
        """N / (C n_c) for a class with n_c of N images."""
        return len(targets) / (num_classes * self.counts(targets, num_classes).clamp(min=1).float())

    def accuracy(self, logits: Float[Tensor, "N C"], targets: Classes) -> float:
        """Top-1 accuracy."""
        return (logits.argmax(-1) == targets).float().mean().item()

    def score(self, logits: Float[Tensor, "N C"], targets: Classes, labels: Sequence[str]) -> dict[str, Any]:
        """Top-1 accuracy, balanced accuracy, expected calibration error in 15 bins, and accuracy per class.

        `per_class` is None for a class without images; `confusion` has true classes in rows, predicted ones in columns.
        """
        logits, targets, count = logits.cpu(), targets.cpu(), len(labels)
        if count == 1:  # torchmetrics requires two classes; with one, every prediction is correct
            return {
                "accuracy": 1.0, "balanced_accuracy": 1.0, "calibration_error": 0.0, "per_class": {labels[0]: 1.0},
                "confusion": [[len(targets)]], "num_images": len(targets),
            }  # fmt: skip
        chance = probabilities(logits, self.name)
        per_class = metrics.multiclass_accuracy(logits, targets, count, average="none")
        present = targets.bincount(minlength=count) > 0
        return {
            "accuracy": metrics.multiclass_accuracy(logits, targets, count, average="micro").item(),
            "balanced_accuracy": per_class[present].mean().item(),
            "calibration_error": metrics.multiclass_calibration_error(chance.clamp(max=CERTAIN), targets, count).item(),
            "per_class": {
                label: value.item() if is_present else None
                for label, value, is_present in zip(labels, per_class, present.tolist(), strict=True)
            },
            "confusion": metrics.multiclass_confusion_matrix(logits, targets, count).tolist(),
            "num_images": len(targets),
        }

    def has_label(self, targets: Classes, label: int) -> Bool[Tensor, " N"]:
        """Which images are of a class."""
        return targets == label

    def strata(self, targets: Classes) -> Classes:
        """The class of each image."""
        return targets

    def fit_layers(
        self,
        z: Float64[Tensor, "N k"],
        targets: Classes,
        num_classes: int,
        num_features: int,
        class_weights: Weights = None,
    ) -> LayerFits:
        """Linear discriminant analysis with equal priors, and so without class weights, for each s of SHRINKAGES.

        The shared covariance is (1 - s) S + s tr(S) / n I, where S is the within-class covariance and n is
        `num_features`. A class without images, as may happen in a fold, has the mean of all images. If no class has two
        images, S is 0 and the result is a nearest-mean classifier.

        Source: Friedman, "Regularized Discriminant Analysis", JASA 1989, equation 18; there with one covariance per
        class.
        """
        counts = self.counts(targets, num_classes)
        means = torch.zeros(num_classes, z.shape[1], dtype=z.dtype, device="cpu").index_add_(0, targets, z)
        means = torch.where(counts.unsqueeze(1) > 0, means / counts.clamp(min=1).unsqueeze(1), z.mean(0))
        centred = z - means[targets]
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(z))
        values = values.clamp(min=0)
        spread = values.sum() / num_features
        rotated = means @ vectors
        heads = []
        for shrinkage in SHRINKAGES:
            covariance = (1 - shrinkage) * values + shrinkage * spread if spread > 0 else torch.ones_like(values)
            weight = rotated / covariance
            heads.append((weight @ vectors.T, -0.5 * (weight * rotated).sum(1)))
        return heads

    def _fold_losses(
        self, x: Array, y: NDArray[Any], folds: Sequence[NDArray[np.bool_]], class_weights: Array | None
    ) -> Iterator[float]:
        for strength in STRENGTHS:
            total = 0.0
            for held_out in folds:
                weight, bias = self._fit(x[~held_out], y[~held_out], strength, int(y.max()) + 1, class_weights)
                logits = x[held_out] @ weight.T + bias
                total += (logsumexp(logits, axis=1) - np.take_along_axis(logits, y[held_out, None], 1)[:, 0]).sum()
            yield total / len(y)

    def _fit(
        self, x: Array, y: NDArray[Any], strength: float, num_classes: int | None, class_weights: Array | None
    ) -> tuple[Array, Array]:
        """Multinomial logistic regression; with a single class, the weight is 0.

        A class without images, as may happen in a fold, gets weight 0 and bias -log N.
        """
        present = np.unique(y)
        count = int(y.max()) + 1 if num_classes is None else num_classes
        weight, bias = np.zeros((count, x.shape[1])), np.full(count, -math.log(len(y)))
        bias[present] = 0.0
        if len(present) > 1:
            fitted = fit_logistic(x, y, strength, None, None if class_weights is None else class_weights[y])
            coef, intercept = fitted.coef_, fitted.intercept_
            if len(coef) == 1:  # scikit-learn fits two classes as one margin; half of it for each class is equivalent
                coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
            weight[present], bias[present] = coef, intercept
        return weight, bias
