"""All shapes that can change bits, and the rules that choose them.

The order of additions in a product depends on its shape, not on its values. So every task is computed in one of a few
shapes, padded with zeros, which depend on the task alone or were proven by the self-test to give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from addenda.registry import Task

TILE = 16
"""Slots of the canonical tile, which is always padded to this size: bits may depend on a product's number of rows."""

TILE_SIZES = (4, 8, 12, 16, 32, 64)
"""Tile sizes that are used if the self-test proves that they give the bits of the canonical one."""

TILE_OVERHEAD = 6
"""Overhead of one more tile, in slots: its calls, and less efficient products with few rows (docs/performance.md)."""

BATCH_SIZES = (1, 4)
"""Batch sizes below the canonical one that are used if the self-test proves them."""

MIN_MEMORY = 4
"""Smallest nonzero size of memory: with fewer columns, an image's bits depend on its position in the batch."""

MIN_RANK = 4
"""Smallest nonzero rank: torch uses another code path for smaller products, so that at rank 2 and a small width,
batches of four and eight images give different bits."""

HEAD_ROWS = 16
"""Heads are padded to a multiple of this: with fewer rows, an image's bits depend on its position in the batch."""


HEAD_GROUP = 32
"""Heads in a batched product, which is used where the self-test proves that each has the bits that it has alone."""

MAX_GROUPED_WEIGHTS = 2**20
"""A head of more weights is computed alone: its own product takes far longer than calling it."""


class HeadShape(NamedTuple):
    """All sizes of a head, including padding."""

    rows: int  # labels
    width: int  # of the feature
    pooled: bool  # whether it also reads the pooled feature
    num_layer_features: int  # 0 without a layer head
    rank: int  # of a low-rank layer head, otherwise 0

    @property
    def num_weights(self) -> int:
        """Number of weights."""
        of_layers = self.rank * (self.num_layer_features + self.rows) or self.num_layer_features * self.rows
        return self.rows * self.width * (1 + self.pooled) + of_layers


class SizeClass(NamedTuple):
    """Numbers of private token keys and memory keys, and adapter rank, including padding."""

    tokens: int
    memory: int
    rank: int = 0


class Shapes(NamedTuple):
    """Shapes that give every task the bits of the canonical ones."""

    images: tuple[int, ...]  # batch sizes, ascending; the last one is the canonical micro-batch
    slots: tuple[int, ...]  # tile sizes, ascending, including the canonical one
    heads: frozenset[HeadShape] = frozenset()  # computed in groups


def micro_batch(device: torch.device) -> int:
    """Number of images in a device's canonical micro-batch."""
    return 64 if device.type == "cuda" else 8


def batch_size(count: int, sizes: Sequence[int] | None) -> int:
    """Padded size of a batch of `count` images: the smallest sufficient size, or `count`, but not 0, without sizes."""
    return max(count, 1) if sizes is None else next(size for size in sizes if size >= count)


def size_class(task: Task) -> SizeClass:
    """Numbers of private token and memory keys and adapter rank of a task, each rounded up to a power of two.

    Nonzero memory and rank are at least MIN_MEMORY and MIN_RANK. The size class depends only on the task and its
    ancestors (but not on the ancestors' adapters), so tasks registered later never change it.
    """
    family = (task, *task.closure)
    num_memory = sum(member.num_memory_tokens for member in family)
    return SizeClass(
        tokens=_power_of_two(len(family)),
        memory=max(MIN_MEMORY, _power_of_two(num_memory)) if num_memory else 0,
        rank=max(MIN_RANK, _power_of_two(task.adapter_rank)) if task.adapter_rank else 0,
    )


def head_shape(task: Task) -> HeadShape:
    """The sizes of a task's head."""
    padded = -(-len(task.labels) // HEAD_ROWS) * HEAD_ROWS
    rank = 0 if task.layer_down is None else -(-len(task.layer_down) // HEAD_ROWS) * HEAD_ROWS
    width = task.head_weight.shape[1]
    return HeadShape(padded, width, task.pooled_weight is not None, task.num_layer_features, rank)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not less than a positive count."""
    return 1 << (count - 1).bit_length()


def tile_sizes(count: int, sizes: Sequence[int] | None) -> list[int]:
    """Tile sizes for `count` tasks of one size class, with little padding and few tiles; None for no padding."""
    largest = (sizes or TILE_SIZES)[-1]
    num_full, remainder = divmod(count, largest)
    full = [largest] * num_full
    if remainder == 0 or sizes is None:
        return [*full, remainder] if remainder else full
    single = next(size for size in sizes if size >= remainder)
    smaller = [size for size in sizes if size < remainder]
    if smaller:
        several = [smaller[-1], *tile_sizes(remainder - smaller[-1], sizes)]
        if sum(several) + TILE_OVERHEAD * len(several) < single + TILE_OVERHEAD:
            return [*full, *several]
    return [*full, single]
