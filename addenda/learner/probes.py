"""Probes: heads on frozen features, fitted in closed form or by convex optimisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from addenda.learner.objectives import Groups, LayerFits, LinearProbe, Objective, Targets, Weights

EIGHTHS = tuple(i / 8 for i in range(9))
"""Candidate weights for the second of two heads in their sum."""
MAX_ROWS = 1536
"""Maximum number of images whose features span the space of a fit; the cost is cubic in it."""
MAX_RANK = 64
"""Maximum rank of a layer head; with more classes it is stored and computed as two factors."""
VARIANCE_FLOOR = 1e-6
"""Share of the mean variance added to every feature's variance; it avoids division by zero for constant features."""


@dataclass(frozen=True)
class LinearHead:
    """A linear head: pooled @ pooled_weight.T + layers @ layer_weight.T + bias; a weight of None counts as zero."""

    bias: Float64[Tensor, " C"]
    pooled_weight: Float64[Tensor, "C D"] | None = None
    layer_weight: Float64[Tensor, "C n"] | None = None

    def __call__(self, pooled: Float[Tensor, "N D"], layers: Float[Tensor, "N n"]) -> Float64[Tensor, "N C"]:
        """Computes logits in float64."""
        logits = self.bias.expand(len(pooled), -1)
        for features, weight in ((pooled, self.pooled_weight), (layers, self.layer_weight)):
            if weight is not None:
                logits = logits + features.double() @ weight.T
        return logits

    def __mul__(self, factor: float) -> LinearHead:
        scaled = (None if weight is None else factor * weight for weight in (self.pooled_weight, self.layer_weight))
        return LinearHead(factor * self.bias, *scaled)

    def __add__(self, other: LinearHead) -> LinearHead:
        pairs = ((self.pooled_weight, other.pooled_weight), (self.layer_weight, other.layer_weight))
        return LinearHead(self.bias + other.bias, *(a if b is None else b if a is None else a + b for a, b in pairs))


@dataclass(frozen=True)
class Space:
    """Low-dimensional coordinates of standardised features: x @ basis.T, where x = (features - mean) / scale.

    The basis is orthonormal, so a fit to the coordinates equals a fit to x for rotation-invariant penalties such as
    shrinkage towards the identity and the L2 penalty of logistic regression.
    """

    mean: Float64[Tensor, " n"]
    scale: Float64[Tensor, " n"]
    basis: Float64[Tensor, "k n"]

    @classmethod
    def of(cls, features: Float[Tensor, "N n"]) -> Space:
        """Builds the space that the features of some images span; their rows must be ordered by image content."""
        x = features.double()
        mean, variance = x.mean(0), x.var(0, correction=0)
        scale = (variance + VARIANCE_FLOOR * variance.mean()).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        scale = scale * math.sqrt(len(scale))
        sample = (subsample(x) - mean) / scale
        values, vectors = torch.linalg.eigh(sample @ sample.T)
        nonzero = values > values[-1].clamp(min=1e-300) * 1e-12
        return cls(mean, scale, (vectors[:, nonzero] / values[nonzero].sqrt()).T @ sample)

    def coordinates(self, features: Float[Tensor, "N n"]) -> Float64[Tensor, "N k"]:
        """Computes the coordinates of some images."""
        return torch.cat([((chunk.double() - self.mean) / self.scale) @ self.basis.T for chunk in features.split(1024)])

    def head(self, weight: Float64[Tensor, "C k"], bias: Float64[Tensor, " C"]) -> LinearHead:
        """Converts a head on the coordinates to a head on the layer features."""
        layer_weight = weight @ self.basis / self.scale
        return LinearHead(bias - layer_weight @ self.mean, None, layer_weight)


def subsample(rows: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "M ..."]:
    """Takes every k-th row, with the smallest k that leaves at most MAX_ROWS."""
    return rows[:: -(-len(rows) // MAX_ROWS)]


def sharpness(objective: Objective, logits: Float64[Tensor, "N C"], targets: Targets) -> float:
    """Returns the factor (inverse temperature) that minimises the log loss of out-of-fold logits.

    The targets are smoothed as if one image of all had a random label; otherwise the factor would be unbounded when
    every prediction is correct.
    """
    return 1 / objective.least_loss_temperature(logits, targets, (1e-6, 1e6), 1 / len(logits))


def best_weight(
    objective: Objective, first: Float64[Tensor, "N C"], second: Float64[Tensor, "N C"], targets: Targets,
    weights: Sequence[float] = EIGHTHS,
) -> float:  # fmt: skip
    """Returns the weight w that minimises the log loss of (1 - w) * first + w * second."""
    return min(weights, key=lambda w: objective.loss((1 - w) * first + w * second, targets).item())


def out_of_fold(
    fold: Int[Tensor, " N"], num_classes: int, fit: Callable[[Tensor, Tensor], Sequence[Float64[Tensor, "M C"]]]
) -> list[Float64[Tensor, "N C"]]:
    """Returns cross-validated logits: each image's logits are from a fit that did not see its fold.

    Args:
        fold: the fold of each image.
        num_classes: C.
        fit: function of the rows to fit to and the held-out rows that returns the held-out logits of one or more
            models, the same number for each fold.
    """
    logits: list[Tensor] = []
    for number in fold.unique().tolist():
        held_out = (fold == number).nonzero()[:, 0]
        fold_logits = fit((fold != number).nonzero()[:, 0], held_out)
        logits = logits or [torch.zeros(len(fold), num_classes, dtype=torch.float64, device="cpu") for _ in fold_logits]
        for of_model, of_fold in zip(logits, fold_logits, strict=True):
            of_model[held_out] = of_fold
    return logits


@dataclass(frozen=True)
class ProbeRecipe:
    """How to fit a layer probe: chosen by cross-validation, then used for the training split and for all images."""

    fit: int  # index into the fits to the layer features
    sharpness: tuple[float, float]  # factors of the linear probe's logits and of the fit's
    weight: float  # of the fit's logits in the sum


class LayerFeatures:
    """The layer features of some images in V views, in the space that they span; view 0 is the unaugmented image."""

    def __init__(
        self,
        objective: Objective,
        layers: Float[Tensor, "V N n"],
        targets: Targets,
        num_classes: int,
        class_weights: Weights = None,
    ) -> None:
        self._objective, self._targets, self._num_classes = objective, targets, num_classes
        self._class_weights = class_weights
        flat = layers.flatten(0, 1)
        self._space = Space.of(flat)
        self._z = self._space.coordinates(flat).unflatten(0, layers.shape[:2])

    def choose_recipe(
        self, pooled: Float[Tensor, "N D"], strength: float, seed: int, groups: Groups = None
    ) -> ProbeRecipe:
        """Chooses the recipe of a layer probe by cross-validated log loss on unaugmented images.

        All views of an image are in the same fold.
        """
        objective, targets, num_classes = self._objective, self._targets, self._num_classes
        fold = objective.folds(targets, seed, groups)

        def fit_linear(rows: Tensor, held_out: Tensor) -> list[Tensor]:
            probe = objective.fit_linear_probe(pooled[rows], targets[rows], strength, num_classes, self._class_weights)
            return [pooled[held_out].double() @ probe.weight.double().T + probe.bias.double()]

        def fit_layers(rows: Tensor, held_out: Tensor) -> list[Tensor]:
            return [self._z[0, held_out] @ weight.T + bias for weight, bias in self._fits(rows)]

        (linear,), tried = out_of_fold(fold, num_classes, fit_linear), out_of_fold(fold, num_classes, fit_layers)
        linear_factor = sharpness(objective, linear, targets)
        factors = [sharpness(objective, logits, targets) for logits in tried]
        scaled = [logits * factor for logits, factor in zip(tried, factors, strict=True)]
        losses = [objective.loss(logits, targets).item() for logits in scaled]
        best = losses.index(min(losses))
        weight = best_weight(objective, linear * linear_factor, scaled[best], targets)
        return ProbeRecipe(best, (linear_factor, factors[best]), weight)

    def probe(self, recipe: ProbeRecipe, linear: LinearHead) -> LinearHead:
        """Adds a linear probe and a fit to the layer features, with the factors and the weight of a recipe."""
        linear_factor, layer_factor = recipe.sharpness
        linear = linear * (linear_factor * (1 - recipe.weight))
        if not recipe.weight:
            return linear
        weight, bias = self._fits(slice(None))[recipe.fit]
        weight, bias = limited_rank(weight, bias, self._z[0])
        return linear + self._space.head(weight, bias) * (layer_factor * recipe.weight)

    def _fits(self, rows: Tensor | slice) -> LayerFits:
        """The objective's fits to the unaugmented images of some rows, then its fits to all views."""
        z, targets, num_features = self._z[:, rows], self._targets[rows], len(self._space.mean)
        fits = []
        for num_views in sorted({1, len(z) if self._objective.learns_from_views else 1}):
            flat, flat_targets = z[:num_views].flatten(0, 1), torch.cat([targets] * num_views)
            fits += self._objective.fit_layers(flat, flat_targets, self._num_classes, num_features, self._class_weights)
        return fits


def limited_rank(
    weight: Float64[Tensor, "C k"], bias: Float64[Tensor, " C"], points: Float64[Tensor, "N k"]
) -> tuple[Float64[Tensor, "C k"], Float64[Tensor, " C"]]:
    """Projects the logits of over MAX_RANK classes onto the directions in which the points' logits vary most."""
    if len(weight) <= MAX_RANK:
        return weight, bias
    logits = points @ weight.T
    _, _, directions = torch.linalg.svd(logits - logits.mean(0), full_matrices=False)
    projection = directions[:MAX_RANK].T @ directions[:MAX_RANK]
    bias = bias + (weight - projection @ weight) @ points.mean(0)
    return projection @ weight, bias


def from_linear_probe(probe: LinearProbe) -> LinearHead:
    """Converts a linear probe to a head in float64."""
    return LinearHead(probe.bias.double(), probe.weight.double())


def as_tensors(head: LinearHead) -> dict[str, Any]:
    """Converts a head to a task's float32 tensors; with over MAX_RANK classes the layer weight becomes two factors."""
    assert head.pooled_weight is not None
    tensors = {"head_weight": head.pooled_weight, "head_bias": head.bias, "layer_weight": head.layer_weight}
    if head.layer_weight is not None and len(head.bias) > MAX_RANK:
        left, values, right = torch.linalg.svd(head.layer_weight, full_matrices=False)
        roots = values[:MAX_RANK].sqrt()
        tensors["layer_weight"] = left[:, :MAX_RANK] * roots
        tensors["layer_down"] = roots.unsqueeze(1) * right[:MAX_RANK]
    return {name: tensor.float() for name, tensor in tensors.items() if tensor is not None}
