"""Which task an image is for, where nobody says: a router over the backbone's own feature.

It reads what each task kept of its images at registration (`FeatureStatistics`), never the tasks' logits: softmax and
energy of heads that never saw the other tasks' images say little (docs/results.md). Two classifiers over the classes
of all tasks, linear discriminant analysis and ridge regression on random features, are pooled with equal weight; a
task's probability is that of its classes together. A router is a function of the set of its tasks: each task that
joins may change its choices, and never a logit.

Sources: Mahalanobis distance and shared covariance, Lee et al., NeurIPS 2018; relative distance, Ren et al., 2021,
arXiv 2106.09022; random projection and ridge, McDonnell et al., NeurIPS 2023 (RanPAC). Here the projection stands
beside the feature itself and is small, so that one sum of products serves both, and the two are pooled.
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
"""Of the ridge regression, tried, as shares of the mean diagonal."""
REJECTED = 0.05
"""Share of the tasks' own images that are taken for none of theirs."""
SHRINKAGE = 0.1
"""Of a covariance towards a multiple of the identity."""


class Choice(NamedTuple):
    """What a router says of an image."""

    task: str  # the most probable one
    probability: float  # of that task among all of the router's
    familiar: bool  # False where the image looks like none of their images


class Router:
    """Says which task an image is for.

    Args:
        statistics: of each task's images, by its name.

    Raises:
        RegistryError: there are none, or they come of different features.

    Examples:
        >>> import torch
        >>> from addenda.combined import feature_statistics
        >>> noise = torch.Generator().manual_seed(0)
        >>> places = {"left": -2.0, "right": 2.0}
        >>> kept = {
        ...     name: feature_statistics(
        ...         place + torch.randn(50, 8, generator=noise), torch.arange(50) % 2, num_classes=2
        ...     )
        ...     for name, place in places.items()
        ... }
        >>> choices = Router(kept).choose(torch.tensor([-2.0, 2.0, 50.0])[:, None].expand(3, 8))
        >>> [(choice.task, choice.familiar) for choice in choices]
        [('left', True), ('right', True), ('right', False)]
    """

    def __init__(self, statistics: Mapping[str, FeatureStatistics]) -> None:
        widths = {name: (one.sample.shape[1], one.sums.shape[1]) for name, one in statistics.items()}
        if len(set(widths.values())) != 1:
            raise RegistryError(f"A router needs statistics of one kind of feature; those given are of {widths}.")
        self.tasks = tuple(statistics)
        # Sums of floats depend on their order: that of the contents, so that one set of tasks gives the same bits.
        kept = dict(sorted(statistics.items(), key=lambda item: (item[1].sha256, item[0])))
        ends = np.cumsum([len(one.counts) for one in kept.values()]).tolist()
        starts = dict(zip(kept, [0, *ends[:-1]], strict=True))
        ranges = {
            name: torch.arange(start, end, dtype=torch.int64, device="cpu")
            for (name, start), end in zip(starts.items(), ends, strict=True)
        }
        self._columns = {name: ranges[name] for name in self.tasks}
        moments = Moments.sum(list(kept.values()))
        sample = torch.cat([one.sample for one in kept.values()])
        truth = torch.cat([starts[name] + one.sample_targets for name, one in kept.items()])
        penalty, self._temperatures, self._threshold = PENALTIES[-1], (1.0, 1.0), -np.inf
        if len(sample):  # chosen by images that what is fitted here has not seen
            without, features = moments.without(sample, truth), expand(sample)
            fits = [_temperature(features @ weights, truth) for weights in _ridge(without, PENALTIES)]
            penalty, (_, divisor) = min(zip(PENALTIES, fits, strict=True), key=lambda fit: fit[1][0])
            discriminant = Discriminant(without)
            self._temperatures = _temperature(discriminant.scores(sample), truth)[1], divisor
            self._threshold = discriminant.familiarity(sample).quantile(REJECTED).item()
        self._discriminant = Discriminant(moments)
        self._weights = _ridge(moments, (penalty,))[0]

    def class_scores(self, pooled: Float[Tensor, "B D"]) -> dict[str, dict[str, Float64[Tensor, "B C"]]]:
        """Each classifier's scores of each task's classes: `"nearest-mean"`, `"mahalanobis"`, `"ridge"`, `"pooled"`.

        Those of `"pooled"` are log-probabilities among the classes of all tasks; it is what `task_scores` uses.
        """
        discriminant, ridge = self._discriminant.scores(pooled), expand(pooled) @ self._weights
        parts = zip((discriminant, ridge), self._temperatures, strict=True)
        halves = torch.stack([(scores / divisor).log_softmax(1) for scores, divisor in parts])
        scores = {
            "nearest-mean": self._discriminant.cosine(pooled),
            "mahalanobis": discriminant,
            "ridge": ridge,
            "pooled": halves.mean(0).log_softmax(1),
        }
        return {
            how: {name: found[:, columns] for name, columns in self._columns.items()} for how, found in scores.items()
        }

    def log_probabilities(self, pooled: Float[Tensor, "B D"]) -> dict[str, Float64[Tensor, " B"]]:
        """The logarithm of each task's probability, by its name, for images with these features."""
        return {name: scores.logsumexp(1) for name, scores in self.class_scores(pooled)["pooled"].items()}

    def familiarity(self, pooled: Float[Tensor, "B D"]) -> Float64[Tensor, " B"]:
        """How much each image looks like those of a task, rather than like any: its relative Mahalanobis distance."""
        return self._discriminant.familiarity(pooled)

    def choose(self, pooled: Float[Tensor, "B D"]) -> list[Choice]:
        """The most probable task for each image, and whether it is familiar at all."""
        best = torch.stack(list(self.log_probabilities(pooled).values()), dim=1).max(1)
        familiar = self.familiarity(pooled) >= self._threshold
        return [
            Choice(self.tasks[place], probability, known)
            for place, probability, known in zip(
                best.indices.tolist(), best.values.exp().tolist(), familiar.tolist(), strict=True
            )
        ]

    def routed(
        self, log_probabilities: Mapping[str, Float[Tensor, "B C"]], pooled: Float[Tensor, "B D"]
    ) -> dict[str, Float64[Tensor, "B C"]]:
        """Log-probabilities of every task's classes among those of all tasks.

        Args:
            log_probabilities: of each task's classes, were it the one: as its own head says.
            pooled: the backbone's own feature of the images.

        Raises:
            UnknownTaskError: a task that this router knows nothing of.
        """
        unknown = sorted(set(log_probabilities) - set(self.tasks))
        if unknown:
            raise UnknownTaskError(
                f"The router knows nothing of task {unknown[0]!r}. It knows {', '.join(self.tasks)}."
            )
        of_task = self.log_probabilities(pooled)
        return {name: of_task[name][:, None] + within.double().cpu() for name, within in log_probabilities.items()}


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


def _ridge(moments: Moments, penalties: tuple[float, ...]) -> list[Float64[Tensor, "F C"]]:
    """Ridge regressions of the classes' indicators on the expanded feature, one for each penalty."""
    values, vectors = torch.linalg.eigh(moments.gram)
    scale, rotated = moments.gram.diagonal().mean(), vectors.T @ moments.sums.T
    return [vectors @ (rotated / (values.clamp(min=0) + penalty * scale)[:, None]) for penalty in penalties]


def _temperature(scores: Float64[Tensor, "K C"], truth: Int64[Tensor, " K"]) -> tuple[float, float]:
    """The least log loss of scores, and the temperature under which it is theirs."""

    def loss(power: float) -> float:
        return F.cross_entropy(scores / 10**power, truth).item()

    found = minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded")
    return float(found.fun), float(10**found.x)


def _inverse(covariance: Tensor) -> Tensor:
    scale = covariance.diagonal().mean()
    shrunk = covariance + SHRINKAGE * scale * torch.eye(len(covariance), dtype=torch.float64, device="cpu")
    inverse: Tensor = torch.linalg.inv(shrunk)
    return inverse
