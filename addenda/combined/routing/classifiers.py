"""Two classifiers over the classes of all tasks, from sums over their features, and how likely their scores are.

Sources: Mahalanobis distance and shared covariance, Lee et al., NeurIPS 2018; relative distance, Ren et al., 2021,
arXiv 2106.09022; random projection and ridge, McDonnell et al., NeurIPS 2023 (RanPAC). Here the projection stands
beside the feature itself and is small, so that one sum of products serves both, and the two are pooled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64
from scipy.optimize import minimize_scalar
from torch import Tensor

from addenda.combined.routing.statistics import Moments, double

SHRINKAGE = 0.1
"""Of a covariance towards a multiple of the identity."""


class Discriminant:
    """Linear discriminant analysis: a Gaussian for each class, with one covariance; and one Gaussian for any image."""

    def __init__(self, moments: Moments) -> None:
        width, total = moments.width, moments.counts.sum()
        sums, second = moments.sums[:, :width], moments.gram[:width, :width] / total
        self.means = sums / moments.counts.clamp(min=1)[:, None]
        self._mean = sums.sum(0) / total
        within = second - (self.means * (moments.counts / total)[:, None]).T @ self.means
        self._within = _inverse(within)
        self._overall = _inverse(second - torch.outer(self._mean, self._mean))

    def scores(self, pooled: Tensor) -> Float64[Tensor, "B C"]:
        """Log-likelihoods of the classes, up to what is the same for all."""
        projected = self.means @ self._within
        return double(pooled) @ projected.T - 0.5 * (projected * self.means).sum(1)

    def cosine(self, pooled: Tensor) -> Float64[Tensor, "B C"]:
        """Cosine similarity to the classes' means."""
        return F.normalize(double(pooled)) @ F.normalize(self.means).T

    def familiarity(self, pooled: Tensor) -> Float64[Tensor, " B"]:
        """How much nearer each image is to a class than to what images are in general."""
        features = double(pooled)
        centred = features - self._mean
        anything = ((centred @ self._overall) * centred).sum(1)
        nearest = ((features @ self._within) * features).sum(1) - 2 * self.scores(pooled).max(1).values
        return anything - nearest


def ridge(moments: Moments, penalties: tuple[float, ...] | list[float]) -> list[Float64[Tensor, "F C"]]:
    """Ridge regressions of the classes' indicators on the expanded feature, one for each penalty."""
    values, vectors = torch.linalg.eigh(moments.gram)
    scale, rotated = moments.gram.diagonal().mean(), vectors.T @ moments.sums.T
    return [vectors @ (rotated / (values.clamp(min=0) + penalty * scale)[:, None]) for penalty in penalties]


def temperature(scores: Float64[Tensor, "K C"], truth: Int64[Tensor, " K"]) -> tuple[float, float]:
    """The temperature under which scores are most likely, and the log loss under it."""

    def loss(power: float) -> float:
        return F.cross_entropy(scores / 10**power, truth).item()

    found = minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded")
    return float(10**found.x), float(found.fun)


def _inverse(covariance: Tensor) -> Tensor:
    scale = covariance.diagonal().mean()
    shrunk = covariance + SHRINKAGE * scale * torch.eye(len(covariance), dtype=torch.float64, device="cpu")
    inverse: Tensor = torch.linalg.inv(shrunk)
    return inverse
