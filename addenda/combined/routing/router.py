"""A router that chooses a task for images without a task label, from the backbone's features.

It uses the feature statistics stored at registration, not the tasks' logits: softmax and energy scores of heads that
never saw the other tasks' images are poor indicators (docs/results.md). Classifiers over the classes of all tasks are
averaged with equal weight: ridge regression on the pooled feature with random projections, linear discriminant analysis
of the pooled feature, and the same of hashed layer features if every task has their statistics. A task's probability is
the sum over its classes. A router depends on the set of its tasks: adding a task may change its choices, but never a
logit.

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
from torch import Tensor

from addenda.combined.routing.classifiers import PENALTIES, SHRINKAGES, Linear, discriminant, gaussians, ridge, tuned
from addenda.combined.routing.statistics import Moments, double, expand, hash_layers
from addenda.exceptions import RegistryError, UnknownTaskError
from addenda.registry import FeatureStatistics

REJECTED = 0.05
"""Fraction of a task's unseen images that its familiarity threshold rejects, but at least 1 in K + 1.

K is the number of the task's sampled images: about a fifth, one of a class with 3 to 9 images and none of a smaller
class. So 19 are needed for 5 %; with 6 (as of 6 classes with 3 to 9 images each) it is 14 %, and varies widely.
"""


class Choice(NamedTuple):
    """A router's choice for one image."""

    task: str  # the most probable task
    probability: float  # its probability among the router's tasks
    familiar: bool  # False if the image is unlike this task's images: it belongs to none of the tasks


class Router:
    """Chooses the task for an image.

    Its methods take the backbone's features of images, `TaskLogits.features`.

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
        tasks, ends = list(ordered.values()), np.cumsum([len(task.counts) for task in ordered.values()]).tolist()
        starts = dict(zip(ordered, [0, *ends[:-1]], strict=True))
        ranges = {
            name: torch.arange(start, end, dtype=torch.int64, device="cpu")
            for (name, start), end in zip(starts.items(), ends, strict=True)
        }
        self._columns = {name: ranges[name] for name in self.tasks}
        self._width = tasks[0].sample.shape[1]
        targets = torch.cat([starts[name] + task.sample_targets for name, task in ordered.items()])
        counts = [task.counts for task in tasks]
        moments = Moments.sum(counts, [task.sums for task in tasks], [task.gram for task in tasks])
        sample = torch.cat([task.sample for task in tasks])
        spaces = {"ridge": (moments, expand(sample)), "mahalanobis": (moments.first(self._width), double(sample))}
        layers = [task.layers for task in tasks if task.layers is not None]
        if len(layers) == len(tasks) and len({sums.shape[1] for sums, _, _ in layers}) == 1:
            sums, grams, samples = (list(parts) for parts in zip(*layers, strict=True))
            spaces["layers"] = Moments.sum(counts, sums, grams), torch.cat(samples).double()
        self._classifiers: dict[str, Linear] = {}
        self._distances: dict[str, _RelativeDistance] = {}
        in_class = moments.counts[targets] > 1  # an only image leaves no class behind
        left_out = torch.zeros(int(in_class.sum()), dtype=torch.float64, device="cpu")
        for kind, (all_images, features) in spaces.items():
            training = all_images.without(features, targets)
            fit, strengths = (ridge, PENALTIES) if kind == "ridge" else (discriminant, SHRINKAGES)
            self._classifiers[kind], _ = tuned(fit, strengths, all_images, training, features, targets)
            if kind != "ridge":
                self._distances[kind] = distance = _RelativeDistance(all_images, features[in_class], targets[in_class])
                left_out += distance.left_out
        thresholds = [_threshold(left_out[torch.isin(targets[in_class], self._columns[name])]) for name in self.tasks]
        self._thresholds = torch.tensor(thresholds, dtype=torch.float64, device="cpu")

    def _spaces(self, features: Float[Tensor, "B F"]) -> dict[str, Float64[Tensor, "B G"]]:
        """What each classifier reads."""
        pooled = features[:, : self._width]
        spaces = {"ridge": expand(pooled), "mahalanobis": double(pooled)}
        if "layers" in self._classifiers:
            spaces["layers"] = hash_layers(features[:, self._width :], self._width)
        return spaces

    def class_scores(self, features: Float[Tensor, "B F"]) -> dict[str, dict[str, Float64[Tensor, "B C"]]]:
        """Each classifier's scores of each task's classes.

        `"ridge"`, `"mahalanobis"` and `"layers"` (absent if a task lacks the statistics) are log-probabilities over the
        classes of all tasks, `"combined"` is their mean, which `choose` uses, and `"nearest-mean"` is the cosine
        similarity to the class means of the pooled feature.
        """
        spaces = self._spaces(features)
        scores = self._scores(spaces)
        means = self._distances["mahalanobis"].means
        scores["nearest-mean"] = F.normalize(spaces["mahalanobis"]) @ F.normalize(means).T
        return {
            kind: {name: values[:, columns] for name, columns in self._columns.items()}
            for kind, values in scores.items()
        }

    def _scores(self, spaces: Mapping[str, Float64[Tensor, "B G"]]) -> dict[str, Float64[Tensor, "B C"]]:
        """Log-probabilities over all classes: of each classifier, and `"combined"`."""
        scores = {
            kind: (spaces[kind] @ classifier.weights + classifier.bias).log_softmax(1)
            for kind, classifier in self._classifiers.items()
        }
        return scores | {"combined": torch.stack(list(scores.values())).mean(0).log_softmax(1)}

    def log_probabilities(self, features: Float[Tensor, "B F"]) -> dict[str, Float64[Tensor, " B"]]:
        """Log-probability of each task, by name."""
        return self._of_tasks(self._spaces(features))

    def _of_tasks(self, spaces: Mapping[str, Float64[Tensor, "B G"]]) -> dict[str, Float64[Tensor, " B"]]:
        combined = self._scores(spaces)["combined"]
        return {name: combined[:, columns].logsumexp(1) for name, columns in self._columns.items()}

    def familiarity(self, features: Float[Tensor, "B F"]) -> Float64[Tensor, " B"]:
        """Relative Mahalanobis distance: how much closer each image is to some class than to images in general.

        Distances of pooled and layer features are added, each divided by its standard deviation over sampled images.
        """
        return self._closeness(self._spaces(features))

    def _closeness(self, spaces: Mapping[str, Float64[Tensor, "B G"]]) -> Float64[Tensor, " B"]:
        return torch.stack([distance(spaces[kind]) for kind, distance in self._distances.items()]).sum(0)

    def choose(self, features: Float[Tensor, "B F"]) -> list[Choice]:
        """Chooses the most probable task for each image, and tests whether the image is familiar to it.

        Every image is familiar to a task without sampled images, none of whose classes has three images.
        """
        spaces = self._spaces(features)
        best = torch.stack(list(self._of_tasks(spaces).values()), dim=1).max(1)
        familiar = self._closeness(spaces) >= self._thresholds[best.indices]
        return [
            Choice(self.tasks[index], probability, is_familiar)
            for index, probability, is_familiar in zip(
                best.indices.tolist(), best.values.exp().tolist(), familiar.tolist(), strict=True
            )
        ]

    def routed(
        self, log_probabilities: Mapping[str, Float[Tensor, "B C"]], features: Float[Tensor, "B F"]
    ) -> dict[str, Float64[Tensor, "B C"]]:
        """Log-probabilities of every task's classes among the classes of all tasks.

        Args:
            log_probabilities: log-probabilities of each task's classes from its own head.
            features: the features of the images.

        Raises:
            UnknownTaskError: a task is not in this router.
        """
        unknown = sorted(set(log_probabilities) - set(self.tasks))
        if unknown:
            raise UnknownTaskError(f"Task {unknown[0]!r} is not in this router. Known: {', '.join(self.tasks)}.")
        of_tasks = self.log_probabilities(features)
        return {name: of_tasks[name][:, None] + double(within) for name, within in log_probabilities.items()}


def _threshold(distances: Float64[Tensor, " K"]) -> float:
    """The limit below which a further image is with probability k / (K + 1), if exchangeable with these K."""
    if not len(distances):
        return -np.inf
    rank = max(1, round(REJECTED * (len(distances) + 1)))
    return distances.kthvalue(rank).values.item()


class _RelativeDistance:
    """Squared Mahalanobis distance to all images, minus that to the nearest class; greater is more familiar.

    Classes are Gaussians with a shared covariance, all images are one Gaussian. `left_out` is that of each image of the
    sample to the other images: an image is closer to a fit that has seen it. All are divided by its standard deviation.
    """

    def __init__(self, moments: Moments, sample: Float64[Tensor, "K F"], targets: Int64[Tensor, " K"]) -> None:
        as_one = Moments(moments.counts.sum()[None], moments.sums.sum(0, keepdim=True), moments.gram)
        self._to_all, self._to_nearest = _Distance(as_one), _Distance(moments)
        self.means = self._to_nearest.means
        to_all = self._to_all.left_out(sample, torch.zeros_like(targets))
        left_out = to_all - self._to_nearest.left_out(sample, targets)
        self._scale = max(left_out.std().item(), 1e-12) if len(sample) > 1 else 1.0
        self.left_out = left_out / self._scale

    def __call__(self, features: Float64[Tensor, "B F"]) -> Float64[Tensor, " B"]:
        return (self._to_all(features) - self._to_nearest(features)) / self._scale


class _Distance:
    """Squared Mahalanobis distance to the nearest class mean; the mean variance is added to all variances."""

    def __init__(self, moments: Moments) -> None:
        self._counts, self._total = moments.counts, moments.counts.sum()
        self.means, within = gaussians(moments)
        values, self._vectors = torch.linalg.eigh(within)
        self._values = values.clamp(min=0)
        self._rotated = self.means @ self._vectors

    def __call__(self, features: Float64[Tensor, "B F"]) -> Float64[Tensor, " B"]:
        precisions = _inverse(self._values + self._values.mean())
        distances: Tensor = self._to_means(features @ self._vectors, precisions).min(1).values
        return distances

    def left_out(self, features: Float64[Tensor, "K F"], targets: Int64[Tensor, " K"]) -> Float64[Tensor, " K"]:
        """The distance of each of these images if it alone is left out; each class has two images or more.

        Without image x of class c, the scatter within classes is smaller by n_c / (n_c - 1) d d', with d = x - mean_c,
        so its inverse follows from the Sherman-Morrison formula.
        """
        rotated, counts = features @ self._vectors, self._counts[targets]
        deviation, share = rotated - self._rotated[targets], counts / (counts - 1)
        weight, rest = share / (self._total - 1), self._total / (self._total - 1)
        scale = rest * self._values.mean() - weight * deviation.square().mean(1)
        precisions = _inverse(rest * self._values + scale.clamp(min=0)[:, None])
        weighted = precisions * deviation
        along = (rotated * weighted).sum(1, keepdim=True) - weighted @ self._rotated.T
        gain = weight / (1 - weight * (deviation * weighted).sum(1)).clamp(min=1e-12)
        distances: Tensor = self._to_means(rotated, precisions) + gain[:, None] * along.square()
        rows = torch.arange(len(targets), dtype=torch.int64, device="cpu")
        distances[rows, targets] *= share.square()  # the mean without x is share * d away from x
        nearest: Tensor = distances.min(1).values
        return nearest

    def _to_means(self, rotated: Float64[Tensor, "B F"], precisions: Float64[Tensor, "*B F"]) -> Float64[Tensor, "B C"]:
        weighted = rotated * precisions
        own = (rotated * weighted).sum(1, keepdim=True)
        distances: Tensor = own - 2 * weighted @ self._rotated.T + precisions @ self._rotated.square().T
        return distances


def _inverse(variances: Float64[Tensor, "*B F"]) -> Float64[Tensor, "*B F"]:
    """The inverse of variances; 1 where there is none."""
    return torch.where(variances > 0, 1 / variances, 1.0)
