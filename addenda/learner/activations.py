"""What training reads of images: constants of the frozen stream, kept as far as the budget goes, else computed anew."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Int
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined import Layout, Observer, TileStore, forward_pass, micro_batch, prove
from addenda.exceptions import DataError
from addenda.learner.augmentation import Augmentation, augment, view_seed
from addenda.learner.cache import ActivationCache
from addenda.learner.context import QUIET, Report, RunContext, silent
from addenda.learner.data.items import Item
from addenda.learner.data.labelled import LabelledImages
from addenda.learner.data.reading import read_in_batches
from addenda.learner.store import Store
from addenda.registry import Task

PART_BYTES = 4e6
"""Keys that are at work together on a CPU: more would leave its caches (docs/performance.md)."""

FLUSH_S = 10.0
"""Seconds of work that a power cut may cost while the cache is filled."""

log = logging.getLogger(__name__)


class Batch:
    """Some views, of which a few at a time are fetched in the precision that computes.

    Args:
        backbone: says where and how precisely.
        key_values: holds their keys and values on the device.
        place: each view's row in it.
        kin: keys and values of the tokens of the tasks to extend, for each view.
        pooled: the backbone's own pooled feature of each view.

    Attributes:
        parts: slices of the views that are fetched together.
        num_keys: P, frozen tokens and those of the tasks to extend.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        key_values: Float16[Tensor, "K L 2 H P d"],
        place: Int[Tensor, " B"],
        kin: Float16[Tensor, "B L 2 H a d"],
        pooled: Float[Tensor, "B D"],
    ) -> None:
        self.pooled = pooled.to(backbone.device)
        self._key_values, self._place = key_values, place.to(backbone.device)
        self._kin = kin.to(backbone.device)
        num_heads, num_tokens, head_dim = key_values.shape[3:]
        self.num_keys = seen = num_tokens + kin.shape[4]
        on_cpu = backbone.device.type == "cpu"
        count = min(len(place), max(1, int(PART_BYTES / (4 * backbone.embed_dim * seen))) if on_cpu else len(place))
        self.parts = [slice(start, min(start + count, len(place))) for start in range(0, len(place), count)]
        self._half = key_values.new_empty(count, num_heads, num_tokens, head_dim)
        self._whole = key_values.new_empty(count, num_heads, seen, head_dim, dtype=backbone.precision)

    def __len__(self) -> int:
        return len(self._place)

    def fetch(self, layer: int, which: int, part: slice) -> Float[Tensor, "c H P d"]:
        """Keys (which = 0) or values (1) of one of the `parts`; the next call overwrites them."""
        place = self._place[part]
        half, whole = self._half[: len(place)], self._whole[: len(place)]
        torch.index_select(self._key_values[:, layer, which], 0, place, out=half)
        whole[:, :, : half.shape[2]].copy_(half)
        whole[:, :, half.shape[2] :].copy_(self._kin[part, layer, which])
        return whole


class Activations:
    """Activations of every view of some images; view 0 is the image as it is.

    A view's activations are the same bits whether they are kept or computed anew: images pass the frozen stream in the
    canonical micro-batch, and what comes is rounded to half precision.

    Args:
        backbone: the frozen backbone.
        images: what to read.
        augmentation: which views there are beside the plain one.
        cache: where they are kept.
        parents: every task whose tokens will be seen.
        context: whether images that cannot be read are left out, and who is told of the progress.

    Attributes:
        targets: class of each readable image, [N], or its labels, [N, C].
        objective: how targets are learned.
        num_classes: C.
        skipped: what was wrong with each image left out.

    Raises:
        DataError: images that cannot be read, all named together, or that have changed meanwhile.
        ExactnessError: this machine gives an image other bits in other company.
        TrainingError: there is no room for what the budget allows.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        images: LabelledImages,
        augmentation: Augmentation,
        cache: ActivationCache,
        parents: Sequence[Task] = (),
        context: RunContext = QUIET,
    ) -> None:
        prove(backbone, [])
        self.backbone = backbone
        self._digests = images.digests or tuple(images.digest(index) for index in range(len(images)))
        self._images, self._augmentation = replace(images, digests=self._digests), augmentation
        self._micro_batch = micro_batch(backbone.device)
        rows = range(len(images) * (1 + augmentation.num_views))
        self._place, self._store = self._open(cache, rows)
        self._pooled = torch.zeros(len(rows), backbone.embed_dim, dtype=torch.float32, device="cpu")
        bad = self._fill(rows, context)
        self.skipped = tuple(dict.fromkeys(bad.values()))
        self._readable = torch.tensor([i for i in range(len(images)) if i not in bad], dtype=torch.long, device="cpu")
        self.targets = images.targets[self._readable]
        self.objective, self.num_classes = images.objective, len(images.labels)
        self._resident = self._to_device()
        self._look_at(parents, context.report)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def pooled(self) -> Float[Tensor, "N D"]:
        """The backbone's own pooled feature of each readable image as it is."""
        return self._pooled[self._readable]

    def batch(self, images: Int[Tensor, " B"], views: Int[Tensor, " B"] | int = 0) -> Batch:
        """What training reads of some of the readable images, in one view each; what is not kept is computed now."""
        return self._batch(self._readable[images] + views * len(self._images))

    def _batch(self, rows: Tensor) -> Batch:
        known = rows < len(self._place)
        place = torch.where(known, self._place[rows.clamp(max=len(self._place) - 1)], -1)
        kept = place >= 0
        if kept.all() and self._resident is not None:
            return Batch(self.backbone, self._resident, place, self._kin_at(place), self._pooled[rows])
        key_values, pooled = self._gather(rows, place)
        kin = self._no_kin(len(rows))
        if kept.any():
            kin[kept] = self._kin_at(place[kept])
        for missing in (~kept).nonzero()[:, 0].split(self._micro_batch):
            kin[missing] = self._kin_of(key_values[missing])
        whole = key_values.to(self.backbone.device)
        return Batch(self.backbone, whole, torch.arange(len(rows), dtype=torch.int64, device="cpu"), kin, pooled)

    def _gather(self, rows: Tensor, place: Tensor) -> tuple[Float16[Tensor, "n L 2 H P d"], Float[Tensor, "n D"]]:
        """Keys and values of some rows on the CPU, and their pooled features: what is kept, and the rest computed."""
        kept = place >= 0
        key_values = torch.empty(len(rows), *self._shape, dtype=torch.float16, device="cpu")
        pooled = torch.empty(len(rows), self.backbone.embed_dim, dtype=torch.float32, device="cpu")
        if kept.any():
            assert self._store is not None
            key_values[kept], pooled[kept] = self._store.key_values[place[kept]], self._store.pooled[place[kept]]
        position = {int(rows[i]): i for i in (~kept).nonzero()[:, 0].tolist()}

        def take(taken: list[int], found: Tensor, feature: Tensor) -> None:
            into = [position[row] for row in taken]
            key_values[into], pooled[into] = found, feature

        self._compute(list(position), take)
        return key_values, pooled

    def seeing(self, parents: Sequence[Task], report: Report = silent) -> Activations:
        """The same activations for a task that sees the tokens of some tasks; nothing of the frozen stream is redone.

        Args:
            parents: every task whose tokens will be seen.
            report: told of the progress.
        """
        other = copy(self)
        other._look_at(parents, report)
        return other

    def _look_at(self, parents: Sequence[Task], report: Report) -> None:
        # Tasks go by their content: among ancestors there may be two versions of one name.
        self._parents, self._layout = parents, Layout(TileStore(self.backbone), parents, offered=parents)
        self._kin = self._see_parents(report)

    def features(self, tasks: Sequence[Task]) -> list[Float[Tensor, "N D"]]:
        """The final feature of each of some tasks' tokens over every readable image as it is, in float32."""
        layout = Layout(TileStore(self.backbone), tasks)
        found: list[list[Tensor]] = [[] for _ in tasks]
        for rows in self._readable.split(self._micro_batch):
            features = self._run_tasks(self._gather(rows, self._place[rows])[0], layout)
            for parts, task in zip(found, tasks, strict=True):
                parts.append(features[task.sha256][: len(rows)].float().cpu())
        return [torch.cat(parts) for parts in found]

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of one view's keys and values."""
        b = self.backbone
        return b.depth, 2, b.num_heads, b.num_tokens, b.embed_dim // b.num_heads

    def _kin_at(self, place: Tensor) -> Float16[Tensor, "B L 2 H a d"]:
        return self._kin[place] if self._parents else self._no_kin(len(place))

    def _no_kin(self, count: int) -> Float16[Tensor, "B L 2 H a d"]:
        depth, two, num_heads, _, head_dim = self._shape
        return torch.empty(
            count, depth, two, num_heads, len(self._parents), head_dim, dtype=torch.float16, device="cpu"
        )

    def _open(self, cache: ActivationCache, rows: range) -> tuple[Tensor, Store | None]:
        """The place of each row in the cache's store, -1 where there is none."""
        recipe = json.dumps(asdict(replace(self._augmentation, views=0, fresh=False)), sort_keys=True)
        keys = [self._key(row, recipe) for row in rows]
        unique = list(dict.fromkeys(keys))
        row_bytes = 2 * torch.Size(self._shape).numel() + 4 * self.backbone.embed_dim
        capacity = cache.capacity(row_bytes, len(unique))
        whole, held = len(unique) * row_bytes / 1e9, capacity * row_bytes / 1e9
        views = f", {1 + self._augmentation.num_views} views of each," if self._augmentation.num_views else ""
        log.info(
            "Activations of %d images%s take %.2f GB; %s.", len(self._images), views, whole,
            f"they are kept in {cache.folder}" if capacity == len(unique)
            else f"{held:.2f} GB are kept in {cache.folder}, the rest is computed anew in each epoch",
        )  # fmt: skip
        store = cache.open(self.backbone, unique[:capacity]) if capacity else None
        return torch.tensor(
            [store.place.get(key, -1) if store else -1 for key in keys], dtype=torch.int64, device="cpu"
        ), store

    def _key(self, row: int, recipe: str) -> str:
        """Content and view of a row: what a kept row is found by."""
        number, image = divmod(row, len(self._images))
        text = f"{self._digests[image]} {f'{recipe} {number}' if number else 'plain'}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _fill(self, rows: range, context: RunContext) -> dict[int, str]:
        """Computes what is not kept yet, and every row's pooled feature; gives what is wrong with which images."""
        store, places = self._store, self._place.tolist()
        held = set() if store is None else store.held(place for place in places if place >= 0)
        todo = [row for row in rows if places[row] not in held]
        flushed = time.monotonic()

        def take(taken: list[int], key_values: Tensor, pooled: Tensor) -> None:
            nonlocal flushed
            self._pooled[taken] = pooled
            kept = [i for i, row in enumerate(taken) if places[row] >= 0]
            if store is not None and kept:
                store.put([places[taken[i]] for i in kept], key_values[kept], pooled[kept])
            if store is not None and time.monotonic() - flushed > FLUSH_S:
                store.flush()
                flushed = time.monotonic()

        try:
            bad = self._compute(todo, take, context)
        finally:
            if store is not None:
                store.flush()
        for row, place in enumerate(places):
            if place >= 0 and store is not None:
                self._pooled[row] = store.pooled[place]
        return bad

    def _compute(
        self, rows: Sequence[int], take: Callable[[list[int], Tensor, Tensor], None], context: RunContext = QUIET
    ) -> dict[int, str]:
        """Runs the frozen stream over some rows; `take` gets rows, their keys and values in half precision, pooled.

        All that is wanted of an image is made of one reading; what is wrong with which images is returned.
        """
        of_image: dict[int, list[int]] = {}
        for row in rows:
            of_image.setdefault(row % len(self._images), []).append(row)

        def pass_on(batch: list[tuple[int, Tensor]]) -> None:
            images = torch.stack([image for _, image in batch])
            half = torch.empty(len(batch), *self._shape, dtype=torch.float16, device="cpu")

            def keep(layer: int, frozen: KeyValue, offered: KeyValue) -> None:
                for which, part in enumerate(frozen):
                    half[:, layer, which] = part[: len(batch)]

            feature = forward_pass(self.backbone, images, sizes=(self._micro_batch,), pooled=True, observe=keep).pooled
            assert feature is not None
            pooled = feature.float().cpu()
            for (row, _), feature in zip(batch, pooled, strict=True):
                if not feature.isfinite().all():
                    called = self._images.item(row % len(self._images)).called
                    raise DataError(
                        f"{called} gives the backbone a feature that holds NaN or infinity. Tensors must be normalised "
                        "as `backbone.transform` does it."
                    )
            take([row for row, _ in batch], half, pooled)

        def views(image: int, item: Item) -> list[tuple[int, Tensor]]:
            return self._views(item, of_image[image])

        bad: dict[int, str] = {}
        images, size, what = self._images, self._micro_batch, "reading images"
        for batch in read_in_batches(images, list(of_image), views, size, what, context, bad):
            pass_on(batch)
        return bad

    def _views(self, item: Item, rows: Sequence[int]) -> list[tuple[int, Tensor]]:
        """The rows of one image, each with its view."""
        how, preprocessing = self._augmentation, self.backbone.preprocessing
        made: list[Any] = []
        for number in (row // len(self._images) for row in rows):
            seed = view_seed(item.digest, number)
            made.append(partial(augment, how=how, seed=seed, preprocessing=preprocessing) if number else None)
        return list(zip(rows, item.views(self.backbone, made), strict=True))

    def _to_device(self) -> Tensor | None:
        """The kept keys and values where training reads them; None where each batch has to be brought there."""
        if self._store is None:
            return None
        kept, device = self._store.key_values, self.backbone.device
        if device.type == "cpu":
            return kept
        return kept.to(device) if kept.nbytes < torch.cuda.mem_get_info(device)[0] / 2 else None

    def _see_parents(self, report: Report) -> Tensor:
        """Keys and values of the parents' tokens for every kept row, from what is kept."""
        if self._store is None or not self._parents:
            return self._no_kin(0)
        kept = self._store.key_values
        kin = self._no_kin(len(kept))
        for start in range(0, len(kept), self._micro_batch):
            part = slice(start, start + self._micro_batch)
            kin[part] = self._kin_of(kept[part])
            report("running the tasks to extend", min(start + self._micro_batch, len(kept)), len(kept))
        return kin

    def _kin_of(self, half: Float16[Tensor, "n L 2 H P d"]) -> Float16[Tensor, "n L 2 H a d"]:
        """The parents' tokens over one micro-batch or less, in the shapes that keep their bits."""
        kin = self._no_kin(len(half))
        if not self._parents:
            return kin
        rows = [self._layout.offered[parent.sha256] for parent in self._parents]

        def observe(layer: int, frozen: KeyValue, offered: KeyValue) -> None:
            for which, part in enumerate(offered):
                kin[:, layer, which] = part[: len(half), :, rows]

        self._run_tasks(half, self._layout, observe)
        return kin

    def _run_tasks(self, half: Tensor, layout: Layout, observe: Observer | None = None) -> dict[str, Tensor]:
        """The tasks' features over the kept activations of one micro-batch or less, filled up to it, by sha256."""
        filled = F.pad(half, (0, 0) * 5 + (0, self._micro_batch - len(half)))
        layers = filled.to(self.backbone.device, self.backbone.precision)
        stream = [KeyValue(layers[:, layer, 0], layers[:, layer, 1]) for layer in range(self.backbone.depth)]
        reads = {task.sha256: lambda feature, _: feature for task in layout.tasks}
        return forward_pass(self.backbone, stream, layout, reads, observe=observe).answers
