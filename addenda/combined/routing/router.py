"""Which task an image is for, where nobody says: a router over the backbone's own feature.

It reads what each task kept of its images at registration (`FeatureStatistics`), never the tasks' logits: softmax and
energy of heads that never saw the other tasks' images say little (docs/results.md). Two classifiers over the classes
of all tasks, linear discriminant analysis and ridge regression on random features, are pooled with equal weight; a
task's probability is that of its classes together. A router is a function of the set of its tasks: each task that
joins may change its choices, and never a logit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from addenda.combined.routing.classifiers import Discriminant, ridge, temperature
from addenda.combined.routing.statistics import Moments, expand
from addenda.exceptions import RegistryError, UnknownTaskError
from addenda.registry import FeatureStatistics

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
        moments = Moments.sum(kept)
        sample = torch.cat([one.sample for one in kept])
        truth = torch.cat([start + one.sample_targets for start, one in zip(starts.values(), kept, strict=True)])
        self._penalty, self._temperatures, self._threshold = PENALTIES[-1], (1.0, 1.0), -np.inf
        if len(sample):
            self._choose_settings(moments.without(sample, truth), sample, truth)
        self._discriminant = Discriminant(moments)
        self.ridge = ridge(moments, [self._penalty])[0]

    def _choose_settings(self, moments: Moments, sample: Tensor, truth: Tensor) -> None:
        """Penalty, temperatures and threshold, from images that what is fitted here has not seen."""
        discriminant, features = Discriminant(moments), expand(sample)
        weights = ridge(moments, PENALTIES)
        fits = [temperature(features @ weight, truth) for weight in weights]
        best = min(range(len(fits)), key=lambda i: fits[i][1])
        self._penalty = PENALTIES[best]
        self._temperatures = temperature(discriminant.scores(sample), truth)[0], fits[best][0]
        self._threshold = discriminant.familiarity(sample).quantile(REJECTED).item()

    def class_scores(self, pooled: Float[Tensor, "B D"]) -> dict[str, dict[str, Float64[Tensor, "B C"]]]:
        """Each classifier's scores of each task's classes: `"nearest-mean"`, `"mahalanobis"`, `"ridge"`, `"pooled"`.

        Those of `"pooled"` are log-probabilities among the classes of all tasks; it is what `task_scores` uses.
        """
        discriminant, ridge = self._discriminant.scores(pooled), expand(pooled) @ self.ridge
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
