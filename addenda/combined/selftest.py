"""The self-test: checks, on the shapes that a model will use, that this machine computes exact results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue, plain
from addenda.combined.forward import forward_pass, task_features
from addenda.combined.heads import HeadGroup, head_rows, random_head
from addenda.combined.numerics import numerics_settings, operations_sample, reduced_precision
from addenda.combined.probe_inputs import probe_tasks
from addenda.combined.shapes import (
    BATCH_SIZES,
    HEAD_GROUP,
    MAX_GROUPED_WEIGHTS,
    TILE,
    TILE_SIZES,
    HeadShape,
    Shapes,
    SizeClass,
    head_shape,
    micro_batch,
    size_class,
)
from addenda.combined.tiles import Layout, TileStore
from addenda.exceptions import ExactnessError
from addenda.registry import Task, canonical_json


class FrozenOutputs(NamedTuple):
    """What the frozen stream computes for some images of the canonical batch."""

    positions: Tensor  # of the images in the canonical batch
    key_values: list[KeyValue]  # of each layer
    pooled: Tensor
    layers: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All outputs, images first in each."""
        return [*chain.from_iterable(self.key_values), self.pooled, self.layers]


def prove(backbone: FrozenBackbone, tasks: Iterable[Task]) -> Shapes:
    """Tests the shapes that some tasks need, each once per process and settings, and returns the proven ones.

    The order of additions in a product depends on shapes and settings, not on values. So random inputs and two blocks,
    the second as the reduced last block, represent the model. In float32, another order changes nearly every sum; in
    bfloat16 it changes one in thousands, which a test cannot detect reliably, so only the canonical shapes are used.

    Raises:
        ExactnessError: a task's bits depend on its slot, its neighbours or the image's position in the batch.
    """
    tasks = list(tasks)
    members = [member for task in tasks for member in (task, *task.closure)]
    backbone.check_as_loaded()
    with plain(backbone.device):
        key = ("self-test", canonical_json(numerics_settings(backbone)), operations_sample())
        if key not in backbone.memo:
            backbone.memo[key] = SelfTest(backbone)
        test: SelfTest = backbone.memo[key]
        heads = Counter(head_shape(task) for task in tasks)
        for shape in heads:
            test.check_head(shape)
        sizes = {size_class(member) for member in members if member.class_token is not None}
        shapes = [test.proven_shapes(size) for size in sizes]
    return Shapes(
        images=tuple(n for n in test.images if all(n in shape.images for shape in shapes)),
        slots=tuple(n for n in TILE_SIZES if all(n in shape.slots for shape in shapes)),
        heads=frozenset(shape for shape, count in heads.items() if count >= HEAD_GROUP and test.proven_group(shape)),
    )


class SelfTest:
    """The self-test of one backbone under fixed settings; shapes are tested on demand."""

    def __init__(self, backbone: FrozenBackbone) -> None:
        settings = numerics_settings(backbone)
        self._machine = f"{settings['device']}, {settings['precision']}"
        if backbone.precision == torch.float32 and (reduced := reduced_precision(settings)):
            # Golden probes made this way would exceed the tolerance under full float32.
            raise self._refusal(
                f"settings allow float32 to be computed in lower precision ({', '.join(reduced)}); "
                "for matrix products, call torch.set_float32_matmul_precision('highest')"
            )
        if backbone.device.type != "cpu" and backbone.precision != torch.float32:
            # One of 96 results differed with other tasks present, which is too rare for this test to detect.
            raise self._refusal("in this precision a GPU gave a task different bits beside other tasks; use float32")
        self._backbone = backbone.first_blocks(2)
        self._micro_batch = micro_batch(backbone.device)
        self._proven: dict[SizeClass, Shapes] = {}
        # Each tested shape of head, with whether groups of it are proven; None if they were not tested.
        self._proven_groups: dict[HeadShape, bool | None] = {}
        shape = (self._micro_batch, *backbone.preprocessing["input_size"])
        batch = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
        order = torch.arange(self._micro_batch, dtype=torch.int64, device="cpu")
        # For each batch size, two batches of images from the canonical batch.
        self._streams = {
            self._micro_batch: [self._frozen_outputs(batch, order), self._frozen_outputs(batch, order.roll(1))]
        }
        reference, rolled = self._streams[self._micro_batch]
        if not self._same(rolled, reference):
            what = "keys and values" if backbone.blocks else "features"
            raise self._refusal(f"an image's frozen {what} depend on its position in a batch of {self._micro_batch}")
        can_detect_order = backbone.precision.itemsize >= torch.float32.itemsize
        self._tile_sizes = TILE_SIZES if can_detect_order else (TILE,)
        for size in BATCH_SIZES if can_detect_order else ():
            batches = [self._frozen_outputs(batch, order[i : i + size]) for i in (0, size)]
            if all(self._same(outputs, reference) for outputs in batches):
                self._streams[size] = batches
        self.images = tuple(sorted(self._streams))

    def check_head(self, shape: HeadShape) -> None:
        """Tests, once per shape of head, that an image's logits do not depend on its position in the batch."""
        if shape in self._proven_groups:
            return
        head = random_head(shape, self._backbone, 0)
        feature, pooled, layers = self._head_inputs(shape)
        logits, rolled = head(feature, pooled, layers), head(*(each.roll(1, 0) for each in (feature, pooled, layers)))
        if not _equal(rolled.roll(-1, 0), logits):
            raise self._refusal(
                f"logits depend on an image's position in the batch: a head of {shape.rows} rows on {len(logits)} "
                "images"
            )
        self._proven_groups[shape] = None

    def proven_group(self, shape: HeadShape) -> bool:
        """Tests, once per shape, whether each head of a group has the bits that it has alone."""
        if self._proven_groups[shape] is None and shape.num_weights <= MAX_GROUPED_WEIGHTS:
            heads = {str(seed): random_head(shape, self._backbone, seed) for seed in range(HEAD_GROUP)}
            feature, *shared = self._head_inputs(shape)
            features = torch.stack([feature.roll(slot, 1) for slot in range(HEAD_GROUP)])
            alone = [head(each, *shared) for head, each in zip(heads.values(), features, strict=True)]
            self._proven_groups[shape] = _equal(HeadGroup(heads)(features, *shared), torch.stack(alone))
        return bool(self._proven_groups[shape])

    def _head_inputs(self, shape: HeadShape) -> list[Tensor]:
        """A feature, a pooled feature and layer features of the canonical micro-batch."""
        random, batch = torch.Generator().manual_seed(shape.rows), self._micro_batch
        inputs = [
            torch.randn(batch, width, generator=random, dtype=torch.float32, device="cpu")
            for width in (shape.width, shape.width, shape.num_layer_features)
        ]
        return [head_rows(each.to(self._backbone.device), self._backbone) for each in inputs]

    def proven_shapes(self, size: SizeClass) -> Shapes:
        """Tests the tile and batch sizes of a size class; non-canonical sizes that fail are left out."""
        if size in self._proven:
            return self._proven[size]
        largest = self._tile_sizes[-1]
        task, *others = probe_tasks(self._backbone, size, 1 + largest // 2)
        twins = [replace(task, labels=(f"twin {i}", "other")) for i in range(largest)]
        mixed = [others[i // 2] if i % 2 else twin for i, twin in enumerate(twins)]
        store = TileStore(self._backbone)
        (reference,) = self._features(Layout(store, [task]), [task], self._streams[self._micro_batch][0])
        full, between = (Layout(store, tasks, (largest,)) for tasks in (twins, mixed))
        batches = {
            slots: self._exact_batches(
                Layout(full, twins[:slots], (slots,)),
                Layout(between, mixed[:slots], (slots,)),
                twins[:slots],
                reference,
            )
            for slots in self._tile_sizes
        }
        if self._micro_batch not in batches[TILE]:
            rank = f", rank {size.rank}" if size.rank else ""
            raise self._refusal(
                "a task's bits depend on its slot, its neighbours or the image's position in the batch: tiles of "
                f"{TILE} slots by {self._micro_batch} images, {size.tokens} private tokens and {size.memory} memory "
                f"keys{rank}"
            )
        proven_slots = tuple(slots for slots in self._tile_sizes if batches[slots] >= batches[TILE])
        self._proven[size] = Shapes(tuple(sorted(batches[TILE])), proven_slots)
        return self._proven[size]

    def _exact_batches(self, full: Layout, mixed: Layout, twins: Sequence[Task], reference: Tensor) -> set[int]:
        """Batch sizes in which a task has the same bits as alone, in every slot and between other tasks."""
        exact: set[int] = set()
        for num_images, (first, second) in self._streams.items():
            runs = ((full, twins, first), (mixed, twins[::2], first), (mixed, twins[::2], second))
            if all(
                _equal(features, reference[frozen.positions])
                for layout, tasks, frozen in runs
                for features in self._features(layout, tasks, frozen)
            ):
                exact.add(num_images)
        return exact

    def _features(self, layout: Layout, tasks: Sequence[Task], frozen: FrozenOutputs) -> list[Tensor]:
        features = task_features(self._backbone, frozen.key_values, layout)
        return [features[task.sha256] for task in tasks]

    def _frozen_outputs(self, batch: Tensor, positions: Tensor) -> FrozenOutputs:
        key_values: list[KeyValue] = []
        _, pooled, layers = forward_pass(
            self._backbone,
            batch[positions],
            pooled=True,
            layers=True,
            observe=lambda layer, frozen, offered: key_values.append(frozen),
        )
        assert pooled is not None
        assert layers is not None
        return FrozenOutputs(positions, key_values, pooled, layers)

    def _same(self, outputs: FrozenOutputs, reference: FrozenOutputs) -> bool:
        pairs = zip(outputs.tensors, reference.tensors, strict=True)
        return all(_equal(tensor, whole[outputs.positions]) for tensor, whole in pairs)

    def _refusal(self, reason: str) -> ExactnessError:
        return ExactnessError(
            f"Exact mode is refused on this machine ({self._machine}): {reason}. "
            "Another number of threads may help; CombinedModel(..., exact=False) computes without the promise."
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, including the sign of zeros."""
    return torch.equal(one, other) and torch.equal(torch.signbit(one), torch.signbit(other))
