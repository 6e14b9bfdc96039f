"""A router that chooses a task for images without a task label, from the backbone's pooled feature.

It uses the feature statistics stored at registration, not the tasks' logits: softmax and energy scores of heads that
never saw the other tasks' images are poor indicators (docs/results.md). Two classifiers over the classes of all tasks,
linear discriminant analysis and ridge regression on random features, are averaged with equal weight. A task's
probability is the sum over its classes. A router depends on the set of its tasks: adding a task may change its choices,
but never a logit.

Sources: Mahalanobis distance and shared covariance, Lee et al., NeurIPS 2018; relative distance, Ren et al., 2021,
arXiv 2106.09022; random projection and ridge regression, McDonnell et al., NeurIPS 2023 (RanPAC). Unlike RanPAC, a
small projection is appended to the feature, so that both classifiers share one Gram matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from scipy.optimize import minimize_scalar
from torch import Tensor

from addenda.combined.routing.statistics import Moments, double, expand
from addenda.exceptions import RegistryError, UnknownTaskError
from addenda.registry import FeatureStatistics

PENALTIES = tuple(10.0**power for power in np.arange(-4, 2.1, 0.5))
"""Candidate penalties of the ridge regression, relative to the mean diagonal of the Gram matrix."""
REJECTED = 0.05
"""Fraction of the tasks' own images that the familiarity threshold rejects."""
SHRINKAGE = 0.1
"""Shrinkage of a covariance towards a multiple of the identity."""


class Choice(NamedTuple):
    """A router's choice for one image."""

    task: str  # the most probable task
    probability: float  # its probability among the router's tasks
    familiar: bool  # False if the image is unlike the images of every task


class Router:
    """Chooses the task for an image.

    Args:
        statistics: feature statistics of each task, by name.

    Raises:
        RegistryError: there are no statistics, or they are of different kinds of features.

    Examples:
        >>> import torch
        >>> from addenda.combined import feature_statistics
        >>> noise = torch.Generator().manual_seed(0)
        >>> means = {"left": -2.0, "right": 2.0}
        >>> statistics = {
        ...     name: feature_statistics(
        ...         mean + torch.randn(50, 8, generator=noise), torch.arange(50) % 2, num_classes=2
        ...     )
        ...     for name, mean in means.items()
        ... }
        >>> choices = Router(statistics).choose(torch.tensor([-2.0, 2.0, 50.0])[:, None].expand(3, 8))
        >>> [(choice.task, choice.familiar) for choice in choices]
        [('left', True), ('right', True), ('right', False)]
    """

    def __init__(self, statistics: Mapping[str, FeatureStatistics]) -> None:
        widths = {name: (task.sample.shape[1], task.sums.shape[1]) for name, task in statistics.items()}
        if len(set(widths.values())) != 1:
            raise RegistryError(
                f"A router requires routing statistics of one (pooled, expanded) width, not {widths}. Route among "
                "tasks of one backbone, learned with one version of Addenda."
            )
        self.tasks = tuple(statistics)
        # Sums of floats depend on their order. Sorting by content gives the same bits for tasks in any order.
        ordered = dict(sorted(statistics.items(), key=lambda item: (item[1].sha256, item[0])))
        ends = np.cumsum([len(task.counts) for task in ordered.values()]).tolist()
        starts = dict(zip(ordered, [0, *ends[:-1]], strict=True))
        ranges = {
            name: torch.arange(start, end, dtype=torch.int64, device="cpu")
            for (name, start), end in zip(starts.items(), ends, strict=True)
        }
        self._columns = {name: ranges[name] for name in self.tasks}
        moments = Moments.sum(list(ordered.values()))
        sample = torch.cat([task.sample for task in ordered.values()])
        targets = torch.cat([starts[name] + task.sample_targets for name, task in ordered.items()])
        penalty, self._temperatures, self._threshold = PENALTIES[-1], (1.0, 1.0), -np.inf
        if len(sample):  # tune on images that are held out of the fit
            training, features = moments.without(sample, targets), expand(sample)
            fits = [_temperature(features @ weights, targets) for weights in _ridge(training, PENALTIES)]
            penalty, (_, temperature) = min(zip(PENALTIES, fits, strict=True), key=lambda fit: fit[1][0])
            discriminant = Discriminant(training)
            self._temperatures = _temperature(discriminant.scores(sample), targets)[1], temperature
            self._threshold = discriminant.familiarity(sample).quantile(REJECTED).item()
        self._discriminant = Discriminant(moments)
        self._weights = _ridge(moments, (penalty,))[0]

    def class_scores(self, pooled: Float[Tensor, "B D"]) -> dict[str, dict[str, Float64[Tensor, "B C"]]]:
        """Each classifier's scores of each task's classes: `"nearest-mean"`, `"mahalanobis"`, `"ridge"`, `"pooled"`.

        `"pooled"` combines the second and third into log-probabilities over the classes of all tasks; `choose` uses it.
        """
        discriminant, ridge = self._discriminant.scores(pooled), expand(pooled) @ self._weights
        pairs = zip((discriminant, ridge), self._temperatures, strict=True)
        calibrated = torch.stack([(scores / temperature).log_softmax(1) for scores, temperature in pairs])
        scores = {
            "nearest-mean": self._discriminant.cosine(pooled),
            "mahalanobis": discriminant,
            "ridge": ridge,
            "pooled": calibrated.mean(0).log_softmax(1),
        }
        return {
            method: {name: values[:, columns] for name, columns in self._columns.items()}
            for method, values in scores.items()
        }

    def log_probabilities(self, pooled: Float[Tensor, "B D"]) -> dict[str, Float64[Tensor, " B"]]:
        """Log-probability of each task, by name, for images with these pooled features."""
        return {name: scores.logsumexp(1) for name, scores in self.class_scores(pooled)["pooled"].items()}

    def familiarity(self, pooled: Float[Tensor, "B D"]) -> Float64[Tensor, " B"]:
        """Relative Mahalanobis distance: how much closer each image is to some class than to images in general."""
        return self._discriminant.familiarity(pooled)

    def choose(self, pooled: Float[Tensor, "B D"]) -> list[Choice]:
        """Chooses the most probable task for each image, and tests whether the image is familiar."""
        best = torch.stack(list(self.log_probabilities(pooled).values()), dim=1).max(1)
        familiar = self.familiarity(pooled) >= self._threshold
        return [
            Choice(self.tasks[index], probability, is_familiar)
            for index, probability, is_familiar in zip(
                best.indices.tolist(), best.values.exp().tolist(), familiar.tolist(), strict=True
            )
        ]

    def routed(
        self, log_probabilities: Mapping[str, Float[Tensor, "B C"]], pooled: Float[Tensor, "B D"]
    ) -> dict[str, Float64[Tensor, "B C"]]:
        """Log-probabilities of every task's classes among the classes of all tasks.

        Args:
            log_probabilities: log-probabilities of each task's classes from its own head.
            pooled: the pooled features of the images.

        Raises:
            UnknownTaskError: a task is not in this router.
        """
        unknown = sorted(set(log_probabilities) - set(self.tasks))
        if unknown:
            raise UnknownTaskError(f"Task {unknown[0]!r} is not in this router. Known: {', '.join(self.tasks)}.")
        of_tasks = self.log_probabilities(pooled)
        return {name: of_tasks[name][:, None] + within.double().cpu() for name, within in log_probabilities.items()}


class Discriminant:
    """Linear discriminant analysis: Gaussian classes with shared covariance, and one Gaussian over all images."""

    def __init__(self, moments: Moments) -> None:
        width, total = moments.width, moments.counts.sum()
        sums, second = moments.sums[:, :width], moments.gram[:width, :width] / total
        self.means = sums / moments.counts.clamp(min=1)[:, None]
        self._mean = sums.sum(0) / total
        within = second - (self.means * (moments.counts / total)[:, None]).T @ self.means
        self._within = _inverse(within)
        self._overall = _inverse(second - torch.outer(self._mean, self._mean))

    def scores(self, pooled: Tensor) -> Float64[Tensor, "B C"]:
        """Log-likelihoods of the classes, up to a common constant."""
        projected = self.means @ self._within
        return double(pooled) @ projected.T - 0.5 * (projected * self.means).sum(1)

    def cosine(self, pooled: Tensor) -> Float64[Tensor, "B C"]:
        """Cosine similarity to the class means."""
        return F.normalize(double(pooled)) @ F.normalize(self.means).T

    def familiarity(self, pooled: Tensor) -> Float64[Tensor, " B"]:
        """Squared Mahalanobis distance to all images, minus that to the nearest class."""
        features = double(pooled)
        centred = features - self._mean
        to_all = ((centred @ self._overall) * centred).sum(1)
        to_nearest = ((features @ self._within) * features).sum(1) - 2 * self.scores(pooled).max(1).values
        return to_all - to_nearest


def _ridge(moments: Moments, penalties: tuple[float, ...]) -> list[Float64[Tensor, "F C"]]:
    """Ridge regressions of class indicators on the expanded features, one per penalty."""
    values, vectors = torch.linalg.eigh(moments.gram)
    scale, rotated = moments.gram.diagonal().mean(), vectors.T @ moments.sums.T
    return [vectors @ (rotated / (values.clamp(min=0) + penalty * scale)[:, None]) for penalty in penalties]


def _temperature(scores: Float64[Tensor, "K C"], targets: Int64[Tensor, " K"]) -> tuple[float, float]:
    """Temperature scaling: the minimum log loss of the scores, and the temperature that gives it."""

    def loss(power: float) -> float:
        return F.cross_entropy(scores / 10**power, targets).item()

    optimum = minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded")
    return float(optimum.fun), float(10**optimum.x)


def _inverse(covariance: Tensor) -> Tensor:
    scale = covariance.diagonal().mean()
    shrunk = covariance + SHRINKAGE * scale * torch.eye(len(covariance), dtype=torch.float64, device="cpu")
    inverse: Tensor = torch.linalg.inv(shrunk)
    return inverse
