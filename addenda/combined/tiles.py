"""Where each task stands in the tiles of fixed size: its slot, the keys that it sees, and its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from threading import Lock
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from addenda.backbones import Adapter, BlockAdapters, FrozenBackbone, KeyValue, plain
from addenda.combined.attention import memory_key_values
from addenda.combined.shapes import TILE, size_class, tile_sizes
from addenda.registry import Task, check_unwritten

_LOCK = Lock()
"""Held while a store's table is read or added to: a server answers while another thread loads tasks."""


@dataclass(frozen=True, eq=False)
class Tile:
    """Task slots of one size class, which pass every layer together.

    Its memory and adapters are its own, or are those of slots of other tiles: then they are copied layer by layer as
    they pass, and never kept.
    """

    class_tokens: Float[Tensor, "S D"]  # the slots' first tokens, position and norm_pre included
    ancestors: Int[Tensor, "S a"]  # for each slot the rows of the offered tokens that it sees; row 0 is none
    bias: Float[Tensor, "S w"]  # 0 for a real private key, -inf for filling; own token, ancestors, memory
    rank: int  # of its adapters, filling included; 0 without
    slots: dict[str, int]  # the slot of each of its tasks, by sha256
    memories: tuple[KeyValue, ...] = ()  # of each layer, [S, H, m, d]
    updates: tuple[BlockAdapters, ...] = ()  # of each layer, filled up to `rank` with zeros; none where it is 0
    sources: tuple[tuple[Tile, Tensor, Tensor], ...] = ()  # other tiles, the slots drawn from each, and those here

    def memory(self, layer: int) -> KeyValue:
        """The keys and values of what each slot sees of memory in one layer, [S, H, m, d]."""
        if not self.sources:
            return self.memories[layer]
        return KeyValue(*map(self._draw, zip(*(tile.memory(layer) for tile, _, _ in self.sources), strict=True)))

    def adapters(self, layer: int) -> BlockAdapters | None:
        """The slots' adapters in one layer; None where `rank` is 0."""
        if not self.rank:
            return None
        if not self.sources:
            return self.updates[layer]
        sites = zip(*(tile.adapters(layer) or () for tile, _, _ in self.sources), strict=True)
        return BlockAdapters(*(Adapter(*map(self._draw, zip(*of_site, strict=True))) for of_site in sites))

    def _draw(self, parts: Sequence[Tensor]) -> Tensor:
        drawn = parts[0].new_zeros(len(self.bias), *parts[0].shape[1:])
        for part, (_, theirs, here) in zip(parts, self.sources, strict=True):
            drawn[here] = part[theirs]
        return drawn


class TileStore:
    """The tiles on a device, each built once for the layouts and models that share it, kept while one of them lives."""

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
                slot, own = tile.slots[task.sha256], task.num_memory_tokens
                return tuple(KeyValue(keys[slot, :, :own], values[slot, :, :own]) for keys, values in tile.memories)
        assert task.memory is not None
        memory = task.memory.to(self.backbone.device, self.backbone.precision)
        with plain(self.backbone.device):
            layers = [
                memory_key_values(self.backbone, block, rows.unsqueeze(0))
                for block, rows in zip(self.backbone.blocks, memory, strict=True)
            ]
        return tuple(KeyValue(keys[0], values[0]) for keys, values in layers)

    def tile(self, size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Tile:
        """A tile of at most `size` tasks of one size class, other slots empty: one that is held already, or a new one.

        `offered` gives the row of each offered token, by its task's sha256.
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
                    for into, rows in zip(layers, self.memory(member), strict=True):
                        into.keys[slot, :, start:end] = rows.keys
                        into.values[slot, :, start:end] = rows.values
                start = end
            bias[slot, num_tokens : num_tokens + start] = 0
        return Tile(
            class_tokens=backbone.first_tokens(class_tokens.to(backbone.device, backbone.precision)),
            ancestors=_ancestors(size, tasks, offered).to(backbone.device),
            bias=bias.to(backbone.device, backbone.precision),
            rank=rank,
            slots={task.sha256: slot for slot, task in enumerate(tasks)},
            memories=layers,
            updates=self._adapters(size, tasks, rank) if rank else (),
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
    stand together. A layout is a source of tiles too: one of some of its tasks copies nothing that it keeps.

    Args:
        source: a store, or a layout that holds all these tasks.
        tasks: those asked for.
        sizes: the slots that a tile may have, ascending; None cuts tiles to their tasks, which is not exact.
        offered: tasks whose tokens' keys and values are wanted beside those that a task extends.
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
        seen = dict.fromkeys(kin.sha256 for kin in (*(k for task in members for k in task.closure), *offered))
        self.offered = {sha256: row for row, sha256 in enumerate(seen, 1)}
        members.sort(key=lambda task: (size_class(task), len(task.closure)))
        self.tiles: list[Tile] = []
        for _, group in groupby(members, key=size_class):
            waiting = list(group)
            for size in tile_sizes(len(waiting), sizes):
                self.tiles.append(source.tile(size, waiting[:size], self.offered))
                waiting = waiting[size:]
        self.slot = {sha256: (i, slot) for i, tile in enumerate(self.tiles) for sha256, slot in tile.slots.items()}
        # The slots of each tile whose tokens others see, and their rows.
        self.offers = [
            [(slot, self.offered[sha256]) for sha256, slot in tile.slots.items() if sha256 in self.offered]
            for tile in self.tiles
        ]

    def tile(self, size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Tile:
        """As `TileStore.tile`, of tasks that are here: its slots are drawn from theirs."""
        drawn: dict[int, list[tuple[int, int]]] = {}
        for place, task in enumerate(tasks):
            number, slot = self.slot[task.sha256]
            drawn.setdefault(number, []).append((slot, place))
        first = self.tiles[next(iter(drawn))]
        class_tokens = first.class_tokens.new_zeros(size, first.class_tokens.shape[1])
        bias = torch.full_like(first.bias[:1], float("-inf")).repeat(size, 1)
        bias[:, 0] = 0
        sources = []
        for number, pairs in drawn.items():
            theirs, here = torch.tensor(pairs, dtype=torch.int64, device="cpu").to(bias.device).unbind(1)
            class_tokens[here], bias[here] = self.tiles[number].class_tokens[theirs], self.tiles[number].bias[theirs]
            sources.append((self.tiles[number], theirs, here))
        return Tile(
            class_tokens=class_tokens,
            ancestors=_ancestors(size, tasks, offered).to(bias.device),
            bias=bias,
            rank=first.rank,
            slots={task.sha256: slot for slot, task in enumerate(tasks)},
            sources=tuple(sources),
        )


def _ancestors(size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Int[Tensor, "S a"]:
    """For each slot the rows of the offered tokens that it sees, as wide as its size class."""
    width = size_class(tasks[0]).tokens - 1
    rows = [[offered[kin.sha256] for kin in task.closure] for task in tasks]
    filled = [row + [0] * (width - len(row)) for row in rows] + [[0] * width] * (size - len(rows))
    return torch.tensor(filled, dtype=torch.int64, device="cpu")
