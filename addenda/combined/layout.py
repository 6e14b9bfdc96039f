"""Where each task stands in the fixed tiles: slots, size classes, and which keys a slot sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from threading import Lock
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from addenda.backbones import Adapter, BlockAdapters, FrozenBackbone, KeyValue, plain
from addenda.combined.attention import memory_key_values
from addenda.registry import Task, check_unwritten

TILE = 16
"""Slots of the canonical tile. A product's bits may depend on its number of rows, so a tile is never cut to fit."""

TILE_SIZES = (4, 8, 12, 16, 32, 64)
"""Slots that a tile may have where the self-test proved the bits to be those of the canonical one."""

BATCH_SIZES = (1, 4)
"""Images of a batch that is smaller than the canonical one, likewise where the self-test proved it."""

TILE_OVERHEAD = 6
"""What one more tile costs, in slots: its calls, and the poorer arithmetic of few rows (docs/performance.md)."""

MIN_MEMORY = 4
"""Smallest class of memory keys but none: in products with fewer columns an image's bits depend on its place."""

MIN_RANK = 4
"""Smallest class of adapters but none: torch takes another path for smaller products, so at rank 2 a narrow one of four
images has other bits than one of eight."""

_LOCK = Lock()
"""Held while a store's table is read or added to: a server answers while another thread loads tasks."""


class SizeClass(NamedTuple):
    """Private token keys, memory keys, and the rank of adapters."""

    tokens: int
    memory: int
    rank: int = 0


def micro_batch(device: torch.device) -> int:
    """Images in the one canonical batch shape of a device."""
    return 64 if device.type == "cuda" else 8


@dataclass(frozen=True, eq=False)
class Tile:
    """Task slots of one size class, which pass every layer together.

    Attributes:
        class_tokens: the slots' first tokens, position and norm_pre included; zeros in empty slots.
        ancestors: for each slot the rows of the offered tokens that it sees; row 0 is none.
        bias: 0 for a real private key, -inf for filling; own token, ancestors, memory.
        memory: for each layer the keys and values of what the slot sees, [S, H, m, d].
        adapters: for each layer the slots' own, filled up to the rank of the class; zeros in empty slots. None where
            the class has none.
        slots: the slot of each of its tasks, by sha256, and how many memory tokens are its own.
    """

    class_tokens: Float[Tensor, "S D"]
    ancestors: Int[Tensor, "S a"]
    bias: Float[Tensor, "S w"]
    memory: tuple[KeyValue, ...]
    adapters: tuple[BlockAdapters, ...] | None
    slots: dict[str, tuple[int, int]]

    @property
    def rank(self) -> int:
        """Rank of its adapters, filling included; 0 without."""
        return 0 if self.adapters is None else self.adapters[0].q.down.shape[1]

    def block_adapters(self, layer: int) -> BlockAdapters | None:
        """The slots' adapters in one layer."""
        return None if self.adapters is None else self.adapters[layer]


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


class TileStore:
    """The tiles on a device, each built once for the layouts and models that share it, kept while one of them lives.

    Args:
        backbone: the backbone that all tasks were learned on.
    """

    def __init__(self, backbone: FrozenBackbone) -> None:
        self.backbone = backbone
        self._tiles: WeakValueDictionary[object, Tile] = WeakValueDictionary()

    def memory(self, task: Task) -> tuple[KeyValue, ...]:
        """For each layer the keys and values of a task's own memory, [H, m, d].

        They depend on no image: they are computed when the task is first loaded, alone, since their bits depend on
        the rows beside them.
        """
        with _LOCK:
            tiles = list(self._tiles.values())
        for tile in tiles:
            if task.sha256 in tile.slots:
                slot, own = tile.slots[task.sha256]
                return tuple(KeyValue(keys[slot, :, :own], values[slot, :, :own]) for keys, values in tile.memory)
        assert task.memory is not None
        memory = task.memory.to(self.backbone.device, self.backbone.precision)
        with plain(self.backbone.device):
            layers = [
                memory_key_values(self.backbone, block, rows.unsqueeze(0))
                for block, rows in zip(self.backbone.blocks, memory, strict=True)
            ]
        return tuple(KeyValue(keys[0], values[0]) for keys, values in layers)

    def tile(self, size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Tile:
        """A tile of some tasks of one size class, the rest of its slots empty.

        Args:
            size: its slots.
            tasks: at most as many.
            offered: row of each offered token, by its task's sha256.
        """
        rows = tuple(offered[kin.sha256] for task in tasks for kin in task.closure)
        key = (size, tuple(task.sha256 for task in tasks), rows)
        with _LOCK:
            tile = self._tiles.get(key)
        if tile is None:
            with plain(self.backbone.device):
                tile = self._build(size, tasks, offered)
            with _LOCK:
                self._tiles[key] = tile
        return tile

    def _build(self, size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Tile:
        backbone, (num_tokens, num_memory, rank) = self.backbone, size_class(tasks[0])
        shape = (size, backbone.num_heads, num_memory, backbone.embed_dim // backbone.num_heads)
        class_tokens = torch.zeros(size, backbone.embed_dim, dtype=torch.float32, device="cpu")
        ancestors = torch.zeros(size, num_tokens - 1, dtype=torch.long, device="cpu")
        bias = torch.full((size, num_tokens + num_memory), float("-inf"), dtype=torch.float32, device="cpu")
        bias[:, 0] = 0
        layers = tuple(
            KeyValue(*(torch.zeros(shape, device=backbone.device, dtype=backbone.precision) for _ in range(2)))
            for _ in backbone.blocks
        )
        for slot, task in enumerate(tasks):
            assert task.class_token is not None
            for member in (task, *task.closure):
                check_unwritten(member)
            class_tokens[slot] = task.class_token
            ancestors[slot, : len(task.closure)] = torch.tensor(
                [offered[kin.sha256] for kin in task.closure], dtype=torch.int64, device="cpu"
            )
            bias[slot, : 1 + len(task.closure)] = 0
            start = 0
            for member in (task, *task.closure):
                end = start + member.num_memory_tokens
                if end > start:
                    for into, rows in zip(layers, self.memory(member), strict=True):
                        into.keys[slot, :, start:end] = rows.keys
                        into.values[slot, :, start:end] = rows.values
                start = end
            bias[slot, num_tokens : num_tokens + start] = 0
        return Tile(
            class_tokens=backbone.first_tokens(class_tokens.to(backbone.device, backbone.precision)),
            ancestors=ancestors.to(backbone.device),
            bias=bias.to(backbone.device, backbone.precision),
            memory=layers,
            adapters=self._adapters(size, tasks, rank) if rank else None,
            slots={task.sha256: (slot, task.num_memory_tokens) for slot, task in enumerate(tasks)},
        )

    def _adapters(self, size: int, tasks: Sequence[Task], rank: int) -> tuple[BlockAdapters, ...]:
        """For each layer some tasks' adapters; zeros in what only fills up the rank, and in empty slots."""
        depth, device, dtype = self.backbone.depth, self.backbone.device, self.backbone.precision
        stacked: dict[str, tuple[Tensor, Tensor]] = {}
        for site, (fan_in, fan_out) in self.backbone.adapter_shapes().items():
            down = torch.zeros(depth, size, rank, fan_in, dtype=torch.float32, device="cpu")
            up = torch.zeros(depth, size, fan_out, rank, dtype=torch.float32, device="cpu")
            for slot, task in enumerate(tasks):
                assert task.adapters is not None
                down[:, slot, : task.adapter_rank] = task.adapters[site].down
                up[:, slot, :, : task.adapter_rank] = task.adapters[site].up
            stacked[site] = down.to(device, dtype), up.to(device, dtype)
        return tuple(
            BlockAdapters(**{site: Adapter(down[layer], up[layer]) for site, (down, up) in stacked.items()})
            for layer in range(depth)
        )


class Layout:
    """The slots and tiles of some tasks and all their ancestors.

    Tasks stand sorted by size class, and within one by the size of their closure, so that those whose tokens others see
    stand together.

    Args:
        store: where the tiles are kept.
        tasks: those asked for.
        sizes: the slots that a tile may have, ascending; None cuts tiles to their tasks, which is not exact.
        offered: tasks whose tokens' keys and values are wanted beside those that a task extends.
    """

    def __init__(
        self,
        store: TileStore,
        tasks: Sequence[Task],
        sizes: Sequence[int] | None = (TILE,),
        offered: Sequence[Task] = (),
    ) -> None:
        needed = {member.sha256: member for task in tasks for member in (*task.closure, task)}
        members = [task for task in needed.values() if task.class_token is not None]
        seen = dict.fromkeys(kin.sha256 for kin in (*(k for task in members for k in task.closure), *offered))
        self.offered = {sha256: row for row, sha256 in enumerate(seen, 1)}
        members.sort(key=lambda task: (size_class(task), len(task.closure)))
        self.tiles: list[Tile] = []
        for _, group in groupby(members, key=size_class):
            waiting = list(group)
            for size in _cut(len(waiting), sizes):
                self.tiles.append(store.tile(size, waiting[:size], self.offered))
                waiting = waiting[size:]
        self.slot = {
            sha256: (number, slot) for number, tile in enumerate(self.tiles) for sha256, (slot, _) in tile.slots.items()
        }
        self.offers = [self._offers(tile) for tile in self.tiles]

    def _offers(self, tile: Tile) -> tuple[list[int], list[int]]:
        """The slots of a tile whose tokens others see, and their rows."""
        pairs = [(slot, self.offered[sha256]) for sha256, (slot, _) in tile.slots.items() if sha256 in self.offered]
        return [slot for slot, _ in pairs], [row for _, row in pairs]


def _cut(count: int, sizes: Sequence[int] | None) -> list[int]:
    """Sizes of the tiles for some tasks of one class: few slots, few tiles."""
    if count == 0:
        return []
    if sizes is None:
        return [min(count, TILE_SIZES[-1]), *_cut(max(0, count - TILE_SIZES[-1]), None)]
    full, rest = [], count
    while rest > sizes[-1]:
        full.append(sizes[-1])
        rest -= sizes[-1]
    whole = next(size for size in sizes if size >= rest)
    smaller = [size for size in sizes if size < rest]
    if smaller:
        parts = [smaller[-1], *_cut(rest - smaller[-1], sizes)]
        if sum(parts) + TILE_OVERHEAD * len(parts) < whole + TILE_OVERHEAD:
            return [*full, *parts]
    return [*full, whole]
