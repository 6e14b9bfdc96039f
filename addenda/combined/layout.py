"""Where each task stands in the fixed tiles: slots, size classes, and which keys a slot sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined.attention import memory_key_values
from addenda.registry import Task

TILE = 8
"""Task slots in a tile. A GEMM's bits depend on its number of rows, so every tile has this many, filled or not."""

MIN_MEMORY = 4
"""Smallest class of memory keys but none: in products with fewer columns an image's bits depend on its place."""


@dataclass(frozen=True)
class Tile:
    """TILE slots of one size class.

    Attributes:
        class_tokens: the slots' first tokens, position and norm_pre included; zeros in empty slots.
        visible: for each slot the slots whose tokens it sees, itself first; filled up with itself.
        bias: 0 for a real private key, -inf for filling, tokens then memory.
        memory: for each layer the keys and values of what the slot sees, [TILE, H, m, d].
    """

    class_tokens: Float[Tensor, "S D"]
    visible: Int[Tensor, "S t"]
    bias: Float[Tensor, "S w"]
    memory: tuple[KeyValue, ...]


def size_class(task: Task) -> tuple[int, int]:
    """Private token and memory keys of a task, each rounded up to a power of two; memory to MIN_MEMORY at least.

    It depends on the task and its ancestors alone, so that a wider task registered later widens no older one.
    """
    family = (task, *task.closure)
    num_memory = sum(member.num_memory_tokens for member in family)
    return 1 << (len(family) - 1).bit_length(), max(MIN_MEMORY, 1 << (num_memory - 1).bit_length()) if num_memory else 0


class MemoryCache:
    """Memory keys and values, computed once for each task, alone: their bits depend on the rows beside them."""

    def __init__(self, backbone: FrozenBackbone) -> None:
        self._backbone = backbone
        self._known: dict[str, tuple[KeyValue, ...]] = {}

    def __call__(self, task: Task) -> tuple[KeyValue, ...]:
        """For each layer the keys and values of a task's own memory, [H, m, d]."""
        if task.sha256 not in self._known:
            assert task.memory is not None
            memory = task.memory.to(self._backbone.device, self._backbone.precision)
            with torch.no_grad():
                layers = (
                    memory_key_values(self._backbone, block, rows.unsqueeze(0))
                    for block, rows in zip(self._backbone.blocks, memory, strict=True)
                )
                self._known[task.sha256] = tuple(KeyValue(keys[0], values[0]) for keys, values in layers)
        return self._known[task.sha256]


class Layout:
    """The slots and tiles of some tasks and all their ancestors.

    Args:
        backbone: the backbone that all were learned on.
        tasks: those asked for.
        memory: the memory keys and values already computed.
    """

    def __init__(self, backbone: FrozenBackbone, tasks: Sequence[Task], memory: MemoryCache) -> None:
        needed = {member.sha256: member for task in tasks for member in (*task.closure, task)}
        classes: dict[tuple[int, int], list[Task]] = {}
        for task in needed.values():
            if task.class_token is not None:
                classes.setdefault(size_class(task), []).append(task)
        groups = [
            (width, members[start : start + TILE])
            for width, members in classes.items()
            for start in range(0, len(members), TILE)
        ]
        self.slot = {
            task.sha256: number * TILE + place
            for number, (_, group) in enumerate(groups)
            for place, task in enumerate(group)
        }
        self.tiles = [
            self._tile(backbone, memory, number * TILE, width, group) for number, (width, group) in enumerate(groups)
        ]

    def _tile(
        self, backbone: FrozenBackbone, memory: MemoryCache, first: int, width: tuple[int, int], group: list[Task]
    ) -> Tile:
        num_tokens, num_memory = width
        head_dim = backbone.embed_dim // backbone.num_heads
        class_tokens = torch.zeros(TILE, backbone.embed_dim)
        visible = torch.arange(first, first + TILE).unsqueeze(1).repeat(1, num_tokens)
        bias = torch.full((TILE, num_tokens + num_memory), float("-inf"))
        bias[:, 0] = 0
        shape = (TILE, backbone.num_heads, num_memory, head_dim)
        device, dtype = backbone.device, backbone.precision

        def zeros() -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        layers = tuple(KeyValue(zeros(), zeros()) for _ in backbone.blocks)
        for place, task in enumerate(group):
            assert task.class_token is not None
            class_tokens[place] = task.class_token
            family = (task, *task.closure)
            visible[place, : len(family)] = torch.tensor([self.slot[member.sha256] for member in family])
            bias[place, : len(family)] = 0
            start = 0
            for member in family:
                end = start + member.num_memory_tokens
                if end > start:
                    for into, rows in zip(layers, memory(member), strict=True):
                        into.keys[place, :, start:end] = rows.keys
                        into.values[place, :, start:end] = rows.values
                bias[place, num_tokens + start : num_tokens + end] = 0
                start = end
        return Tile(
            class_tokens=backbone.first_tokens(class_tokens.to(device, dtype)),
            visible=visible.to(device),
            bias=bias.to(device, dtype),
            memory=layers,
        )
