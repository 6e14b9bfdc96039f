"""What training reads of images: constants of the frozen stream, kept as far as the budget goes, else computed anew."""

from __future__ import annotations

import hashlib
import json
import logging
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

FLUSH_S = 10.0
"""Seconds of work that a power cut may cost while the cache is filled."""

MOST_BYTES_OF_VIEWS = 2**31
"""Of layer features: where those of all views are more, only those of the images as they are are held in memory."""

log = logging.getLogger(__name__)


class Activations:
    """Activations of every view of some images; view 0 is the image as it is.

    A view's activations are the same bits whether they are kept or computed anew: images pass the frozen stream in the
    canonical micro-batch, and keys and values are rounded to half precision. `targets`, `groups` and `pooled` (the
    backbone's own feature) are those of the readable images as they are; `layers`, the layer features, of their views
    too, where memory has room. `skipped` says what was wrong with the others. Without tokens there are no keys and
    values.
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
        num_heads, head_dim = backbone.num_heads, backbone.embed_dim // backbone.num_heads
        self._shape = backbone.depth, 2, num_heads, backbone.num_tokens, head_dim  # of one view's keys and values
        keys = self._keys(digests)
        self._store = self._open(cache, list(dict.fromkeys(keys)))
        place = {} if self._store is None else self._store.place
        self._place = torch.tensor([place.get(key, -1) for key in keys], dtype=torch.int64, device="cpu")
        pooled = torch.zeros(len(keys), backbone.embed_dim, dtype=torch.float32, device="cpu")
        views, width = 1 + augmentation.num_views, backbone.num_layer_features
        if 4 * len(keys) * width > MOST_BYTES_OF_VIEWS:
            views = 1
        layers = torch.zeros(views, len(digests), width, dtype=torch.float32, device="cpu")
        bad = self._fill(pooled, layers, context)
        self.skipped = tuple(dict.fromkeys(bad.values()))
        readable = [i for i in range(len(digests)) if i not in bad]
        self._readable = torch.tensor(readable, dtype=torch.long, device="cpu")
        self._pooled, self.pooled, self.layers = pooled, pooled[self._readable], layers[:, self._readable]
        self.labels, self.targets, self.objective = images.labels, images.targets[self._readable], images.objective
        self.groups = None if images.groups is None else [images.groups[i] or f"\0{i}" for i in readable]
        self.num_classes = len(images.labels)
        self._resident = self._to_device()
        self._look_at(parents, context.report)

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, images: Int[Tensor, " B"], views: Int[Tensor, " B"] | int = 0) -> Batch:
        """What training reads of some of the readable images, in one view each; what is not kept is computed now."""
        rows = self._readable[images] + views * self._num_images
        known = rows < len(self._place)
        place = torch.where(known, self._place[rows.clamp(max=len(self._place) - 1)], -1)
        kept = place >= 0
        if kept.all() and self._resident is not None:
            return Batch(self.backbone, self._resident, place, self._kin[place], self._pooled[rows])
        key_values, pooled = self._gather(rows, place)
        kin = self._no_kin(len(rows))
        if kept.any():
            kin[kept] = self._kin[place[kept]]
        for missing in (~kept).nonzero()[:, 0].split(self._micro_batch):
            kin[missing] = self._kin_of(key_values[missing])
        whole = key_values.to(self.backbone.device)
        return Batch(self.backbone, whole, torch.arange(len(rows), dtype=torch.int64, device="cpu"), kin, pooled)

    def seeing(self, parents: Sequence[Task], report: Report = silent) -> Activations:
        """The same for a task with these parents; nothing of the frozen stream is redone."""
        other = copy(self)
        other._look_at(parents, report)
        return other

    def features(self, tasks: Sequence[Task]) -> list[Float[Tensor, "N D"]]:
        """The final feature of each of some tasks' tokens over every readable image as it is, in float32."""
        layout = Layout(TileStore(self.backbone), tasks)
        found: list[list[Tensor]] = [[] for _ in tasks]
        for rows in self._readable.split(self._micro_batch):
            features = self._run_tasks(self._gather(rows, self._place[rows])[0], layout)
            for parts, task in zip(found, tasks, strict=True):
                parts.append(features[task.sha256][: len(rows)].float().cpu())
        return [torch.cat(parts) for parts in found]

    def _keys(self, digests: Sequence[str]) -> list[str]:
        """What each row is found by: its image's content and its view; first every image as it is."""
        recipe = json.dumps(asdict(replace(self._augmentation, views=0, fresh=False)), sort_keys=True)
        views = ["plain", *(f"{recipe} {number}" for number in range(1, 1 + self._augmentation.num_views))]
        return [hashlib.sha256(f"{digest} {view}".encode()).hexdigest() for view in views for digest in digests]

    def _open(self, cache: ActivationCache, keys: Sequence[str]) -> Store | None:
        """The cache's store of as many rows as it has room for."""
        extra = self._augmentation.num_views
        features = self.backbone.embed_dim + self.backbone.num_layer_features
        of_row = row_bytes(self._shape if self._tokens else (), features)
        capacity = cache.capacity(of_row, len(keys))
        whole, held = len(keys) * of_row / 1e9, capacity * of_row / 1e9
        views = f", {1 + extra} views of each," if extra else ""
        log.info(
            "Activations of %d images%s take %.2f GB; %s.", self._num_images, views, whole,
            f"they are kept in {cache.folder}" if capacity == len(keys)
            else f"{held:.2f} GB are kept in {cache.folder}, the rest is computed anew in each epoch",
        )  # fmt: skip
        return cache.open(self.backbone, keys[:capacity], self._tokens) if capacity else None

    def _fill(
        self, pooled: Float[Tensor, "R D"], layers: Float[Tensor, "V N n"], context: RunContext
    ) -> dict[int, str]:
        """Computes what is not kept yet, and every row's pooled and layer features; gives what is wrong with which."""
        width, flat = pooled.shape[1], layers.flatten(0, 1)

        def note(rows: Tensor, features: Float[Tensor, "n F"]) -> None:
            pooled[rows] = features[:, :width]
            wanted = rows < len(flat)
            flat[rows[wanted]] = features[wanted, width:]

        store, places = self._store, self._place.tolist()
        held = set() if store is None else store.held([place for place in places if place >= 0])
        todo = [row for row, place in enumerate(places) if place not in held]
        bad: dict[int, str] = {}
        flushed = time.monotonic()
        try:
            for taken, key_values, features in self._compute(todo, context, bad):
                note(torch.tensor(taken, dtype=torch.int64, device="cpu"), features)
                kept = [i for i, row in enumerate(taken) if places[row] >= 0]
                if store is not None and kept:
                    store.put([places[taken[i]] for i in kept], key_values[kept], features[kept])
                if store is not None and time.monotonic() - flushed > FLUSH_S:
                    store.flush()
                    flushed = time.monotonic()
        finally:
            if store is not None:
                store.flush()
        if store is not None:
            for rows in (self._place >= 0).nonzero()[:, 0].split(256):
                note(rows, store.features[self._place[rows]])
        return bad

    def _gather(self, rows: Tensor, place: Tensor) -> tuple[Float16[Tensor, "n L 2 H P d"], Float[Tensor, "n D"]]:
        """Keys and values of some rows on the CPU, and their pooled features: what is kept, and the rest computed."""
        kept = place >= 0
        key_values = torch.empty(len(rows), *self._shape, dtype=torch.float16, device="cpu")
        pooled = torch.empty(len(rows), self.backbone.embed_dim, dtype=torch.float32, device="cpu")
        if kept.any():
            assert self._store is not None
            key_values[kept] = self._store.key_values[place[kept]]
            pooled[kept] = self._store.features[place[kept], : self.backbone.embed_dim]
        position = {int(rows[i]): i for i in (~kept).nonzero()[:, 0].tolist()}
        for taken, found, features in self._compute(list(position), QUIET, {}):
            into = [position[row] for row in taken]
            key_values[into], pooled[into] = found, features[:, : self.backbone.embed_dim]
        return key_values, pooled

    def _compute(
        self, rows: Sequence[int], context: RunContext, bad: dict[int, str]
    ) -> Iterator[tuple[list[int], Float16[Tensor, "n ..."], Float[Tensor, "n F"]]]:
        """Runs the frozen stream over some rows: batch by batch rows, keys and values, pooled and layer features.

        All that is wanted of an image is made of one reading; what is wrong with which images is noted in `bad`.
        """
        images, of_image = self._images, dict[int, list[int]]()
        for row in rows:
            of_image.setdefault(row % self._num_images, []).append(row)

        def views(image: int, item: Item) -> list[tuple[int, Tensor]]:
            return self._views(item, of_image[image])

        for batch in read_in_batches(images, list(of_image), views, self._micro_batch, "reading images", context, bad):
            shape = self._shape if self._tokens else (0,)
            half = torch.empty(len(batch), *shape, dtype=torch.float16, device="cpu")

            def keep(layer: int, frozen: KeyValue, offered: KeyValue, half: Tensor = half) -> None:
                for which, part in enumerate(frozen):
                    half[:, layer, which] = part[: len(half)]

            pixels = torch.stack([view for _, view in batch])
            observe = keep if self._tokens else None
            _, pooled, layers = forward_pass(
                self.backbone, pixels, sizes=(self._micro_batch,), pooled=True,
                layers=self.backbone.num_layer_features > 0, observe=observe,
            )  # fmt: skip
            assert pooled is not None
            read = torch.cat([part.float() for part in (pooled, layers) if part is not None], dim=1).cpu()
            for (row, _), one in zip(batch, read, strict=True):
                if not one.isfinite().all():
                    raise DataError(
                        f"{images.item(row % self._num_images).called} gives the backbone a feature that holds NaN or "
                        "infinity. Tensors must be normalised as `backbone.transform` does it."
                    )
            yield [row for row, _ in batch], half, read

    def _views(self, item: Item, rows: Sequence[int]) -> list[tuple[int, Tensor]]:
        """The rows of one image, each with its view."""
        numbers = [row // self._num_images for row in rows]
        made = self._augmentation.transforms(item.digest, numbers, self.backbone.preprocessing)
        return list(zip(rows, item.views(self.backbone, made), strict=True))

    def _to_device(self) -> Tensor | None:
        """The kept keys and values where training reads them; None where each batch has to be brought there."""
        if self._store is None:
            return None
        kept, device = self._store.key_values, self.backbone.device
        if device.type == "cpu":
            return kept
        return kept.to(device) if kept.nbytes < torch.cuda.mem_get_info(device)[0] / 2 else None

    def _look_at(self, parents: Sequence[Task], report: Report) -> None:
        """Keys and values of the parents' tokens for every kept row, from what is kept."""
        self._parents = seen = family(parents)
        self._layout = Layout(TileStore(self.backbone), seen, offered=seen)
        self._kin = self._no_kin(0 if self._store is None else len(self._store.key_values))
        if self._store is None or not parents:
            return
        for part in torch.arange(len(self._kin), dtype=torch.int64, device="cpu").split(self._micro_batch):
            self._kin[part] = self._kin_of(self._store.key_values[part])
            report("running the tasks to extend", int(part[-1]) + 1, len(self._kin))

    def _no_kin(self, count: int) -> Float16[Tensor, "n L 2 H a d"]:
        depth, two, num_heads, _, head_dim = self._shape
        shape = count, depth, two, num_heads, len(self._parents), head_dim
        return torch.empty(shape, dtype=torch.float16, device="cpu")

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
        reads = {task.sha256: lambda feature, *_: feature for task in layout.tasks}
        return forward_pass(self.backbone, stream, layout, reads, observe=observe).answers


def family(parents: Sequence[Task]) -> list[Task]:
    """All that a task with these parents sees, by content: among ancestors there may be two versions of one name."""
    seen = {task.sha256: task for parent in parents for task in (*parent.closure, parent)}
    return list(seen.values())
