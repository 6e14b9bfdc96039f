"""Probes: heads fitted in closed form or by convex optimisation on what the frozen network says of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from addenda.learner.objectives import Objective, Targets

NUM_FOLDS = 5
SHRINKAGES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""How far the covariance is drawn towards a multiple of the identity, to choose from."""
EIGHTHS = tuple(i / 8 for i in range(9))
"""Weights of one of two heads in their sum, to choose from."""
MAX_ROWS = 4096
"""Images whose features span the space that a fit is made in: it takes their number cubed."""
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
        some = (x[:: -(-len(x) // MAX_ROWS)] - mean) / scale
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


def discriminants(
    z: Float64[Tensor, "N k"], targets: Int[Tensor, " N"], num_classes: int, num_features: int,
    shrinkages: Sequence[float] = SHRINKAGES,
) -> list[tuple[Float64[Tensor, "C k"], Float64[Tensor, " C"]]]:  # fmt: skip
    """A linear discriminant for each shrinkage s, as weight and bias: classes of equal prior, of one covariance.

    It is (1 - s) S + s tr(S) / n I, with S the covariance within classes and n the features that the coordinates stand
    for. A class without images, as in a fold, has the mean of all; where no class has two images S is 0, and the
    discriminant is that of the nearest mean.

    Source: Friedman, "Regularized Discriminant Analysis", JASA 1989, equation 18; there with a covariance a class.
    """
    counts = targets.bincount(minlength=num_classes)
    means = torch.zeros(num_classes, z.shape[1], dtype=z.dtype, device="cpu").index_add_(0, targets, z)
    means = torch.where(counts.unsqueeze(1) > 0, means / counts.clamp(min=1).unsqueeze(1), z.mean(0))
    rest = z - means[targets]
    values, vectors = torch.linalg.eigh(rest.T @ rest / len(z))
    values = values.clamp(min=0)
    spread = values.sum() / num_features
    turned = means @ vectors
    found = []
    for shrinkage in shrinkages:
        covariance = (1 - shrinkage) * values + shrinkage * spread if spread > 0 else torch.ones_like(values)
        weight = turned / covariance
        found.append((weight @ vectors.T, -0.5 * (weight * turned).sum(1)))
    return found


def sharpness(objective: Objective, logits: Float64[Tensor, "N C"], targets: Targets) -> float:
    """What logits are multiplied by for the least log loss on images that they were not fitted to."""
    return 1 / objective.least_loss_temperature(logits, targets, (1e-6, 1e6))


def best_weight(
    objective: Objective, first: Float64[Tensor, "N C"], second: Float64[Tensor, "N C"], targets: Targets
) -> float:
    """Of EIGHTHS the weight of the second, the first's being the rest, whose sum has the least log loss."""
    return min(EIGHTHS, key=lambda w: objective.loss((1 - w) * first + w * second, targets).item())


def folds(
    classes: Int[Tensor, " N"], seed: int, groups: Sequence[str] | None = None, count: int = NUM_FOLDS
) -> Int[Tensor, " N"]:
    """The fold of each image: classes are dealt out evenly, and the images of a group stand in one fold.

    `classes` are all 0 where there is nothing to deal out evenly. A group goes by the class of most of its images.
    """
    names = [str(row) for row in range(len(classes))] if groups is None else list(groups)
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    common = [classes[some].mode().values.item() for some in rows.values()]
    of_group = torch.tensor(common, dtype=torch.int64, device="cpu")
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=random, dtype=torch.int64, device="cpu")
    order = order[of_group[order].argsort(stable=True)]
    found = torch.empty(len(classes), dtype=torch.int64, device="cpu")
    members = list(rows.values())
    for place, group in enumerate(order.tolist()):
        found[members[group]] = place % min(count, len(rows))
    return found


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
