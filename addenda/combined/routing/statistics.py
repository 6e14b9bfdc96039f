"""Feature statistics: sums over the features of a task's images, stored at registration for routers.

The sums are over the pooled feature with random projections (as in RanPAC), and over hashed layer features.

Source of feature hashing: Weinberger et al., ICML 2009, arXiv 0902.2206.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
HASHED = 768
"""Width of the hashed layer features, if there are at least as many."""
SAMPLE = 64
"""Maximum features stored per task (and at most a fifth of all), on which penalty and temperatures are tuned."""


def feature_statistics(
    pooled: Float[Tensor, "N D"],
    targets: Int64[Tensor, " N"],
    num_classes: int,
    layers: Float[Tensor, "N n"] | None = None,
) -> FeatureStatistics:
    """Sums the features of a task's images by class, in float64.

    Layer features, if given, are left out where the statistics would otherwise exceed the maximum size.
    """
    counts = targets.bincount(minlength=num_classes)
    rows: list[int] = []
    remaining = counts.tolist()
    random = torch.Generator().manual_seed(0)
    for row in torch.randperm(len(targets), generator=random, dtype=torch.int64, device="cpu").tolist():
        if len(rows) < min(SAMPLE, len(targets) // 5) and remaining[targets[row]] > 1:  # one per class stays
            rows.append(row)
            remaining[targets[row]] -= 1
    sums, gram = _sums(expand(pooled), targets, num_classes)
    statistics = FeatureStatistics(counts, sums, gram, pooled[rows].float().cpu(), targets[rows])
    if layers is None or not layers.shape[1]:
        return statistics
    hashed = hash_layers(layers, pooled.shape[1])
    sums, gram = _sums(hashed, targets, num_classes)
    complete = replace(statistics, layer_sums=sums, layer_gram=gram, layer_sample=hashed[rows].float())
    return complete if complete.excess is None else statistics


def _sums(features: Float64[Tensor, "N F"], targets: Int64[Tensor, " N"], num_classes: int) -> tuple[Tensor, Tensor]:
    """The sum per class, Float32[C, F], and the upper triangle of the Gram matrix, Float32[F (F + 1) / 2]."""
    one_hot = F.one_hot(targets, num_classes).double()
    return (one_hot.T @ features).float(), (features.T @ features)[_triangle(features.shape[1])].float()


def joined_statistics(parts: Sequence[tuple[FeatureStatistics, Sequence[int]]], num_classes: int) -> FeatureStatistics:
    """The statistics of several tasks' images as one task, given the class that each class of a task becomes.

    Layer features are left out unless all have them. The order of the parts does not change a bit.
    """
    parts = sorted(parts, key=lambda part: (part[0].sha256, list(part[1])))
    classes = [torch.tensor(part, dtype=torch.int64, device="cpu") for _, part in parts]

    def by_class(tensors: Sequence[Tensor]) -> Tensor:
        """The sum of rows that become one class."""
        total = torch.zeros(num_classes, *tensors[0].shape[1:], dtype=torch.float64, device="cpu")
        for rows, tensor in zip(classes, tensors, strict=True):
            total.index_add_(0, rows, tensor.double())
        return total

    def added(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensor.double() for tensor in tensors]).sum(0).float()

    of_tasks = [statistics for statistics, _ in parts]
    joined = FeatureStatistics(
        by_class([task.counts for task in of_tasks]).long(),
        by_class([task.sums for task in of_tasks]).float(),
        added([task.gram for task in of_tasks]),
        torch.cat([task.sample for task in of_tasks]),
        torch.cat([rows[task.sample_targets] for rows, task in zip(classes, of_tasks, strict=True)]),
    )
    layers = [task.layers for task in of_tasks if task.layers is not None]
    if len(layers) < len(parts) or len({sums.shape[1] for sums, _, _ in layers}) != 1:
        return joined
    sums, grams, samples = zip(*layers, strict=True)
    return replace(joined, layer_sums=by_class(sums).float(), layer_gram=added(grams), layer_sample=torch.cat(samples))


def can_be_routed(statistics: FeatureStatistics, width: int) -> bool:
    """Whether the statistics are of features of this width, with the expansion of this version."""
    expanded = width + projection(width).shape[1]
    return statistics.sample.shape[1] == width and statistics.sums.shape[1] == expanded


class Moments(NamedTuple):
    """Sums over the features of many images, in float64."""

    counts: Float64[Tensor, " C"]
    sums: Float64[Tensor, "C F"]
    gram: Float64[Tensor, "F F"]

    @classmethod
    def sum(cls, counts: list[Tensor], sums: list[Tensor], triangles: list[Tensor]) -> Moments:
        """Combines tasks: concatenates their classes and adds their Gram matrices, given as upper triangles."""
        size = sums[0].shape[1]
        upper = torch.zeros_like(triangles[0], dtype=torch.float64)
        for triangle in triangles:
            upper += triangle.double()
        gram = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        gram[_triangle(size)] = upper
        return cls(torch.cat(counts).double(), torch.cat(sums).double(), gram + gram.triu(1).T)

    def without(self, features: Float64[Tensor, "K F"], targets: Int64[Tensor, " K"]) -> Moments:
        """Subtracts some of the images."""
        one_hot = F.one_hot(targets, len(self.counts)).double()
        return Moments(
            self.counts - one_hot.sum(0), self.sums - one_hot.T @ features, self.gram - features.T @ features
        )

    def first(self, width: int) -> Moments:
        """The sums over the first `width` features."""
        return Moments(self.counts, self.sums[:, :width], self.gram[:width, :width])


def expand(pooled: Float[Tensor, "N D"]) -> Float64[Tensor, "N F"]:
    """Appends rectified random projections to the features."""
    features = double(pooled)
    return torch.cat([features, (features @ projection(features.shape[1])).relu()], dim=1)


def hash_layers(layers: Float[Tensor, "N n"], width: int) -> Float64[Tensor, "N H"]:
    """Scales each vector of D = `width` layer features to length 1, and adds up random groups with random signs.

    If their number is no multiple of D (stages of several widths), all of them are scaled as one vector.
    """
    width = layers.shape[1] if layers.shape[1] % width else width
    order, signs = _hashing(layers.shape[1])
    size = min(HASHED, layers.shape[1])
    hashed = []
    for chunk in layers.split(1024):
        unit = F.normalize(double(chunk).unflatten(1, (-1, width)), dim=2).flatten(1)
        hashed.append(F.pad((unit * signs)[:, order], (0, -len(order) % size)).unflatten(1, (-1, size)).sum(1))
    return torch.cat(hashed)


@lru_cache(maxsize=4)
def _hashing(num_features: int) -> tuple[Int64[Tensor, " n"], Float64[Tensor, " n"]]:
    """An order and signs of the layer features, which never change."""
    random = np.random.RandomState(0)
    order, signs = random.permutation(num_features), random.choice([-1.0, 1.0], num_features)
    return torch.tensor(order, dtype=torch.int64, device="cpu"), torch.tensor(signs, dtype=torch.float64, device="cpu")


@lru_cache(maxsize=4)
def projection(width: int) -> Float64[Tensor, "D R"]:
    """The random projection, which never changes: numpy guarantees the output of its legacy generator."""
    normal = np.random.RandomState(0).standard_normal((width, min(3 * width, max(RANDOM, WIDTH - width))))
    return torch.tensor(normal / width**0.5, dtype=torch.float64, device="cpu")


def _triangle(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size, dtype=torch.int64, device="cpu")
    return rows, columns


def double(pooled: Tensor) -> Float64[Tensor, "N D"]:
    """Converts features to float64 on the CPU; Apple's GPUs have no float64."""
    return pooled.cpu().double()
