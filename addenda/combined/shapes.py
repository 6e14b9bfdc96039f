"""Every shape that bits depend on and the rules that choose one: all else reads them here, the self-test tries them.

A product's order of additions depends on its shape, never on the numbers in it. So all that a task computes runs in a
few shapes, filled up with zeros, which the task alone decides or which were proven to give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from addenda.registry import Task

TILE = 16
"""Slots of the canonical tile. A product's bits may depend on its number of rows, so a tile is never cut to fit."""

TILE_SIZES = (4, 8, 12, 16, 32, 64)
"""Slots that a tile may have where the self-test proved the bits to be those of the canonical one."""

TILE_OVERHEAD = 6
"""What one more tile costs, in slots: its calls, and the poorer arithmetic of few rows (docs/performance.md)."""

BATCH_SIZES = (1, 4)
"""Images of a batch that is smaller than the canonical one, likewise where the self-test proved it."""

MIN_MEMORY = 4
"""Smallest class of memory keys but none: in products with fewer columns an image's bits depend on its place."""

MIN_RANK = 4
"""Smallest class of adapters but none: torch takes another path for smaller products, so at rank 2 a narrow one of four
images has other bits than one of eight."""

HEAD_ROWS = 16
"""A head is filled up to a multiple of so many rows: in narrower products an image's bits depend on its place."""


class SizeClass(NamedTuple):
    """Private token keys, memory keys, and the rank of adapters."""

    tokens: int
    memory: int
    rank: int = 0


class Shapes(NamedTuple):
    """The shapes that give every task the bits of the canonical ones."""

    images: tuple[int, ...]  # batch sizes, ascending; the last is the canonical micro-batch
    slots: tuple[int, ...]  # tile sizes, ascending, the canonical one among them


def micro_batch(device: torch.device) -> int:
    """Images in the one canonical batch shape of a device."""
    return 64 if device.type == "cuda" else 8


def batch_size(count: int, sizes: Sequence[int] | None) -> int:
    """Images of the batch in which some are computed: the smallest of the sizes that holds them; None fills none up."""
    return count if sizes is None else next(size for size in sizes if size >= count)


def size_class(task: Task) -> SizeClass:
    """Private token and memory keys of a task and its adapters' rank, each rounded up to a power of two.

    Memory and rank are none, or MIN_MEMORY and MIN_RANK at least. The class depends on the task and its ancestors
    alone, so that a wider task registered later widens no older one. Ancestors' adapters are their own affair.
    """
    family = (task, *task.closure)
    num_memory = sum(member.num_memory_tokens for member in family)
    return SizeClass(
        tokens=_power_of_two(len(family)),
        memory=max(MIN_MEMORY, _power_of_two(num_memory)) if num_memory else 0,
        rank=max(MIN_RANK, _power_of_two(task.adapter_rank)) if task.adapter_rank else 0,
    )


def _power_of_two(count: int) -> int:
    """The smallest that is not less than a positive count."""
    return 1 << (count - 1).bit_length()


def tile_sizes(count: int, sizes: Sequence[int] | None) -> list[int]:
    """Slots of the tiles for some tasks of one class: few slots, few tiles. None has no slot empty."""
    largest = (sizes or TILE_SIZES)[-1]
    num_full, rest = divmod(count, largest)
    full = [largest] * num_full
    if rest == 0 or sizes is None:
        return [*full, rest] if rest else full
    whole = next(size for size in sizes if size >= rest)
    smaller = [size for size in sizes if size < rest]
    if smaller:
        parts = [smaller[-1], *tile_sizes(rest - smaller[-1], sizes)]
        if sum(parts) + TILE_OVERHEAD * len(parts) < whole + TILE_OVERHEAD:
            return [*full, *parts]
    return [*full, whole]
