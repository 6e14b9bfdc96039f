"""Probes: heads fitted in closed form or by convex optimisation on what the frozen network says of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from addenda.learner.objectives import Groups, LinearProbe, Objective, Targets

EIGHTHS = tuple(i / 8 for i in range(9))
"""Weights of one of two heads in their sum, to choose from."""
MAX_ROWS = 1536
"""Images whose features span the space that a fit is made in: it takes their number cubed."""
MAX_RANK = 64
"""Of a layer head: with more classes it is kept, and computed, in two factors."""
LEAST_SHARE = 1e-6
"""Of the mean variance, added to that of each feature: one that is constant says nothing, and divides by nothing."""


@dataclass(frozen=True)
class LinearHead:
    """Logits are pooled @ pooled_weight.T + layers @ layer_weight.T + bias; a weight that is None is zero."""

    bias: Float64[Tensor, " C"]
    pooled_weight: Float64[Tensor, "C D"] | None = None
    layer_weight: Float64[Tensor, "C n"] | None = None

    def __call__(self, pooled: Float[Tensor, "N D"], layers: Float[Tensor, "N n"]) -> Float64[Tensor, "N C"]:
        """Logits of some images, in float64."""
        logits = self.bias.expand(len(pooled), -1)
        for features, weight in ((pooled, self.pooled_weight), (layers, self.layer_weight)):
            if weight is not None:
                logits = logits + features.double() @ weight.T
        return logits

    def __mul__(self, factor: float) -> LinearHead:
        scaled = (None if part is None else factor * part for part in (self.pooled_weight, self.layer_weight))
        return LinearHead(factor * self.bias, *scaled)

    def __add__(self, other: LinearHead) -> LinearHead:
        pairs = ((self.pooled_weight, other.pooled_weight), (self.layer_weight, other.layer_weight))
        return LinearHead(self.bias + other.bias, *(a if b is None else b if a is None else a + b for a, b in pairs))


@dataclass(frozen=True)
class Space:
    """Standardised features in coordinates: x @ basis.T, where x = (features - mean) / scale.

    What is fitted in it is what is fitted on all of x, for penalties that do not change under rotation: shrinkage
    towards the identity, and the L2 penalty of a regression.
    """

    mean: Float64[Tensor, " n"]
    scale: Float64[Tensor, " n"]
    basis: Float64[Tensor, "k n"]

    @classmethod
    def of(cls, features: Float[Tensor, "N n"]) -> Space:
        """Of some images' features, whose rows are in an order that content decides."""
        x = features.double()
        mean, variance = x.mean(0), x.var(0, correction=0)
        scale = (variance + LEAST_SHARE * variance.mean()).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        scale = scale * math.sqrt(len(scale))
        some = (some_of(x) - mean) / scale
        values, vectors = torch.linalg.eigh(some @ some.T)
        kept = values > values[-1].clamp(min=1e-300) * 1e-12
        return cls(mean, scale, (vectors[:, kept] / values[kept].sqrt()).T @ some)

    def coordinates(self, features: Float[Tensor, "N n"]) -> Float64[Tensor, "N k"]:
        """Where some images stand."""
        return torch.cat([((part.double() - self.mean) / self.scale) @ self.basis.T for part in features.split(1024)])

    def head(self, weight: Float64[Tensor, "C k"], bias: Float64[Tensor, " C"]) -> LinearHead:
        """A head of coordinates as one of the layer features."""
        whole = weight @ self.basis / self.scale
        return LinearHead(bias - whole @ self.mean, None, whole)


def some_of(rows: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "M ..."]:
    """All rows, or where they are more than MAX_ROWS every second, third or further one."""
    return rows[:: -(-len(rows) // MAX_ROWS)]


def sharpness(objective: Objective, logits: Float64[Tensor, "N C"], targets: Targets) -> float:
    """What logits are multiplied by for the least log loss on images that they were not fitted to.

    As if one image in all had been labelled by chance: where all are answered rightly, no factor were too large else.
    """
    return 1 / objective.least_loss_temperature(logits, targets, (1e-6, 1e6), 1 / len(logits))


def best_weight(
    objective: Objective, first: Float64[Tensor, "N C"], second: Float64[Tensor, "N C"], targets: Targets,
    weights: Sequence[float] = EIGHTHS,
) -> float:  # fmt: skip
    """The weight of the second, the first's being the rest, whose sum has the least log loss."""
    return min(weights, key=lambda w: objective.loss((1 - w) * first + w * second, targets).item())


def out_of_fold(
    fold: Int[Tensor, " N"], num_classes: int, fit: Callable[[Tensor, Tensor], Sequence[Float64[Tensor, "M C"]]]
) -> list[Float64[Tensor, "N C"]]:
    """Logits of every image under fits to the other folds' images.

    Args:
        fold: of each image.
        num_classes: C.
        fit: given rows to fit to and rows to answer, the answers of one or more fits, always as many.
    """
    found: list[Tensor] = []
    for number in fold.unique().tolist():
        held_out = (fold == number).nonzero()[:, 0]
        answers = fit((fold != number).nonzero()[:, 0], held_out)
        found = found or [torch.zeros(len(fold), num_classes, dtype=torch.float64, device="cpu") for _ in answers]
        for whole, part in zip(found, answers, strict=True):
            whole[held_out] = part
    return found


@dataclass(frozen=True)
class ProbeRecipe:
    """How a layer probe is fitted: chosen by cross-validation on some images, and good for more of them."""

    fit: int  # which of the objective's fits to the layer features
    sharpness: tuple[float, float]  # of the linear probe's logits, and of that fit's
    weight: float  # of that fit's logits in the sum


def choose(
    objective: Objective, pooled: Float[Tensor, "N D"], layers: Float[Tensor, "V N n"], targets: Targets,
    num_classes: int, strength: float, seed: int, groups: Groups = None,
) -> ProbeRecipe:  # fmt: skip
    """Chooses how the layer probe of some images is fitted, by the log loss on images that a fit did not see.

    Of V views the first are the images as they are, by which it is judged; a view stands in the fold of its image.
    """
    fold = objective.folds(targets, seed, groups)
    _, z = _placed(layers)

    def linear(rows: Tensor, held_out: Tensor) -> list[Tensor]:
        head = of_linear_probe(objective.fit_linear_probe(pooled[rows], targets[rows], strength, num_classes))
        return [head(pooled[held_out], layers[0, held_out])]

    def fits(rows: Tensor, held_out: Tensor) -> list[Tensor]:
        found = _fits(objective, z[:, rows], targets[rows], num_classes, layers.shape[2])
        return [z[0, held_out] @ weight.T + bias for weight, bias in found]

    (final,), tried = out_of_fold(fold, num_classes, linear), out_of_fold(fold, num_classes, fits)
    final_sharpness = sharpness(objective, final, targets)
    sharp = [sharpness(objective, logits, targets) for logits in tried]
    losses = [objective.loss(logits * own, targets).item() for logits, own in zip(tried, sharp, strict=True)]
    best = losses.index(min(losses))
    weight = best_weight(objective, final * final_sharpness, tried[best] * sharp[best], targets)
    return ProbeRecipe(best, (final_sharpness, sharp[best]), weight)


def _placed(layers: Float[Tensor, "V N n"]) -> tuple[Space, Float64[Tensor, "V N k"]]:
    """The space of all views of some images, and where each stands in it."""
    every = layers.flatten(0, 1)
    space = Space.of(every)
    return space, space.coordinates(every).unflatten(0, layers.shape[:2])


def _fits(
    objective: Objective, z: Float64[Tensor, "V N k"], targets: Targets, num_classes: int, num_features: int
) -> list[tuple[Float64[Tensor, "C k"], Float64[Tensor, " C"]]]:
    """The objective's fits to the images as they are, then those to all views of them."""
    found = []
    for views in sorted({1, len(z) if objective.learns_from_views else 1}):
        whole = torch.cat([targets] * views)
        found += objective.fit_layers(z[:views].flatten(0, 1), whole, num_classes, num_features)
    return found


def layer_probe(
    recipe: ProbeRecipe, objective: Objective, linear: LinearHead, layers: Float[Tensor, "V N n"], targets: Targets,
    num_classes: int,
) -> LinearHead:  # fmt: skip
    """The linear probe of some images and a fit to their layer features, each calibrated, added as a recipe says."""
    final, read = recipe.sharpness
    linear = linear * (final * (1 - recipe.weight))
    if not recipe.weight:
        return linear
    space, z = _placed(layers)
    weight, bias = _fits(objective, z, targets, num_classes, layers.shape[2])[recipe.fit]
    if num_classes > MAX_RANK:  # the directions in which its logits vary most among these images
        logits = z[0] @ weight.T
        _, _, directions = torch.linalg.svd(logits - logits.mean(0), full_matrices=False)
        shared = directions[:MAX_RANK].T @ directions[:MAX_RANK]
        bias = bias + (weight - shared @ weight) @ z[0].mean(0)
        weight = shared @ weight
    return linear + space.head(weight, bias) * (read * recipe.weight)


def of_linear_probe(fitted: LinearProbe) -> LinearHead:
    """A linear probe as a head."""
    return LinearHead(fitted.bias.double(), fitted.weight.double())


def as_tensors(head: LinearHead) -> dict[str, Any]:
    """A head as the tensors of a task without a token, in float32; its layer weight in two factors of MAX_RANK."""
    assert head.pooled_weight is not None
    found = {"head_weight": head.pooled_weight, "head_bias": head.bias, "layer_weight": head.layer_weight}
    if head.layer_weight is not None and len(head.bias) > MAX_RANK:
        left, values, right = torch.linalg.svd(head.layer_weight, full_matrices=False)
        roots = values[:MAX_RANK].sqrt()
        found["layer_weight"], found["layer_down"] = left[:, :MAX_RANK] * roots, roots.unsqueeze(1) * right[:MAX_RANK]
    return {name: part.float() for name, part in found.items() if part is not None}
