"""Does this machine keep the promise? Run before a model calls itself exact, on the very shapes that it will use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue, plain
from addenda.combined.forward import forward_pass
from addenda.combined.heads import Head
from addenda.combined.numerics import lowered, settings, touch
from addenda.combined.probe_inputs import probe_task
from addenda.combined.shapes import BATCH_SIZES, TILE, TILE_SIZES, Shapes, SizeClass, micro_batch, size_class
from addenda.combined.tiles import Layout, TileStore
from addenda.exceptions import ExactnessError
from addenda.registry import Task, canonical_json

Frozen = tuple[Tensor, list[KeyValue]]
"""Places in the canonical batch, and what the frozen stream offers for these images; last its pooled feature and layer
features."""


def prove(backbone: FrozenBackbone, tasks: Iterable[Task]) -> Shapes:
    """Tests whatever some tasks need that was not tested before in this process under these settings.

    A product's order of additions depends on shapes and settings, never on the numbers in it: so random numbers in two
    of the blocks, of which the last is the lean one, stand for all. In float32 another order shows in nearly every
    number; rounded to bfloat16 it shows in one of thousands, too few to trust. So there nothing but the canonical
    shapes serves.

    Raises:
        ExactnessError: a task's bits depend on its slot, its neighbours or the image's place; it names the shape.
    """
    tasks = list(tasks)
    everyone = [member for task in tasks for member in (task, *task.closure)]
    backbone.check_as_loaded()
    with plain(backbone.device):
        key = ("self-test", canonical_json(settings(backbone)), touch())
        if key not in backbone.memo:
            backbone.memo[key] = SelfTest(backbone)
        test: SelfTest = backbone.memo[key]
        for task in tasks:
            test.head(task)
        shapes = [test.width(width) for width in {size_class(t) for t in everyone if t.class_token is not None}]
    return Shapes(
        images=tuple(n for n in test.images if all(n in shape.images for shape in shapes)),
        slots=tuple(n for n in TILE_SIZES if all(n in shape.slots for shape in shapes)),
    )


class SelfTest:
    """The self-test of one backbone under one set of settings, as far as it was needed; what fails it raises."""

    def __init__(self, backbone: FrozenBackbone) -> None:
        described = settings(backbone)
        self._refused_on = f"{described['device']}, {described['precision']}"
        if backbone.precision == torch.float32 and (low := lowered(described)):
            # A golden probe made so would be off by more than any tolerance wherever float32 is float32.
            raise self._refusal(
                f"float32 may be computed in less than float32 ({', '.join(low)}); "
                "torch.set_float32_matmul_precision('highest') ends that for matrix products"
            )
        if backbone.device.type == "cuda" and backbone.precision != torch.float32:
            # One image of a task in 96 had other bits beside other tasks, rarer than this test can find.
            raise self._refusal("in this precision a GPU was seen to give a task other bits in company; use float32")
        self._backbone = backbone.first_blocks(2)
        self._micro_batch = micro_batch(backbone.device)
        self._widths: dict[SizeClass, Shapes] = {}
        self._heads: set[tuple[int, ...]] = set()
        shape = (self._micro_batch, *backbone.preprocessing["input_size"])
        batch = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
        order = torch.arange(self._micro_batch, dtype=torch.int64, device="cpu")
        # For each batch size: the images' places in the canonical batch, and their frozen stream.
        self._streams = {self._micro_batch: [self._frozen(batch, order), self._frozen(batch, order.roll(1))]}
        reference, rolled = self._streams[self._micro_batch]
        if not self._same(rolled, reference):
            raise self._refusal(f"an image's frozen keys and values depend on its place in {self._micro_batch} images")
        sees_orders = backbone.precision.itemsize >= torch.float32.itemsize
        self._tile_sizes = TILE_SIZES if sees_orders else (TILE,)
        for size in BATCH_SIZES if sees_orders else ():
            parts = [self._frozen(batch, order[:size]), self._frozen(batch, order[size : 2 * size])]
            if all(self._same(part, reference) for part in parts):
                self._streams[size] = parts
        self.images = tuple(sorted(self._streams))

    def head(self, task: Task) -> None:
        """Tests that an image's logits do not depend on its place, for each shape of a head once."""
        head = Head(self._backbone, task)
        rows = len(head.weight)
        read = [part.shape[1] for part in (head.layer_down, head.layer_weight) if part is not None]
        kind = (rows, head.pooled_weight is not None, *read)
        if kind in self._heads:
            return
        random = torch.Generator().manual_seed(rows)
        features, layers = (
            torch.randn(self._micro_batch, width, generator=random, dtype=torch.float32, device="cpu").to(
                self._backbone.device
            )
            for width in (self._backbone.embed_dim, read[0] if read else 0)
        )
        logits, turned = head(features, features, layers), features.roll(1, 0)
        if not _equal(head(turned, turned, layers.roll(1, 0)).roll(-1, 0), logits):
            raise self._refusal(f"logits depend on an image's place: a head of {rows} rows on {len(features)} images")
        self._heads.add(kind)

    def width(self, width: SizeClass) -> Shapes:
        """Tests the tiles and batches of a size class; those that are not canonical may fail and are left out."""
        if width in self._widths:
            return self._widths[width]
        task, largest = probe_task(self._backbone, width), self._tile_sizes[-1]
        twins = [replace(task, labels=(f"twin {i}", "other")) for i in range(largest)]
        others = [probe_task(self._backbone, width, seed) for seed in range(1, largest // 2 + 1)]
        mixed = [others[i // 2] if i % 2 else twin for i, twin in enumerate(twins)]
        store = TileStore(self._backbone)
        (reference,) = self._features(Layout(store, [task]), [task], self._streams[self._micro_batch][0])
        # All made before any is used: the tiles of one size lend their memory to the next.
        layouts = {
            size: (Layout(store, twins[:size], (size,)), Layout(store, mixed[:size], (size,)))
            for size in self._tile_sizes[::-1]
        }
        held = {size: self._held(*pair, twins[:size], reference) for size, pair in layouts.items()}
        if self._micro_batch not in held[TILE]:
            rank = f", rank {width.rank}" if width.rank else ""
            raise self._refusal(
                f"a task's bits depend on its slot, its neighbours or the image's place: tiles of {TILE} slots by "
                f"{self._micro_batch} images, {width.tokens} private tokens and {width.memory} memory keys{rank}"
            )
        slots = tuple(size for size in self._tile_sizes if held[size] >= held[TILE])
        self._widths[width] = Shapes(tuple(sorted(held[TILE])), slots)
        return self._widths[width]

    def _held(self, full: Layout, mixed: Layout, twins: Sequence[Task], reference: Tensor) -> set[int]:
        """The batch sizes in which a tile gives a task the bits that it has alone, in every slot and between others."""
        held: set[int] = set()
        for num_images, (straight, other) in self._streams.items():
            runs = ((full, twins, straight), (mixed, twins[::2], straight), (mixed, twins[::2], other))
            if all(_equal(found, reference[run[2][0]]) for run in runs for found in self._features(*run)):
                held.add(num_images)
        return held

    def _features(self, layout: Layout, asked: Sequence[Task], frozen: Frozen) -> list[Tensor]:
        reads = {task.sha256: lambda feature, *_: feature for task in asked}
        return list(forward_pass(self._backbone, frozen[1][:-1], layout, reads).answers.values())

    def _frozen(self, batch: Tensor, places: Tensor) -> Frozen:
        offered: list[KeyValue] = []
        _, pooled, layers = forward_pass(
            self._backbone, batch[places], pooled=True, layers=True, observe=lambda *seen: offered.append(seen[1])
        )
        assert pooled is not None
        assert layers is not None
        return places, [*offered, KeyValue(pooled, layers)]

    def _same(self, found: Frozen, reference: Frozen) -> bool:
        places, layers = found
        parts, wholes = ([part for pair in one for part in pair] for one in (layers, reference[1]))
        return all(_equal(part, whole[places]) for part, whole in zip(parts, wholes, strict=True))

    def _refusal(self, what: str) -> ExactnessError:
        return ExactnessError(
            f"Exact mode is refused on this machine ({self._refused_on}): {what}. "
            "Another number of threads may help; CombinedModel(..., exact=False) computes without the promise."
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal byte for byte."""
    return torch.equal(one, other) and torch.equal(torch.signbit(one), torch.signbit(other))
