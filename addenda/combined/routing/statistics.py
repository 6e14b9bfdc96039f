"""Sums over the features of a task's images: what a router knows of them, kept at registration."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from addenda.registry import FeatureStatistics

WIDTH, RANDOM = 1024, 256
"""Numbers in an expanded feature, at most four times the feature's own; of these so many random ones at least."""
SAMPLE = 64
"""Features of a task that are kept as they are, at most, and a fifth of all: to choose penalty and temperatures by."""


def feature_statistics(
    pooled: Float[Tensor, "N D"], targets: Int64[Tensor, " N"], num_classes: int
) -> FeatureStatistics:
    """Sums up the backbone's own features of a task's images and their classes, in float64, for routers to come."""
    features = expand(pooled)
    one_hot = F.one_hot(targets, num_classes).double()
    counts = targets.bincount(minlength=num_classes)
    rows: list[int] = []
    left = counts.tolist()
    random = torch.Generator().manual_seed(0)
    for row in torch.randperm(len(targets), generator=random, dtype=torch.int64, device="cpu").tolist():
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
    expanded = width + projection(width).shape[1]
    return statistics.sample.shape[1] == width and statistics.sums.shape[1] == expanded


class Moments(NamedTuple):
    """Sums over the expanded features of many images, in float64."""

    counts: Float64[Tensor, " C"]
    sums: Float64[Tensor, "C F"]
    gram: Float64[Tensor, "F F"]
    width: int  # D, the feature's own numbers, which come first

    @classmethod
    def sum(cls, kept: list[FeatureStatistics]) -> Moments:
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

    def without(self, sample: Tensor, truth: Tensor) -> Moments:
        """The same, less some of the images."""
        features, one_hot = expand(sample), F.one_hot(truth, len(self.counts)).double()
        return self._replace(
            counts=self.counts - one_hot.sum(0),
            sums=self.sums - one_hot.T @ features,
            gram=self.gram - features.T @ features,
        )


def expand(pooled: Float[Tensor, "N D"]) -> Float64[Tensor, "N F"]:
    """A feature, and rectified random projections of it beside."""
    features = double(pooled)
    return torch.cat([features, (features @ projection(features.shape[1])).relu()], dim=1)


@lru_cache(maxsize=4)
def projection(width: int) -> Float64[Tensor, "D R"]:
    """The same for ever: numpy has frozen what its legacy generator gives."""
    drawn = np.random.RandomState(0).standard_normal((width, min(3 * width, max(RANDOM, WIDTH - width))))
    return torch.tensor(drawn / width**0.5, dtype=torch.float64, device="cpu")


def _triangle(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size, dtype=torch.int64, device="cpu")
    return rows, columns


def double(pooled: Tensor) -> Float64[Tensor, "N D"]:
    """In the precision that sums are taken in, on the CPU."""
    return pooled.double().cpu()
