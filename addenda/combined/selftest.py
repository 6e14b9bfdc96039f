"""Does this machine keep the promise? Run before a model calls itself exact, on the very shapes that it will use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined.heads import Head
from addenda.combined.layout import TILE, TILE_SIZES, Layout, SizeClass, TileStore, size_class
from addenda.combined.numerics import exact_arithmetic, micro_batch, settings
from addenda.combined.probes import probe_images, probe_task
from addenda.combined.streams import task_features
from addenda.exceptions import ExactnessError
from addenda.registry import Task, canonical_json

_TESTED: WeakKeyDictionary[FrozenBackbone, dict[str, SelfTest]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Shapes:
    """The shapes that give every task the bits of the canonical ones.

    Attributes:
        images: batch sizes, ascending; the last is the canonical micro-batch.
        slots: tile sizes, ascending, the canonical one among them.
    """

    images: tuple[int, ...]
    slots: tuple[int, ...]


def prove(backbone: FrozenBackbone, tasks: Iterable[Task]) -> Shapes:
    """Tests whatever some tasks need that was not tested before in this process under these settings.

    A product's order of additions depends on shapes and settings, never on the numbers in it: so random numbers in two
    of the blocks, of which the last is the lean one, stand for all.

    Raises:
        ExactnessError: a task's bits depend on its slot, its neighbours or the image's place; it names the shape.
    """
    key = canonical_json(settings(backbone))
    known = _TESTED.setdefault(backbone, {})
    if key not in known:
        known[key] = SelfTest(backbone)
    tasks = list(tasks)
    everyone = [member for task in tasks for member in (task, *task.closure)]
    test = known[key]
    for task in tasks:
        test.head(task)
    shapes = [test.width(width) for width in {size_class(t) for t in everyone if t.class_token is not None}]
    return Shapes(
        images=tuple(n for n in test.images if all(n in shape.images for shape in shapes)),
        slots=tuple(n for n in TILE_SIZES if all(n in shape.slots for shape in shapes)),
    )


class SelfTest:
    """The self-test of one backbone under one set of settings, as far as it was needed.

    Args:
        backbone: the backbone.

    Raises:
        ExactnessError: the frozen stream itself gives an image other bits at another place in the batch.
    """

    def __init__(self, backbone: FrozenBackbone) -> None:
        self._refused_on = f"{settings(backbone)['device']}, {settings(backbone)['precision']}"
        if backbone.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
            raise self._refusal("TF32 is allowed in matrix products (torch.set_float32_matmul_precision('highest'))")
        self._backbone = backbone.first_blocks(2)
        self._micro_batch = micro_batch(backbone.device)
        self._widths: dict[SizeClass, Shapes] = {}
        self._heads: set[int] = set()
        probes = probe_images(backbone).to(backbone.device)
        batch = probes[torch.arange(self._micro_batch) % len(probes)]
        order = torch.arange(self._micro_batch)
        # For each batch size: the images' places in the canonical batch, and their frozen stream.
        self._streams = {self._micro_batch: [self._frozen(batch, order), self._frozen(batch, order.roll(1))]}
        reference, rolled = self._streams[self._micro_batch]
        if not self._same(rolled, reference):
            raise self._refusal(f"an image's frozen keys and values depend on its place in {self._micro_batch} images")
        alone = [self._frozen(batch, order[i : i + 1]) for i in range(2)]
        if self._micro_batch > 1 and all(self._same(one, reference) for one in alone):
            self._streams[1] = alone
        self.images = tuple(sorted(self._streams))

    def head(self, task: Task) -> None:
        """Tests a head's shape.

        Raises:
            ExactnessError: an image's logits depend on its place.
        """
        head = Head(self._backbone, task)
        rows = len(head.weight)
        if rows in self._heads:
            return
        random = torch.Generator().manual_seed(rows)
        features = torch.randn(self._micro_batch, self._backbone.embed_dim, generator=random).to(self._backbone.device)
        logits = head(features, features)
        alone = torch.cat([head(row, row) for row in features.split(1)[:2]])
        turned = features.roll(1, 0)
        if not _equal(head(turned, turned).roll(-1, 0), logits):
            raise self._refusal(f"logits depend on an image's place: a head of {rows} rows on {len(features)} images")
        if 1 in self._streams and not _equal(alone, logits[:2]):
            raise self._refusal(f"logits of one image alone differ: a head of {rows} rows")
        self._heads.add(rows)

    def width(self, width: SizeClass) -> Shapes:
        """Tests the tiles and batches of a size class; those that are not canonical may fail and are left out.

        Raises:
            ExactnessError: a canonical shape gives a task other bits in another slot, place or company.
        """
        if width not in self._widths:
            task = probe_task(self._backbone, width)
            store = TileStore(self._backbone)
            (feature,) = self._features(store, [task], TILE, self._streams[self._micro_batch][0][1], [task])
            if not self._holds(store, task, feature, TILE, self._micro_batch):
                raise self._refusal(
                    f"a task's bits depend on its slot, its neighbours or the image's place: tiles of {TILE} slots by "
                    f"{self._micro_batch} images, {width[0]} private tokens and {width[1]} memory keys"
                )
            images = tuple(n for n in self.images if self._holds(store, task, feature, TILE, n))
            slots = tuple(s for s in TILE_SIZES if all(self._holds(store, task, feature, s, n) for n in images))
            self._widths[width] = Shapes(images, slots)
        return self._widths[width]

    def _holds(self, store: TileStore, task: Task, feature: Tensor, size: int, num_images: int) -> bool:
        """Whether a task in every slot of a full tile, between others, has the bits that it has alone."""
        twins = [replace(task, labels=(f"twin {i}", "other")) for i in range(size)]
        others = [probe_task(self._backbone, size_class(task), seed) for seed in range(1, size // 2 + 1)]
        for first in (0, 1):
            company = list(twins)
            company[first::2] = others
            asked = [twin for twin in twins if twin in company]
            for places, stream in self._streams[num_images]:
                for found in self._features(store, company, size, stream, asked):
                    if not _equal(found, feature[places]):
                        return False
        return True

    def _features(
        self, store: TileStore, tasks: Sequence[Task], size: int, stream: Sequence[KeyValue], asked: Sequence[Task]
    ) -> list[Tensor]:
        layout = Layout(store, tasks, (size,))
        with exact_arithmetic(self._backbone.device):
            tiles = task_features(self._backbone, stream[:-1], layout)
        return [tiles[tile][slot] for tile, slot in (layout.slot[task.sha256] for task in asked)]

    def _frozen(self, batch: Tensor, places: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """The places, and what the frozen stream offers for them; its pooled feature as a last pair."""
        with exact_arithmetic(self._backbone.device):
            stream = self._backbone.stream(batch[places], "pooled")
            return places, [*stream, KeyValue(stream.pooled, stream.pooled)]

    def _same(self, found: tuple[Tensor, list[KeyValue]], reference: tuple[Tensor, list[KeyValue]]) -> bool:
        places, layers = found
        return all(
            _equal(part, whole[places])
            for pair, wholes in zip(layers, reference[1], strict=True)
            for part, whole in zip(pair, wholes, strict=True)
        )

    def _refusal(self, what: str) -> ExactnessError:
        return ExactnessError(
            f"Exact mode is refused on this machine ({self._refused_on}): {what}. "
            "CombinedModel(..., exact=False) computes without the promise."
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal byte for byte."""
    return torch.equal(one, other) and torch.equal(torch.signbit(one), torch.signbit(other))
