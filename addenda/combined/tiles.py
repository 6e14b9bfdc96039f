"""Tiles of fixed size: each task's slot, visible private keys and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from addenda.backbones import Adapter, BlockAdapters, FrozenBackbone, KeyValue, plain
from addenda.combined.shapes import TILE, size_class, tile_sizes
from addenda.registry import Task, check_unwritten

_LOCK = Lock()
"""Guards a store's table of tiles: a server predicts while another thread loads tasks."""


@dataclass(frozen=True, eq=False)
class Tile:
    """Slots for tasks of one size class, which run through every layer together.

    A tile stores its memory and adapters, or refers to slots of other tiles; these are then copied for one layer at a
    time and not stored.
    """

    class_tokens: Float[Tensor, "S D"]  # first-layer inputs of the slots, with position embedding and norm_pre
    ancestors: Int[Tensor, "S a"]  # for each slot, rows of the offered tokens that it sees; row 0 is padding
    bias: Float[Tensor, "S w"]  # 0 for a real private key, -inf for padding; own token, ancestors, memory
    rank: int  # padded adapter rank; 0 without adapters
    slots: dict[str, int]  # slot of each task, by sha256
    memories: tuple[KeyValue, ...] = ()  # per layer, [S, H, m, d]
    updates: tuple[BlockAdapters, ...] = ()  # per layer, padded to `rank` with zeros; empty if `rank` is 0
    sources: tuple[tuple[Tile, Tensor, Tensor], ...] = ()  # other tiles, slots in each of them, slots in this tile

    def memory(self, layer: int) -> KeyValue:
        """Keys and values of the memory visible to each slot in one layer, [S, H, m, d]."""
        if not self.sources:
            return self.memories[layer]
        return KeyValue(*map(self._gather, zip(*(tile.memory(layer) for tile, _, _ in self.sources), strict=True)))

    def adapters(self, layer: int) -> BlockAdapters | None:
        """The slots' adapters in one layer; None if `rank` is 0."""
        if not self.rank:
            return None
        if not self.sources:
            return self.updates[layer]
        sites = zip(*(tile.adapters(layer) or () for tile, _, _ in self.sources), strict=True)
        return BlockAdapters(*(Adapter(*map(self._gather, zip(*adapters, strict=True))) for adapters in sites))

    def _gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copies slots from one tensor per source tile; unused slots are zeros."""
        gathered = tensors[0].new_zeros(len(self.bias), *tensors[0].shape[1:])
        for tensor, (_, source_slots, own_slots) in zip(tensors, self.sources, strict=True):
            gathered[own_slots] = tensor[source_slots]
        return gathered


class TileStore:
    """The tiles on a device; each is shared by layouts and models, and freed with the last of them."""

    def __init__(self, backbone: FrozenBackbone) -> None:
        self.backbone = backbone
        self._tiles: WeakValueDictionary[object, Tile] = WeakValueDictionary()

    def memory(self, task: Task) -> tuple[KeyValue, ...]:
        """Keys and values of a task's own memory, [H, m, d], for each layer.

        They do not depend on images. They are computed once per task and separately, because their bits depend on the
        number of rows.
        """
        with _LOCK:
            tiles = list(self._tiles.values())
        for tile in tiles:
            if task.sha256 in tile.slots:
                slot, count = tile.slots[task.sha256], task.num_memory_tokens
                return tuple(KeyValue(keys[slot, :, :count], values[slot, :, :count]) for keys, values in tile.memories)
        assert task.memory is not None
        memory = task.memory.to(self.backbone.device, self.backbone.precision)
        with plain(self.backbone.device):
            layers = [
                memory_key_values(self.backbone, block, rows.unsqueeze(0))
                for block, rows in zip(self.backbone.blocks, memory, strict=True)
            ]
        return tuple(KeyValue(keys[0], values[0]) for keys, values in layers)

    def tile(self, size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Tile:
        """Returns the existing or a new tile with `size` slots for tasks of one size class; unused slots are empty.

        `offered` maps the sha256 of a task to the row of its offered token.
        """
        rows = tuple(offered[ancestor.sha256] for task in tasks for ancestor in task.closure)
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
        bias = torch.full((size, num_tokens + num_memory), float("-inf"), dtype=torch.float32, device="cpu")
        bias[:, 0] = 0
        layers = tuple(
            KeyValue(*(torch.zeros(shape, device=backbone.device, dtype=backbone.precision) for _ in range(2)))
            for _ in backbone.blocks
        )
        for slot, task in enumerate(tasks):
            assert task.class_token is not None
            class_tokens[slot] = task.class_token
            bias[slot, : 1 + len(task.closure)] = 0
            start = 0
            for member in (task, *task.closure):
                check_unwritten(member)
                end = start + member.num_memory_tokens
                if end > start:
                    for layer, memory in zip(layers, self.memory(member), strict=True):
                        layer.keys[slot, :, start:end] = memory.keys
                        layer.values[slot, :, start:end] = memory.values
                start = end
            bias[slot, num_tokens : num_tokens + start] = 0
        return Tile(
            class_tokens=backbone.first_tokens(class_tokens.to(backbone.device, backbone.precision)),
            ancestors=_ancestor_rows(size, tasks, offered).to(backbone.device),
            bias=bias.to(backbone.device, backbone.precision),
            rank=rank,
            slots={task.sha256: slot for slot, task in enumerate(tasks)},
            memories=layers,
            updates=self._stack_adapters(size, tasks, rank) if rank else (),
        )

    def _stack_adapters(self, size: int, tasks: Sequence[Task], rank: int) -> tuple[BlockAdapters, ...]:
        """The tasks' adapters for each layer; padding of the rank and empty slots are zeros."""
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
    """Assigns some tasks and all their ancestors to slots of tiles.

    Tasks are sorted by size class, then by number of ancestors, so that tasks extended by others share tiles. A layout
    is also a source of tiles: a layout of a subset of its tasks stores no copies.

    Args:
        source: a store, or a layout that contains all these tasks.
        tasks: the tasks.
        sizes: allowed numbers of slots of a tile, ascending; None uses exactly as many as tasks, which is not exact.
        offered: tasks whose tokens are offered, in addition to those that a task extends.
    """

    def __init__(
        self,
        source: TileStore | Layout,
        tasks: Sequence[Task],
        sizes: Sequence[int] | None = (TILE,),
        offered: Sequence[Task] = (),
    ) -> None:
        self.tasks = tuple(tasks)
        needed = {member.sha256: member for task in tasks for member in (*task.closure, task)}
        members = [task for task in needed.values() if task.class_token is not None]
        extended = [ancestor for task in members for ancestor in task.closure]
        offered_sha256 = dict.fromkeys(task.sha256 for task in (*extended, *offered))
        self.offered = {sha256: row for row, sha256 in enumerate(offered_sha256, 1)}
        members.sort(key=lambda task: (size_class(task), len(task.closure)))
        self.tiles: list[Tile] = []
        for _, group in groupby(members, key=size_class):
            remaining = list(group)
            for size in tile_sizes(len(remaining), sizes):
                self.tiles.append(source.tile(size, remaining[:size], self.offered))
                remaining = remaining[size:]
        self.slot = {sha256: (i, slot) for i, tile in enumerate(self.tiles) for sha256, slot in tile.slots.items()}
        # For each tile, the slots with offered tokens and the rows of these.
        self.offers = [
            [(slot, self.offered[sha256]) for sha256, slot in tile.slots.items() if sha256 in self.offered]
            for tile in self.tiles
        ]

    def tile(self, size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Tile:
        """Like `TileStore.tile`, for tasks of this layout; the new tile refers to the slots of its tiles."""
        slot_pairs: dict[int, list[tuple[int, int]]] = {}
        for own_slot, task in enumerate(tasks):
            tile_index, source_slot = self.slot[task.sha256]
            slot_pairs.setdefault(tile_index, []).append((source_slot, own_slot))
        first = self.tiles[next(iter(slot_pairs))]
        class_tokens = first.class_tokens.new_zeros(size, first.class_tokens.shape[1])
        bias = torch.full_like(first.bias[:1], float("-inf")).repeat(size, 1)
        bias[:, 0] = 0
        sources = []
        for tile_index, pairs in slot_pairs.items():
            tile = self.tiles[tile_index]
            source_slots, own_slots = torch.tensor(pairs, dtype=torch.int64, device="cpu").to(bias.device).unbind(1)
            class_tokens[own_slots], bias[own_slots] = tile.class_tokens[source_slots], tile.bias[source_slots]
            sources.append((tile, source_slots, own_slots))
        return Tile(
            class_tokens=class_tokens,
            ancestors=_ancestor_rows(size, tasks, offered).to(bias.device),
            bias=bias,
            rank=first.rank,
            slots={task.sha256: slot for slot, task in enumerate(tasks)},
            sources=tuple(sources),
        )


def _ancestor_rows(size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Int[Tensor, "S a"]:
    """For each slot, the rows of its ancestors' offered tokens, padded with 0 to the size class."""
    width = size_class(tasks[0]).tokens - 1
    rows = [[offered[ancestor.sha256] for ancestor in task.closure] for task in tasks]
    padded = [row + [0] * (width - len(row)) for row in rows] + [[0] * width] * (size - len(rows))
    return torch.tensor(padded, dtype=torch.int64, device="cpu")


def memory_key_values(backbone: FrozenBackbone, block: Any, memory: Float[Tensor, "S m D"]) -> KeyValue:
    """Keys and values of memory tokens, [S, H, m, d], computed by norm1 and qkv as for any token."""
    _, keys, values = backbone.family.project(block, memory)
    return KeyValue(keys, values)
