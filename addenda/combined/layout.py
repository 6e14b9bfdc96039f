"""Where each task stands in the fixed tiles: slots, size classes, and which keys a slot sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined.attention import memory_key_values
from addenda.registry import Task

TILE = 16
"""Task slots in a tile. A product's bits depend on its number of rows, so every tile has this many, filled or not."""

WIDE_TILE = 64
"""Slots of a tile that serves where many tasks of one size class stand together and its bits proved to be the same."""

MIN_MEMORY = 4
"""Smallest class of memory keys but none: in products with fewer columns an image's bits depend on its place."""

SizeClass = tuple[int, int]
"""Private token keys and memory keys."""


@dataclass(frozen=True, eq=False)
class Group:
    """The slots of one size class within a tile. Its attention runs over the whole tile, in the class's own width.

    Attributes:
        slots: where they stand in the tile.
        ancestors: for each slot of the tile the rows of the offered tokens that it sees; row 0 is none.
        bias: 0 for a real private key, -inf for filling; own token, ancestors, memory.
        memory: for each layer the keys and values of what the slot sees, [S, H, m, d].
    """

    slots: slice
    ancestors: Int[Tensor, "S a"]
    bias: Float[Tensor, "S w"]
    memory: tuple[KeyValue, ...]


@dataclass(frozen=True, eq=False)
class Tile:
    """Some task slots whose tokens pass the linear layers together.

    Attributes:
        class_tokens: the slots' first tokens, position and norm_pre included; zeros in empty slots.
        groups: the size classes in it.
        places: the slot of each of its tasks, by sha256.
        own_memory: where each of its tasks' own memory lies in the groups' memory, by sha256.
    """

    class_tokens: Float[Tensor, "S D"]
    groups: tuple[Group, ...]
    places: dict[str, int]
    own_memory: dict[str, tuple[KeyValue, ...]]


def size_class(task: Task) -> SizeClass:
    """Private token and memory keys of a task, each rounded up to a power of two; memory to MIN_MEMORY at least.

    It depends on the task and its ancestors alone, so that a wider task registered later widens no older one.
    """
    family = (task, *task.closure)
    num_memory = sum(member.num_memory_tokens for member in family)
    return 1 << (len(family) - 1).bit_length(), max(MIN_MEMORY, 1 << (num_memory - 1).bit_length()) if num_memory else 0


class TileStore:
    """The tiles on a device, each built once for all the layouts and models that share it.

    Args:
        backbone: the backbone that all tasks were learned on.
    """

    def __init__(self, backbone: FrozenBackbone) -> None:
        self.backbone = backbone
        self._tiles: WeakValueDictionary[object, Tile] = WeakValueDictionary()
        self._homes: WeakValueDictionary[str, Tile] = WeakValueDictionary()

    def memory(self, task: Task) -> tuple[KeyValue, ...]:
        """For each layer the keys and values of a task's own memory, [H, m, d].

        They depend on no image: they are computed when the task is first loaded, alone, since their bits depend on
        the rows beside them.
        """
        home = self._homes.get(task.sha256)
        if home is not None:
            return home.own_memory[task.sha256]
        assert task.memory is not None
        memory = task.memory.to(self.backbone.device, self.backbone.precision)
        with torch.no_grad():
            layers = [
                memory_key_values(self.backbone, block, rows.unsqueeze(0))
                for block, rows in zip(self.backbone.blocks, memory, strict=True)
            ]
        return tuple(KeyValue(keys[0], values[0]) for keys, values in layers)

    def tile(self, size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Tile:
        """A tile of some tasks, sorted by size class, the rest of its slots empty.

        Args:
            size: its slots.
            tasks: at most as many.
            offered: row of each offered token, by its task's sha256.
        """
        rows = tuple(offered[member.sha256] for task in tasks for member in task.closure)
        key = (size, tuple(task.sha256 for task in tasks), rows)
        tile = self._tiles.get(key)
        if tile is None:
            self._tiles[key] = tile = self._build(size, tasks, offered)
            self._homes.update(dict.fromkeys(tile.own_memory, tile))
        return tile

    def _build(self, size: int, tasks: Sequence[Task], offered: dict[str, int]) -> Tile:
        backbone = self.backbone
        class_tokens = torch.zeros(size, backbone.embed_dim)
        for slot, task in enumerate(tasks):
            assert task.class_token is not None
            class_tokens[slot] = task.class_token
        groups: list[Group] = []
        own_memory: dict[str, tuple[KeyValue, ...]] = {}
        start = 0
        for width, members in groupby(tasks, key=size_class):
            group = self._group(size, start, width, list(members), offered, own_memory)
            groups.append(group)
            start = group.slots.stop
        return Tile(
            class_tokens=backbone.first_tokens(class_tokens.to(backbone.device, backbone.precision)),
            groups=tuple(groups),
            places={task.sha256: slot for slot, task in enumerate(tasks)},
            own_memory=own_memory,
        )

    def _group(
        self,
        size: int,
        first: int,
        width: SizeClass,
        members: Sequence[Task],
        offered: dict[str, int],
        own_memory: dict[str, tuple[KeyValue, ...]],
    ) -> Group:
        backbone, (num_tokens, num_memory) = self.backbone, width
        shape = (size, backbone.num_heads, num_memory, backbone.embed_dim // backbone.num_heads)
        ancestors = torch.zeros(size, num_tokens - 1, dtype=torch.long)
        bias = torch.full((size, num_tokens + num_memory), float("-inf"))
        bias[:, 0] = 0
        layers = tuple(
            KeyValue(*(torch.zeros(shape, device=backbone.device, dtype=backbone.precision) for _ in range(2)))
            for _ in backbone.blocks
        )
        for slot, task in enumerate(members, first):
            ancestors[slot, : len(task.closure)] = torch.tensor([offered[kin.sha256] for kin in task.closure])
            bias[slot, : 1 + len(task.closure)] = 0
            start = 0
            for member in (task, *task.closure):
                end = start + member.num_memory_tokens
                if end > start:
                    for into, rows in zip(layers, self.memory(member), strict=True):
                        into.keys[slot, :, start:end] = rows.keys
                        into.values[slot, :, start:end] = rows.values
                if member is task:
                    own_memory[task.sha256] = tuple(
                        KeyValue(into.keys[slot, :, :end], into.values[slot, :, :end]) for into in layers
                    )
                bias[slot, num_tokens + start : num_tokens + end] = 0
                start = end
        return Group(
            slots=slice(first, first + len(members)),
            ancestors=ancestors.to(backbone.device),
            bias=bias.to(backbone.device, backbone.precision),
            memory=layers,
        )


class Layout:
    """The slots and tiles of some tasks and all their ancestors.

    Tasks stand sorted by size class, and within one by the size of their closure: a task comes after all it extends,
    so that one tile after another can pass a layer.

    Args:
        store: where the tiles are kept.
        tasks: those asked for.
        sizes: what tiles may measure, the smallest first; others than the smallest only where one class fills them.
        filled: whether the last tile is filled up with empty slots, as exactness needs it.
        offered: tasks whose tokens' keys and values are wanted beside those that a task extends.
    """

    def __init__(
        self,
        store: TileStore,
        tasks: Sequence[Task],
        sizes: Sequence[int] = (TILE,),
        filled: bool = True,
        offered: Sequence[Task] = (),
    ) -> None:
        needed = {member.sha256: member for task in tasks for member in (*task.closure, task)}
        members = sorted(
            (task for task in needed.values() if task.class_token is not None),
            key=lambda task: (size_class(task), len(task.closure)),
        )
        seen = {kin.sha256: kin for task in members for kin in task.closure} | {kin.sha256: kin for kin in offered}
        self.offered = {sha256: row for row, sha256 in enumerate(seen, 1)}
        self.tiles = [
            store.tile(size if filled else len(run), run, self.offered) for size, run in _runs(members, sizes)
        ]
        self.slot = {
            sha256: (number, slot) for number, tile in enumerate(self.tiles) for sha256, slot in tile.places.items()
        }
        self.offers = [
            ([slot for sha, slot in tile.places.items() if sha in self.offered],
             [self.offered[sha] for sha in tile.places if sha in self.offered])
            for tile in self.tiles
        ]  # fmt: skip


def _runs(members: Sequence[Task], sizes: Sequence[int]) -> Iterator[tuple[int, Sequence[Task]]]:
    """Cuts tasks into tiles, each as wide as one size class fills it."""
    classes = [size_class(task) for task in members]
    start = 0
    while start < len(members):
        fitting = (s for s in sizes if start + s <= len(members) and classes[start] == classes[start + s - 1])
        size = max(fitting, default=sizes[0])
        yield size, members[start : start + size]
        start += size
