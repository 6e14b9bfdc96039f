"""Frozen activations that a task is trained on: those of a dataset's readable images, and of the tasks to extend."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Int
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined import Layout, Observer, TileStore, micro_batch, prove, task_features
from addenda.learner.activation_cache import ActivationCache
from addenda.learner.augmentation import Augmentation
from addenda.learner.context import QUIET, Report, RunContext, silent
from addenda.learner.data.labelled import LabelledImages
from addenda.learner.frozen_views import FrozenViews
from addenda.learner.token_stream import Batch
from addenda.registry import Task


class Activations:
    """Frozen activations of the readable images of a dataset, in every view; view 0 is the unaugmented image.

    `targets`, `groups`, `digests` and `pooled` (the backbone's own feature) cover the unaugmented images; `layers`, the
    layer features, covers their views too if memory allows. `skipped` says why the other images could not be read. With
    `tokens=False` there are no keys and values.
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
        self.backbone, self._micro_batch = backbone, micro_batch(backbone.device)
        self._frozen = FrozenViews(backbone, images, augmentation, cache, tokens)
        self._pooled, layers, unreadable = self._frozen.fill(context)
        self.skipped = tuple(dict.fromkeys(unreadable.values()))
        readable = [i for i in range(len(images)) if i not in unreadable]
        self._readable = torch.tensor(readable, dtype=torch.int64, device="cpu")
        self.pooled, self.layers = self._pooled[self._readable], layers[:, self._readable]
        self.labels, self.targets, self.objective = images.labels, images.targets[self._readable], images.objective
        self.digests = [self._frozen.digests[i] for i in readable]
        self.groups = None if images.groups is None else [images.groups[i] or f"\0{i}" for i in readable]
        self.num_classes = len(images.labels)
        self._key_values = self._to_device()
        self._set_parents(parents, context.report)

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, images: Int[Tensor, " B"], views: Int[Tensor, " B"] | int = 0) -> Batch:
        """Returns the activations of some readable images, in one view each; recomputes what is not cached."""
        rows = self._frozen.rows(self._readable[images], views)
        cache_rows = self._frozen.cache_rows(rows)
        cached = cache_rows >= 0
        if self._resident is not None and cached.numpy().all():  # not torch's `all`: nothing here waits for the device
            key_values, pooled, parents = self._resident
            on_device = cache_rows.to(self.backbone.device)
            return Batch(self.backbone, key_values, on_device, parents[on_device], pooled[rows.to(pooled.device)])
        key_values, pooled = self._frozen.gather(rows)
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
            features = self._run_tasks(self._frozen.gather(rows)[0], layout)
            for of_task, task in zip(batches, tasks, strict=True):
                of_task.append(features[task.sha256][: len(rows)].float().cpu())
        return [torch.cat(of_task) for of_task in batches]

    def _to_device(self) -> Tensor | None:
        """Returns the cached keys and values on the training device; None if each batch has to be copied there."""
        if self._frozen.store is None:
            return None
        key_values, device = self._frozen.store.key_values, self.backbone.device
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
        store = self._frozen.store
        num_rows = 0 if store is None else len(store.key_values)
        self._parent_key_values = self._empty_parent_key_values(num_rows)
        if store is not None and parents:
            for rows in torch.arange(num_rows, dtype=torch.int64, device="cpu").split(self._micro_batch):
                self._parent_key_values[rows] = self._run_parents(store.key_values[rows])
                report("running the tasks to extend", int(rows[-1]) + 1, num_rows)
        self._resident: tuple[Tensor, Tensor, Tensor] | None = None
        if self._key_values is not None:
            pooled, parent_key_values = (
                each.to(self._key_values.device) for each in (self._pooled, self._parent_key_values)
            )
            self._resident = self._key_values, pooled, parent_key_values

    def _empty_parent_key_values(self, count: int) -> Float16[Tensor, "n L 2 H a d"]:
        depth, two, num_heads, _, head_dim = self._frozen.shape
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
        return task_features(self.backbone, stream, layout, observe)


def extended_tasks(parents: Sequence[Task]) -> list[Task]:
    """Returns all tasks that a task with these parents extends, directly or not.

    They are identified by content, since two versions of one name may be among them.
    """
    tasks = {task.sha256: task for parent in parents for task in (*parent.closure, parent)}
    return list(tasks.values())
