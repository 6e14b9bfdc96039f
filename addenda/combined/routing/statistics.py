"""Feature statistics: sums over the features of a task's images, stored at registration for routers."""

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
"""Width of the expanded feature (at most four times the feature's width), and its minimum number of projections."""
SAMPLE = 64
"""Maximum features stored per task (and at most a fifth of all), on which penalty and temperatures are tuned."""


def feature_statistics(
    pooled: Float[Tensor, "N D"], targets: Int64[Tensor, " N"], num_classes: int
) -> FeatureStatistics:
    """Sums the pooled features of a task's images by class, in float64."""
    features = expand(pooled)
    one_hot = F.one_hot(targets, num_classes).double()
    counts = targets.bincount(minlength=num_classes)
    rows: list[int] = []
    remaining = counts.tolist()
    random = torch.Generator().manual_seed(0)
    for row in torch.randperm(len(targets), generator=random, dtype=torch.int64, device="cpu").tolist():
        if len(rows) < min(SAMPLE, len(targets) // 5) and remaining[targets[row]] > 1:  # one per class stays
            rows.append(row)
            remaining[targets[row]] -= 1
    return FeatureStatistics(
        counts=counts,
        sums=(one_hot.T @ features).float(),
        gram=(features.T @ features)[_triangle(features.shape[1])].float(),
        sample=pooled[rows].float().cpu(),
        sample_targets=targets[rows],
    )


def can_be_routed(statistics: FeatureStatistics, width: int) -> bool:
    """Whether the statistics are of features of this width, with the expansion of this version."""
    expanded = width + projection(width).shape[1]
    return statistics.sample.shape[1] == width and statistics.sums.shape[1] == expanded


class Moments(NamedTuple):
    """Sums over the expanded features of many images, in float64."""

    counts: Float64[Tensor, " C"]
    sums: Float64[Tensor, "C F"]
    gram: Float64[Tensor, "F F"]
    width: int  # D, width of the feature, which precedes its projections

    @classmethod
    def sum(cls, tasks: list[FeatureStatistics]) -> Moments:
        """Combines tasks: concatenates their classes and adds their Gram matrices."""
        size = tasks[0].sums.shape[1]
        upper = torch.zeros(size * (size + 1) // 2, dtype=torch.float64, device="cpu")
        for task in tasks:
            upper += task.gram.double()
        gram = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        gram[_triangle(size)] = upper
        gram = gram + gram.triu(1).T
        sums = torch.cat([task.sums for task in tasks]).double()
        return cls(torch.cat([task.counts for task in tasks]).double(), sums, gram, tasks[0].sample.shape[1])

    def without(self, sample: Tensor, targets: Tensor) -> Moments:
        """Subtracts some of the images."""
        features, one_hot = expand(sample), F.one_hot(targets, len(self.counts)).double()
        return self._replace(
            counts=self.counts - one_hot.sum(0),
            sums=self.sums - one_hot.T @ features,
            gram=self.gram - features.T @ features,
        )


def expand(pooled: Float[Tensor, "N D"]) -> Float64[Tensor, "N F"]:
    """Appends rectified random projections to the features."""
    features = double(pooled)
    return torch.cat([features, (features @ projection(features.shape[1])).relu()], dim=1)


@lru_cache(maxsize=4)
def projection(width: int) -> Float64[Tensor, "D R"]:
    """The random projection, which never changes: numpy guarantees the output of its legacy generator."""
    normal = np.random.RandomState(0).standard_normal((width, min(3 * width, max(RANDOM, WIDTH - width))))
    return torch.tensor(normal / width**0.5, dtype=torch.float64, device="cpu")


def _triangle(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size, dtype=torch.int64, device="cpu")
    return rows, columns


def double(pooled: Tensor) -> Float64[Tensor, "N D"]:
    """Converts features to float64 on the CPU."""
    return pooled.double().cpu()
