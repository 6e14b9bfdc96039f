"""The frozen stream over every view of a dataset: cached on disk as far as the budget allows, otherwise recomputed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Float16, Int
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined import forward_pass, micro_batch
from addenda.exceptions import DataError
from addenda.learner.activation_cache import ActivationCache
from addenda.learner.augmentation import Augmentation
from addenda.learner.context import QUIET, RunContext
from addenda.learner.data.labelled import Item, LabelledImages, read_in_batches
from addenda.learner.store import Store, row_bytes
from addenda.text import estimate

FLUSH_S = 10.0
"""Seconds between flushes while the cache is filled, and so the most work that a power cut can cost."""

MAX_LAYER_FEATURE_BYTES = 2**31
"""Above this size, layer features are held in memory for the unaugmented images only, not for their random views."""

FIT_MEMORY, FIT_BYTES = 6, 150_000_000
"""Peak memory of a fit to layer features: a multiple of their size, and the same bytes for all. Measured: 5.7 times
large ones, 340 MB at 38 MB."""

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Features of a dataset's images; those of unreadable images are zero."""

    pooled: Float[Tensor, "R D"]  # by row
    layers: Float[Tensor, "V N n"]  # of all views if memory allows, otherwise of view 0
    unreadable: dict[int, str]  # the error message of each image that cannot be read, by its index


class FrozenViews:
    """Keys and values and features of every view of a dataset's images, addressed by row.

    View v of image i is row v * num_images + i; view 0 is the unaugmented image. A row has the same bits whether it is
    cached or recomputed: images run through the frozen stream in the canonical micro-batch, and keys and values are
    rounded to half precision. With `tokens=False` there are no keys and values.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        images: LabelledImages,
        augmentation: Augmentation,
        cache: ActivationCache,
        tokens: bool,
    ) -> None:
        self.digests = images.digests or tuple(images.digest(index) for index in range(len(images)))
        self.shape = backbone.key_value_shape
        self._backbone, self._augmentation, self._tokens = backbone, augmentation, tokens
        self._images, self._num_images = replace(images, digests=self.digests), len(self.digests)
        keys = self._keys()
        width = backbone.num_layer_features
        self._views_in_memory = 1 + augmentation.num_views
        if 4 * len(keys) * width > MAX_LAYER_FEATURE_BYTES:
            self._views_in_memory = 1
        self.store = self._open(cache, list(dict.fromkeys(keys)), 4 * self._views_in_memory * self._num_images * width)
        row_of = {} if self.store is None else self.store.row_of
        self._cache_rows = torch.tensor([row_of.get(key, -1) for key in keys], dtype=torch.int64, device="cpu")

    def rows(self, images: Int[Tensor, " B"], views: Int[Tensor, " B"] | int) -> Int[Tensor, " B"]:
        """Returns the rows of some images in one view each."""
        return images + views * self._num_images

    def cache_rows(self, rows: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Returns the rows' numbers in `store`, -1 for those that are not cached, such as fresh views."""
        last = len(self._cache_rows) - 1
        return torch.where(rows <= last, self._cache_rows[rows.clamp(max=last)], -1)

    def fill(self, context: RunContext) -> Features:
        """Computes what is not cached yet, caches it as far as the budget allows, and returns all features."""
        num_rows, width = len(self._cache_rows), self._backbone.embed_dim
        of_layers = self._views_in_memory, self._num_images, self._backbone.num_layer_features
        pooled = torch.zeros(num_rows, width, dtype=torch.float32, device="cpu")
        layers = torch.zeros(of_layers, dtype=torch.float32, device="cpu")
        flat = layers.flatten(0, 1)

        def set_features(rows: Tensor, features: Float[Tensor, "n F"]) -> None:
            pooled[rows] = features[:, :width]
            in_memory = rows < len(flat)
            flat[rows[in_memory]] = features[in_memory, width:]

        store, cache_rows = self.store, self._cache_rows.tolist()
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
            for cached in (self._cache_rows >= 0).nonzero()[:, 0].split(256):
                set_features(cached, store.features[self._cache_rows[cached]])
        return Features(pooled, layers, bad)

    def gather(self, rows: Int[Tensor, " n"]) -> tuple[Float16[Tensor, "n L 2 H P d"], Float[Tensor, "n D"]]:
        """Returns keys and values, on the CPU, and pooled features of some rows; recomputes what is not cached."""
        cache_rows, width = self.cache_rows(rows), self._backbone.embed_dim
        cached = cache_rows >= 0
        key_values = torch.empty(len(rows), *self.shape, dtype=torch.float16, device="cpu")
        pooled = torch.empty(len(rows), width, dtype=torch.float32, device="cpu")
        if cached.any():
            assert self.store is not None
            key_values[cached] = self.store.key_values[cache_rows[cached]]
            pooled[cached] = self.store.features[cache_rows[cached], :width]
        position = {int(rows[i]): i for i in (~cached).nonzero()[:, 0].tolist()}
        for computed, batch_key_values, features in self._compute(list(position), QUIET, {}):
            into = [position[row] for row in computed]
            key_values[into], pooled[into] = batch_key_values, features[:, :width]
        return key_values, pooled

    def _keys(self) -> list[str]:
        """Returns each row's cache key, a hash of image content and view."""
        recipe = json.dumps(asdict(replace(self._augmentation, views=0, fresh=False)), sort_keys=True)
        views = ["plain", *(f"{recipe} {number}" for number in range(1, 1 + self._augmentation.num_views))]
        return [hashlib.sha256(f"{digest} {view}".encode()).hexdigest() for view in views for digest in self.digests]

    def _open(self, cache: ActivationCache, keys: Sequence[str], layer_bytes: int) -> Store | None:
        """Opens a cache entry for as many rows as the budget allows; says what disk and memory it all takes."""
        num_views = self._augmentation.num_views
        num_features = self._backbone.embed_dim + self._backbone.num_layer_features
        of_row = row_bytes(self.shape if self._tokens else (), num_features)
        capacity = cache.capacity(of_row, len(keys))
        total_gb, cached_gb = len(keys) * of_row / 1e9, capacity * of_row / 1e9
        views = f" in {1 + num_views} views each" if num_views else ""
        log.info(
            "Activations of %d images%s take %s GB, and fits to them up to %s GB of memory; %s.",
            self._num_images, views, _rounded_up(total_gb), _rounded_up((FIT_MEMORY * layer_bytes + FIT_BYTES) / 1e9),
            f"all are cached in {cache.folder}" if capacity == len(keys)
            else f"of these {cached_gb:.2f} GB fit into the cache in {cache.folder}, and the rest is computed again in "
            "each epoch",
        )  # fmt: skip
        return cache.open(self._backbone, keys[:capacity], self._tokens) if capacity else None

    def _compute(
        self, rows: Sequence[int], context: RunContext, bad: dict[int, str]
    ) -> Iterator[tuple[list[int], Float16[Tensor, "n ..."], Float[Tensor, "n F"]]]:
        """Runs the frozen stream over some rows; yields row numbers, keys and values, and features batch by batch.

        The features are the pooled feature, then the layer features. Each image is read once for all its views. Errors
        of unreadable images are added to `bad`.
        """
        backbone, size = self._backbone, micro_batch(self._backbone.device)
        images, rows_of = self._images, dict[int, list[int]]()
        for row in rows:
            rows_of.setdefault(row % self._num_images, []).append(row)

        def views(image: int, item: Item) -> list[tuple[int, Tensor]]:
            return self._views(item, rows_of[image])

        for batch in read_in_batches(images, list(rows_of), views, size, "reading images", context, bad):
            shape = self.shape if self._tokens else (0,)
            half = torch.empty(len(batch), *shape, dtype=torch.float16, device=backbone.device)

            def store_half(layer: int, frozen: KeyValue, offered: KeyValue, half: Tensor = half) -> None:
                for which, values in enumerate(frozen):
                    half[:, layer, which] = values[: len(half)]

            pixels = torch.stack([view for _, view in batch])
            observe = store_half if self._tokens else None
            layers = backbone.num_layer_features > 0
            result = forward_pass(backbone, pixels, sizes=(size,), pooled=True, layers=layers, observe=observe)
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
        transforms = self._augmentation.transforms(item.digest, numbers, self._backbone.preprocessing)
        return list(zip(rows, item.views(self._backbone, transforms), strict=True))


def _rounded_up(gigabytes: float) -> str:
    """To two digits, and never 0.00."""
    return f"{math.ceil(100 * gigabytes) / 100:.2f}"
