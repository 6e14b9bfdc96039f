"""Feature statistics: sums over the features of a task's images, stored at registration for routers.

The sums are over the pooled feature with random projections (as in RanPAC), and over hashed layer features.

Source of feature hashing: Weinberger et al., ICML 2009, arXiv 0902.2206.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import zip_longest
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from addenda.registry import FeatureStatistics

WIDTH, RANDOM = 1024, 256
"""Width of the expanded feature (at most four times the feature's width), and its minimum number of projections."""
HASHED = 768
"""Width of the hashed layer features, if there are at least as many."""
SAMPLE = 64
"""Maximum features stored per task, on which penalty and temperatures are tuned."""


SAMPLES = ("sample", "layer_sample")
"""The tensors of statistics with a row for each image of the sample."""


def feature_statistics(
    pooled: Float[Tensor, "N D"],
    targets: Int64[Tensor, " N"],
    num_classes: int,
    layers: Float[Tensor, "N n"] | None = None,
    digests: Sequence[str] | None = None,
    earlier: FeatureStatistics | None = None,
) -> FeatureStatistics:
    """Sums the features of a task's images by class, in float64, and adds them to those of earlier images.

    The sample is a fifth of each class, at least one image of three, chosen by content; of classes that `earlier` has
    too, it counts all images and chooses among the new and the sampled ones. `digests` are the sha256 of the images.
    They, and then the layer statistics, are left out where the maximum size would otherwise be exceeded.
    """
    counts = targets.bincount(minlength=num_classes)
    sums, gram = _sums(expand(pooled), targets, num_classes)
    features = pooled.float().cpu()
    rows = _sampled(features, targets, counts if earlier is None else _plus(earlier.counts, counts))
    statistics = FeatureStatistics(counts, sums, gram, features[rows], targets[rows])
    if digests is not None:
        numbers = torch.tensor([*map(_prefix, digests)], dtype=torch.int64, device="cpu")
        statistics = replace(statistics, digests=_joined([numbers[targets == c] for c in range(num_classes)]))
    if layers is None or not layers.shape[1]:
        return _summed(statistics, earlier)
    hashed = hash_layers(layers, pooled.shape[1])
    sums, gram = _sums(hashed, targets, num_classes)
    chunks = (_vectors(chunk, pooled.shape[1]) for chunk in layers.split(1024))
    lengths, directions = zip(*((v.norm(dim=2).sum(0), F.normalize(v, dim=2).sum(0)) for v in chunks), strict=True)
    with_layers = replace(
        statistics,
        layer_sums=sums,
        layer_gram=gram,
        layer_sample=hashed[rows].float(),
        layer_lengths=torch.stack(lengths).sum(0).float(),
        layer_directions=torch.stack(directions).sum(0).flatten().float(),
    )
    return _summed(with_layers, earlier)


def _summed(new: FeatureStatistics, earlier: FeatureStatistics | None) -> FeatureStatistics:
    return _fitting(new) if earlier is None else added(earlier, _fitting(new))


def added(old: FeatureStatistics, new: FeatureStatistics) -> FeatureStatistics:
    """Statistics of the images of both; the classes of `new` are those of `old` and possibly more.

    The sums are those of all images at once, but for their rounding to float32, and so is the sample if no class has
    images on both sides; otherwise it may be smaller than `feature_statistics(earlier=old)` makes it, which sees all
    new images. What one side lacks is left out.
    """
    sample, targets = torch.cat([old.sample, new.sample]), torch.cat([old.sample_targets, new.sample_targets])
    rows = _sampled(sample, targets, _plus(old.counts, new.counts))
    tensors = {"sample_targets": targets[rows]}
    for name in old.tensors.keys() & new.tensors.keys() - {"sample_targets", "digests"}:
        first, second = old.tensors[name], new.tensors[name]
        tensors[name] = torch.cat([first, second])[rows] if name in SAMPLES else _plus(first, second)
    if old.digests is not None and new.digests is not None:
        halves = (
            each.split(counts.tolist()) for each, counts in ((old.digests, old.counts), (new.digests, new.counts))
        )
        tensors["digests"] = _joined([torch.cat(parts) for parts in zip_longest(*halves, fillvalue=_NO_DIGESTS)])
    return _fitting(FeatureStatistics(**tensors))


def _plus(old: Shaped[Tensor, "C ..."], new: Shaped[Tensor, "C_ ..."]) -> Shaped[Tensor, "C_ ..."]:
    """Adds sums in float64; `new` may have more rows."""
    total = new.double()
    total[: len(old)] += old.double()
    return total.to(new.dtype)


def _fitting(statistics: FeatureStatistics) -> FeatureStatistics:
    """Leaves out digests, and then layer statistics, where they would exceed the maximum size."""
    for prefix in ("digests", "layer_"):
        if statistics.excess is not None:
            kept = {name: each for name, each in statistics.tensors.items() if not name.startswith(prefix)}
            statistics = FeatureStatistics(**kept)
    return statistics


_NO_DIGESTS = torch.empty(0, dtype=torch.int64, device="cpu")


def known_classes(statistics: FeatureStatistics, digests: Sequence[str]) -> list[set[int]]:
    """The classes of each image among those that the statistics were summed over, by sha256; none of other images."""
    if statistics.digests is None:
        raise ValueError("The statistics have no digests.")
    known: dict[int, set[int]] = {}
    for label, numbers in enumerate(statistics.digests.split(statistics.counts.tolist())):
        for number in numbers.tolist():
            known.setdefault(number, set()).add(label)
    return [known.get(_prefix(digest), set()) for digest in digests]


def _prefix(digest: str) -> int:
    """The first eight bytes of a hexadecimal digest as a signed number."""
    return int.from_bytes(bytes.fromhex(digest[:16]), "big", signed=True)


def _joined(digests: Sequence[Int64[Tensor, " _"]]) -> Int64[Tensor, " N"]:
    return torch.cat([of_class.sort().values for of_class in digests])


def _sampled(features: Float[Tensor, "N D"], targets: Int64[Tensor, " N"], counts: Int64[Tensor, " C"]) -> list[int]:
    """The rows of the sample among some images of classes with these counts: at most two fewer than a class has."""
    sizes = counts.tolist()
    return [
        row
        for rank, row in _by_rank(features, targets)
        if rank < min(max(1, sizes[targets[row]] // 5), sizes[targets[row]] - 2)
    ][:SAMPLE]


def unsampled_classes(statistics: FeatureStatistics) -> list[int]:
    """The classes that the sample lacks, without which nothing should be tuned on it.

    A sample with an image of each of SAMPLE classes stands for the others, except those with too few images for one.
    """
    counts = statistics.counts
    lacking = statistics.sample_targets.bincount(minlength=len(counts)) == 0
    if (~lacking).sum() >= SAMPLE:
        lacking &= counts < 3
    return lacking.nonzero()[:, 0].tolist()


def _by_rank(features: Float[Tensor, "N D"], targets: Int64[Tensor, " N"]) -> list[tuple[int, int]]:
    """(rank within its class, row) of each image, in this order; ranks and equal ranks are by content.

    So the first rows of a union are the same whichever images were joined first, and in whatever order.
    """
    contents = [hashlib.sha256(row.numpy().tobytes()).digest() for row in features]
    seen: Counter[int] = Counter()
    ranked = []
    for row in sorted(range(len(contents)), key=contents.__getitem__):
        label = int(targets[row])
        ranked.append((seen[label], row))
        seen[label] += 1
    return sorted(ranked, key=itemgetter(0))


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
        sums = torch.zeros(num_classes, *tensors[0].shape[1:], dtype=torch.float64, device="cpu")
        for rows, tensor in zip(classes, tensors, strict=True):
            sums.index_add_(0, rows, tensor.double())
        return sums

    def total(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensor.double() for tensor in tensors]).sum(0).float()

    of_tasks = [statistics for statistics, _ in parts]
    joined = FeatureStatistics(
        by_class([task.counts for task in of_tasks]).long(),
        by_class([task.sums for task in of_tasks]).float(),
        total([task.gram for task in of_tasks]),
        torch.cat([task.sample for task in of_tasks]),
        torch.cat([rows[task.sample_targets] for rows, task in zip(classes, of_tasks, strict=True)]),
    )
    layers = [task.layers for task in of_tasks if task.layers is not None]
    if len(layers) < len(parts) or len({sums.shape[1] for sums, _, _ in layers}) != 1:
        return joined
    sums, grams, samples = zip(*layers, strict=True)
    return replace(joined, layer_sums=by_class(sums).float(), layer_gram=total(grams), layer_sample=torch.cat(samples))


def can_be_routed(statistics: FeatureStatistics, width: int) -> bool:
    """Whether the statistics are of features of this width, with the expansion of this version."""
    expanded = width + projection(width).shape[1]
    return statistics.sample.shape[1] == width and statistics.sums.shape[1] == expanded


def can_be_grown(statistics: FeatureStatistics, width: int, num_layer_features: int) -> bool:
    """Whether the statistics are of features of these widths, with the expansion and the hashing of this version."""
    sizes = {
        "layer_sums": min(HASHED, num_layer_features),
        "layer_lengths": _num_vectors(num_layer_features, width),
        "layer_directions": num_layer_features,
    }
    return can_be_routed(statistics, width) and all(
        statistics.tensors[name].shape[-1] == size for name, size in sizes.items() if name in statistics.tensors
    )


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
    """Scales each vector of layer features to length 1, and adds up random groups with random signs."""
    order, signs = _hashing(layers.shape[1])
    size = min(HASHED, layers.shape[1])
    hashed = []
    for chunk in layers.split(1024):
        unit = F.normalize(_vectors(chunk, width), dim=2).flatten(1)
        hashed.append(F.pad((unit * signs)[:, order], (0, -len(order) % size)).unflatten(1, (-1, size)).sum(1))
    return torch.cat(hashed)


def unhashed(weight: Float64[Tensor, "C H"], num_features: int) -> Float64[Tensor, "C n"]:
    """The weight on layer features, if scaled as in `hash_layers`, that equals a weight on hashed layer features."""
    order, signs = _hashing(num_features)
    unhashed = torch.empty(len(weight), num_features, dtype=torch.float64, device="cpu")
    unhashed[:, order] = weight.repeat(1, -(-num_features // weight.shape[1]))[:, :num_features]
    return unhashed * signs


def _vectors(layers: Float[Tensor, "N n"], width: int) -> Float64[Tensor, "N V D"]:
    vectors: Tensor = double(layers).unflatten(1, (_num_vectors(layers.shape[1], width), -1))
    return vectors


def _num_vectors(num_features: int, width: int) -> int:
    """Into how many vectors layer features are divided: of width D, or a single one for stages of several widths."""
    return 1 if num_features % width else num_features // width


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
