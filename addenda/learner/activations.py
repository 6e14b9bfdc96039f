"""Frozen activations of the training images: cached on disk as far as the budget allows, otherwise recomputed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Int
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined import Layout, Observer, TileStore, forward_pass, micro_batch, prove
from addenda.exceptions import DataError
from addenda.learner.activation_cache import ActivationCache
from addenda.learner.augmentation import Augmentation
from addenda.learner.context import QUIET, Report, RunContext, silent
from addenda.learner.data.labelled import Item, LabelledImages, read_in_batches
from addenda.learner.store import Store, row_bytes
from addenda.learner.token_stream import Batch
from addenda.registry import Task
from addenda.text import estimate

FLUSH_S = 10.0
"""Seconds between flushes while the cache is filled, and so the most work that a power cut can cost."""

MAX_LAYER_FEATURE_BYTES = 2**31
"""Above this size, layer features are held in memory for the unaugmented images only, not for their random views."""

FIT_MEMORY = 6
"""Peak memory of a fit to layer features, as a multiple of their size: 5.7 was measured."""

log = logging.getLogger(__name__)


class Activations:
    """Frozen activations of every view of a dataset; view 0 is the unaugmented image.

    A view's activations have the same bits whether they are cached or recomputed: images run through the frozen stream
    in the canonical micro-batch, and keys and values are rounded to half precision. `targets`, `groups`, `digests`
    and `pooled` (the backbone's own feature) cover the unaugmented readable images; `layers`, the layer features,
    covers their views too if memory allows. `skipped` says why the other images could not be read. With `tokens=False`
    there are no keys and values.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        images: LabelledImages,
        augmentation: Augmentation,
        cache: ActivationCache,
        parents: Sequence[Task] = (),
        context: RunContext = QUIET,
        tokens: bool = True,
    ) -> None:
        prove(backbone, [])
        self.backbone = backbone
        digests = images.digests or tuple(images.digest(index) for index in range(len(images)))
        self._images, self._num_images = replace(images, digests=digests), len(digests)
        self._augmentation = augmentation
        self._micro_batch, self._tokens = micro_batch(backbone.device), tokens
        self._shape = backbone.key_value_shape
        keys = self._keys(digests)
        views, width = 1 + augmentation.num_views, backbone.num_layer_features
        if 4 * len(keys) * width > MAX_LAYER_FEATURE_BYTES:
            views = 1
        self._store = self._open(cache, list(dict.fromkeys(keys)), 4 * views * len(digests) * width)
        row_of = {} if self._store is None else self._store.row_of
        # The cache row of each view, or -1 if it is not cached.
        self._cache_row = torch.tensor([row_of.get(key, -1) for key in keys], dtype=torch.int64, device="cpu")
        pooled = torch.zeros(len(keys), backbone.embed_dim, dtype=torch.float32, device="cpu")
        layers = torch.zeros(views, len(digests), width, dtype=torch.float32, device="cpu")
        bad = self._fill(pooled, layers, context)
        self.skipped = tuple(dict.fromkeys(bad.values()))
        readable = [i for i in range(len(digests)) if i not in bad]
        self._readable = torch.tensor(readable, dtype=torch.int64, device="cpu")
        self._pooled, self.pooled, self.layers = pooled, pooled[self._readable], layers[:, self._readable]
        self.labels, self.targets, self.objective = images.labels, images.targets[self._readable], images.objective
        self.digests = [digests[i] for i in readable]
        self.groups = None if images.groups is None else [images.groups[i] or f"\0{i}" for i in readable]
        self.num_classes = len(images.labels)
        self._key_values = self._to_device()
        self._set_parents(parents, context.report)

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, images: Int[Tensor, " B"], views: Int[Tensor, " B"] | int = 0) -> Batch:
        """Returns the activations of some readable images, in one view each; recomputes what is not cached."""
        rows = self._readable[images] + views * self._num_images
        known = rows < len(self._cache_row)
        cache_rows = torch.where(known, self._cache_row[rows.clamp(max=len(self._cache_row) - 1)], -1)
        cached = cache_rows >= 0
        if self._resident is not None and cached.numpy().all():  # not torch's `all`: nothing here waits for the device
            key_values, pooled, parents = self._resident
            on_device = cache_rows.to(self.backbone.device)
            return Batch(self.backbone, key_values, on_device, parents[on_device], pooled[rows.to(pooled.device)])
        key_values, pooled = self._gather(rows, cache_rows)
        parents = self._empty_parent_key_values(len(rows))
        parents[cached] = self._parent_key_values[cache_rows[cached]]
        for missing in (~cached).nonzero()[:, 0].split(self._micro_batch):
            parents[missing] = self._run_parents(key_values[missing])
        positions = torch.arange(len(rows), dtype=torch.int64, device="cpu")
        return Batch(self.backbone, key_values.to(self.backbone.device), positions, parents, pooled)

    def with_parents(self, parents: Sequence[Task], report: Report = silent) -> Activations:
        """Returns the same activations for a task with these parents, without running the frozen stream again."""
        other = copy(self)
        other._set_parents(parents, report)
        return other

    def features(self, tasks: Sequence[Task]) -> list[Float[Tensor, "N D"]]:
        """Returns each task token's final feature of every readable image, unaugmented and in float32."""
        layout = Layout(TileStore(self.backbone), tasks)
        batches: list[list[Tensor]] = [[] for _ in tasks]
        for rows in self._readable.split(self._micro_batch):
            features = self._run_tasks(self._gather(rows, self._cache_row[rows])[0], layout)
            for of_task, task in zip(batches, tasks, strict=True):
                of_task.append(features[task.sha256][: len(rows)].float().cpu())
        return [torch.cat(of_task) for of_task in batches]

    def _keys(self, digests: Sequence[str]) -> list[str]:
        """Returns each row's cache key, a hash of image content and view; the rows of view 0 come first."""
        recipe = json.dumps(asdict(replace(self._augmentation, views=0, fresh=False)), sort_keys=True)
        views = ["plain", *(f"{recipe} {number}" for number in range(1, 1 + self._augmentation.num_views))]
        return [hashlib.sha256(f"{digest} {view}".encode()).hexdigest() for view in views for digest in digests]

    def _open(self, cache: ActivationCache, keys: Sequence[str], layer_bytes: int) -> Store | None:
        """Opens a cache entry for as many rows as the budget allows; says what disk and memory it all takes."""
        num_views = self._augmentation.num_views
        num_features = self.backbone.embed_dim + self.backbone.num_layer_features
        of_row = row_bytes(self._shape if self._tokens else (), num_features)
        capacity = cache.capacity(of_row, len(keys))
        total_gb, cached_gb = len(keys) * of_row / 1e9, capacity * of_row / 1e9
        views = f" in {1 + num_views} views each" if num_views else ""
        log.info(
            "Activations of %d images%s take %s GB, and fits to them up to %s GB of memory; %s.",
            self._num_images, views, _rounded_up(total_gb), _rounded_up(FIT_MEMORY * layer_bytes / 1e9),
            f"all are cached in {cache.folder}" if capacity == len(keys)
            else f"{cached_gb:.2f} GB are cached in {cache.folder}, the others are recomputed in each epoch",
        )  # fmt: skip
        return cache.open(self.backbone, keys[:capacity], self._tokens) if capacity else None

    def _fill(
        self, pooled: Float[Tensor, "R D"], layers: Float[Tensor, "V N n"], context: RunContext
    ) -> dict[int, str]:
        """Computes what is not cached, and sets every row's pooled and layer features.

        Returns:
            The error message of each image that cannot be read, by its index.
        """
        width, flat = pooled.shape[1], layers.flatten(0, 1)

        def set_features(rows: Tensor, features: Float[Tensor, "n F"]) -> None:
            pooled[rows] = features[:, :width]
            in_memory = rows < len(flat)
            flat[rows[in_memory]] = features[in_memory, width:]

        store, cache_rows = self._store, self._cache_row.tolist()
        valid = set() if store is None else store.valid_rows([row for row in cache_rows if row >= 0])
        missing = [row for row, cache_row in enumerate(cache_rows) if cache_row not in valid]
        bad: dict[int, str] = {}
        started = flushed = time.monotonic()
        announced = False
        try:
            for rows, key_values, features in self._compute(missing, context, bad):
                if not announced and (ahead := estimate("views", len(missing), len(rows), time.monotonic() - started)):
                    log.info("%s", ahead)
                announced = True
                set_features(torch.tensor(rows, dtype=torch.int64, device="cpu"), features)
                to_cache = [i for i, row in enumerate(rows) if cache_rows[row] >= 0]
                if store is not None and to_cache:
                    store.put([cache_rows[rows[i]] for i in to_cache], key_values[to_cache], features[to_cache])
                    if time.monotonic() - flushed > FLUSH_S:
                        store.flush()
                        flushed = time.monotonic()
        finally:
            if store is not None:
                store.flush()
        if store is not None:
            for cached in (self._cache_row >= 0).nonzero()[:, 0].split(256):
                set_features(cached, store.features[self._cache_row[cached]])
        return bad

    def _gather(self, rows: Tensor, cache_rows: Tensor) -> tuple[Float16[Tensor, "n L 2 H P d"], Float[Tensor, "n D"]]:
        """Returns keys and values, on the CPU, and pooled features of some rows; recomputes what is not cached."""
        cached = cache_rows >= 0
        key_values = torch.empty(len(rows), *self._shape, dtype=torch.float16, device="cpu")
        pooled = torch.empty(len(rows), self.backbone.embed_dim, dtype=torch.float32, device="cpu")
        if cached.any():
            assert self._store is not None
            key_values[cached] = self._store.key_values[cache_rows[cached]]
            pooled[cached] = self._store.features[cache_rows[cached], : self.backbone.embed_dim]
        position = {int(rows[i]): i for i in (~cached).nonzero()[:, 0].tolist()}
        for computed, batch_key_values, features in self._compute(list(position), QUIET, {}):
            into = [position[row] for row in computed]
            key_values[into], pooled[into] = batch_key_values, features[:, : self.backbone.embed_dim]
        return key_values, pooled

    def _compute(
        self, rows: Sequence[int], context: RunContext, bad: dict[int, str]
    ) -> Iterator[tuple[list[int], Float16[Tensor, "n ..."], Float[Tensor, "n F"]]]:
        """Runs the frozen stream over some rows; yields row numbers, keys and values, and features batch by batch.

        The features are the pooled feature, then the layer features. Each image is read once for all its views. Errors
        of unreadable images are added to `bad`.
        """
        images, rows_of = self._images, dict[int, list[int]]()
        for row in rows:
            rows_of.setdefault(row % self._num_images, []).append(row)

        def views(image: int, item: Item) -> list[tuple[int, Tensor]]:
            return self._views(item, rows_of[image])

        for batch in read_in_batches(images, list(rows_of), views, self._micro_batch, "reading images", context, bad):
            shape = self._shape if self._tokens else (0,)
            half = torch.empty(len(batch), *shape, dtype=torch.float16, device=self.backbone.device)

            def store_half(layer: int, frozen: KeyValue, offered: KeyValue, half: Tensor = half) -> None:
                for which, values in enumerate(frozen):
                    half[:, layer, which] = values[: len(half)]

            pixels = torch.stack([view for _, view in batch])
            observe = store_half if self._tokens else None
            result = forward_pass(
                self.backbone, pixels, sizes=(self._micro_batch,), pooled=True,
                layers=self.backbone.num_layer_features > 0, observe=observe,
            )  # fmt: skip
            assert result.features is not None
            features = result.features.cpu()
            for (row, _), of_row in zip(batch, features, strict=True):
                if not of_row.isfinite().all():
                    raise DataError(
                        f"{images.item(row % self._num_images).called} has a backbone feature with NaN or infinity. "
                        "Tensors must be normalised as `backbone.transform` does it."
                    )
            yield [row for row, _ in batch], half.cpu(), features

    def _views(self, item: Item, rows: Sequence[int]) -> list[tuple[int, Tensor]]:
        """Returns the views of one image that some rows stand for, each with its row."""
        numbers = [row // self._num_images for row in rows]
        transforms = self._augmentation.transforms(item.digest, numbers, self.backbone.preprocessing)
        return list(zip(rows, item.views(self.backbone, transforms), strict=True))

    def _to_device(self) -> Tensor | None:
        """Returns the cached keys and values on the training device; None if each batch has to be copied there."""
        if self._store is None:
            return None
        key_values, device = self._store.key_values, self.backbone.device
        if device.type == "cpu":
            return key_values
        if device.type != "cuda":  # Apple's GPUs share the CPU's memory
            return None
        return key_values.to(device) if key_values.nbytes < torch.cuda.mem_get_info(device)[0] / 2 else None

    def _set_parents(self, parents: Sequence[Task], report: Report) -> None:
        """Computes keys and values of the parents' tokens for every cached row.

        They join the keys and values and the pooled features that a batch of cached rows is made from, on its device.
        """
        self._parents = extended = extended_tasks(parents)
        self._layout = Layout(TileStore(self.backbone), extended, offered=extended)
        num_rows = 0 if self._store is None else len(self._store.key_values)
        self._parent_key_values = self._empty_parent_key_values(num_rows)
        if self._store is not None and parents:
            for rows in torch.arange(num_rows, dtype=torch.int64, device="cpu").split(self._micro_batch):
                self._parent_key_values[rows] = self._run_parents(self._store.key_values[rows])
                report("running the tasks to extend", int(rows[-1]) + 1, num_rows)
        self._resident: tuple[Tensor, Tensor, Tensor] | None = None
        if self._key_values is not None:
            pooled, parent_key_values = (
                each.to(self._key_values.device) for each in (self._pooled, self._parent_key_values)
            )
            self._resident = self._key_values, pooled, parent_key_values

    def _empty_parent_key_values(self, count: int) -> Float16[Tensor, "n L 2 H a d"]:
        depth, two, num_heads, _, head_dim = self._shape
        shape = count, depth, two, num_heads, len(self._parents), head_dim
        return torch.empty(shape, dtype=torch.float16, device="cpu")

    def _run_parents(self, half: Float16[Tensor, "n L 2 H P d"]) -> Float16[Tensor, "n L 2 H a d"]:
        """Returns the parents' tokens over at most one micro-batch, in the shapes that preserve their bits."""
        key_values = self._empty_parent_key_values(len(half))
        if not self._parents:
            return key_values
        rows = [self._layout.offered[parent.sha256] for parent in self._parents]

        def observe(layer: int, frozen: KeyValue, offered: KeyValue) -> None:
            for which, values in enumerate(offered):
                key_values[:, layer, which] = values[: len(half), :, rows]

        self._run_tasks(half, self._layout, observe)
        return key_values

    def _run_tasks(self, half: Tensor, layout: Layout, observe: Observer | None = None) -> dict[str, Tensor]:
        """Returns the tasks' features, by sha256, over the activations of at most one micro-batch, padded to it."""
        padded = F.pad(half, (0, 0) * 5 + (0, self._micro_batch - len(half)))
        layers = padded.to(self.backbone.device, self.backbone.precision)
        stream = [KeyValue(layers[:, layer, 0], layers[:, layer, 1]) for layer in range(self.backbone.depth)]
        reads = {task.sha256: lambda feature, *_: feature for task in layout.tasks}
        return forward_pass(self.backbone, stream, layout, reads, observe=observe).answers


def _rounded_up(gigabytes: float) -> str:
    """To two digits, and never 0.00."""
    return f"{math.ceil(100 * gigabytes) / 100:.2f}"


def extended_tasks(parents: Sequence[Task]) -> list[Task]:
    """Returns all tasks that a task with these parents extends, directly or not.

    They are identified by content, since two versions of one name may be among them.
    """
    tasks = {task.sha256: task for parent in parents for task in (*parent.closure, parent)}
    return list(tasks.values())
