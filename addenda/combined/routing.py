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
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from scipy.optimize import minimize_scalar
from torch import Tensor

from addenda.exceptions import RegistryError, UnknownTaskError
from addenda.registry import FeatureStatistics

WIDTH, RANDOM = 1024, 256
"""Numbers in an expanded feature, at most four times the feature's own; of these so many random ones at least."""
SAMPLE = 64
"""Features of a task that are kept as they are, at most, and a fifth of all: to choose penalty and temperatures by."""
SHRINKAGE = 0.1
"""Of a covariance towards a multiple of the identity."""
PENALTIES = tuple(10.0**power for power in np.arange(-4, 2.1, 0.5))
"""Of the ridge regression, tried, as shares of the mean diagonal."""
REJECTED = 0.05
"""Share of the tasks' own images that are taken for none of theirs."""


class Choice(NamedTuple):
    """What a router says of an image.

    Attributes:
        task: the most probable task.
        probability: of that task among all of the router's.
        familiar: False where the image looks like none of their images.
    """

    task: str
    probability: float
    familiar: bool


def feature_statistics(
    pooled: Float[Tensor, "N D"], targets: Int64[Tensor, " N"], num_classes: int
) -> FeatureStatistics:
    """Sums up the features of a task's images, in float64, for routers to come.

    Args:
        pooled: the backbone's own feature of each image.
        targets: their classes.
        num_classes: C.
    """
    features = _expand(pooled)
    one_hot = F.one_hot(targets, num_classes).double()
    counts = targets.bincount(minlength=num_classes)
    rows: list[int] = []
    left = counts.tolist()
    for row in torch.randperm(
        len(targets), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu"
    ).tolist():
        if len(rows) < min(SAMPLE, len(targets) // 5) and left[targets[row]] > 1:  # without them each class has one
            rows.append(row)
            left[targets[row]] -= 1
    return FeatureStatistics(
        counts=counts,
        sums=(one_hot.T @ features).float(),
        gram=(features.T @ features)[_triangle(features.shape[1])].float(),
        sample=pooled[rows].float().cpu(),
        sample_targets=targets[rows],
    )


def can_be_routed(statistics: FeatureStatistics, width: int) -> bool:
    """Whether statistics are of features of so many dimensions, expanded as they are here."""
    expanded = width + _projection(width).shape[1]
    return statistics.sample.shape[1] == width and statistics.sums.shape[1] == expanded


class Router:
    """Says which task an image is for.

    Args:
        statistics: of each task's images, by its name.

    Raises:
        RegistryError: there are none, or they come of different features.

    Examples:
        >>> import torch
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
        ordered = sorted(statistics, key=lambda name: (statistics[name].sha256, name))
        kept = [statistics[name] for name in ordered]
        counts = [len(one.counts) for one in kept]
        starts = dict(zip(ordered, np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        self._columns = {
            name: torch.arange(
                starts[name], starts[name] + len(statistics[name].counts), dtype=torch.int64, device="cpu"
            )
            for name in self.tasks
        }
        moments = _Moments.sum(kept)
        sample = torch.cat([one.sample for one in kept])
        truth = torch.cat([start + one.sample_targets for start, one in zip(starts.values(), kept, strict=True)])
        self._penalty, self._temperatures, self._threshold = PENALTIES[-1], (1.0, 1.0), -np.inf
        if len(sample):
            self._choose_settings(moments.without(sample, truth), sample, truth)
        self._discriminant = _Discriminant(moments)
        self._ridge = _ridge(moments, [self._penalty])[0]

    def _choose_settings(self, moments: _Moments, sample: Tensor, truth: Tensor) -> None:
        """Penalty, temperatures and threshold, from images that what is fitted here has not seen."""
        discriminant, features = _Discriminant(moments), _expand(sample)
        weights = _ridge(moments, PENALTIES)
        fits = [_temperature(features @ weight, truth) for weight in weights]
        best = min(range(len(fits)), key=lambda i: fits[i][1])
        self._penalty = PENALTIES[best]
        self._temperatures = _temperature(discriminant.scores(sample), truth)[0], fits[best][0]
        self._threshold = discriminant.familiarity(sample).quantile(REJECTED).item()

    def class_scores(self, pooled: Float[Tensor, "B D"]) -> dict[str, dict[str, Float64[Tensor, "B C"]]]:
        """Each classifier's scores of each task's classes: `"nearest-mean"`, `"mahalanobis"`, `"ridge"`, `"pooled"`.

        Those of `"pooled"` are log-probabilities among the classes of all tasks; it is what `task_scores` uses.
        """
        discriminant, ridge = self._discriminant.scores(pooled), _expand(pooled) @ self._ridge
        parts = zip((discriminant, ridge), self._temperatures, strict=True)
        halves = torch.stack([(scores / temperature).log_softmax(1) for scores, temperature in parts])
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


class _Moments(NamedTuple):
    """Sums over the expanded features of many images, in float64."""

    counts: Float64[Tensor, " C"]
    sums: Float64[Tensor, "C F"]
    gram: Float64[Tensor, "F F"]
    width: int  # D, the feature's own numbers, which come first

    @classmethod
    def sum(cls, kept: list[FeatureStatistics]) -> _Moments:
        """All tasks' classes side by side, all their images' products added up."""
        size = kept[0].sums.shape[1]
        upper = torch.zeros(size * (size + 1) // 2, dtype=torch.float64, device="cpu")
        for one in kept:
            upper += one.gram.double()
        gram = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        gram[_triangle(size)] = upper
        gram = gram + gram.triu(1).T
        sums = torch.cat([one.sums for one in kept]).double()
        return cls(torch.cat([one.counts for one in kept]).double(), sums, gram, kept[0].sample.shape[1])

    def without(self, sample: Tensor, truth: Tensor) -> _Moments:
        """The same, less some of the images."""
        features, one_hot = _expand(sample), F.one_hot(truth, len(self.counts)).double()
        return self._replace(
            counts=self.counts - one_hot.sum(0),
            sums=self.sums - one_hot.T @ features,
            gram=self.gram - features.T @ features,
        )


class _Discriminant:
    """Linear discriminant analysis: a Gaussian for each class, with one covariance; and one Gaussian for any image."""

    def __init__(self, moments: _Moments) -> None:
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
        return _double(pooled) @ projected.T - 0.5 * (projected * self.means).sum(1)

    def cosine(self, pooled: Tensor) -> Float64[Tensor, "B C"]:
        """Cosine similarity to the classes' means."""
        return F.normalize(_double(pooled)) @ F.normalize(self.means).T

    def familiarity(self, pooled: Tensor) -> Float64[Tensor, " B"]:
        features = _double(pooled)
        centred = features - self._mean
        anything = ((centred @ self._overall) * centred).sum(1)
        nearest = ((features @ self._within) * features).sum(1) - 2 * self.scores(pooled).max(1).values
        return anything - nearest


def _ridge(moments: _Moments, penalties: tuple[float, ...] | list[float]) -> list[Float64[Tensor, "F C"]]:
    """Ridge regressions of the classes' indicators on the expanded feature, one for each penalty."""
    values, vectors = torch.linalg.eigh(moments.gram)
    scale, rotated = moments.gram.diagonal().mean(), vectors.T @ moments.sums.T
    return [vectors @ (rotated / (values.clamp(min=0) + penalty * scale)[:, None]) for penalty in penalties]


def _temperature(scores: Float64[Tensor, "K C"], truth: Int64[Tensor, " K"]) -> tuple[float, float]:
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


def _expand(pooled: Float[Tensor, "N D"]) -> Float64[Tensor, "N F"]:
    """A feature, and rectified random projections of it beside."""
    features = _double(pooled)
    return torch.cat([features, (features @ _projection(features.shape[1])).relu()], dim=1)


@lru_cache(maxsize=4)
def _projection(width: int) -> Float64[Tensor, "D R"]:
    """The same for ever: numpy has frozen what its legacy generator gives."""
    drawn = np.random.RandomState(0).standard_normal((width, min(3 * width, max(RANDOM, WIDTH - width))))
    return torch.tensor(drawn / width**0.5, dtype=torch.float64, device="cpu")


def _triangle(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size, dtype=torch.int64, device="cpu")
    return rows, columns


def _double(pooled: Tensor) -> Float64[Tensor, "N D"]:
    return pooled.double().cpu()
