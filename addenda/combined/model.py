"""The combined model: one frozen pass, and every task's answer from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, read_image
from addenda.combined.layout import Layout, MemoryCache
from addenda.combined.numerics import micro_batch
from addenda.combined.streams import Observer, task_features
from addenda.exceptions import BackboneError, RegistryError, UnknownTaskError
from addenda.registry import Task

HEAD_ROWS = 16


class CombinedModel:
    """Answers every task from one pass over an image; a task's bits depend on no other task that it does not extend.

    Images run in one canonical micro-batch, filled up with zeros; task tokens in tiles of fixed size; heads one by
    one. docs/exactness.md says why.

    Args:
        backbone: the frozen backbone.
        tasks: the tasks to answer, each learned on this backbone. Those that they extend are computed too.

    Raises:
        BackboneError: a task was learned on another backbone.
        RegistryError: two different tasks of one name.

    Example:
        >>> from addenda import load_backbone
        >>> import torch
        >>> model = CombinedModel(load_backbone("glyphs", device="cpu"), [])
        >>> model(torch.zeros(2, 3, 32, 32))
        {}
    """

    def __init__(self, backbone: FrozenBackbone, tasks: Sequence[Task]) -> None:
        self.backbone = backbone
        self.tasks: dict[str, Task] = {}
        self.micro_batch = micro_batch(backbone.device)
        for task in tasks:
            for member in (*task.closure, task):
                _check_fits(member, backbone)
            if self.tasks.setdefault(task.name, task).sha256 != task.sha256:
                raise RegistryError(
                    f"Two different tasks are named {task.name!r}; a combined model answers one of them."
                )
        self._memory = MemoryCache(backbone)
        self._layout = lru_cache(maxsize=8)(self._make_layout)
        self._head_dtype = torch.promote_types(backbone.precision, torch.float32)
        self._heads = {task.sha256: self._head(task) for task in self.tasks.values()}

    def _head(self, task: Task) -> tuple[Tensor, Tensor, Tensor | None]:
        """Head weight, bias and pooled weight: in float32 at least, whatever the backbone's precision.

        Rows are filled up with zeros to a multiple of HEAD_ROWS: in narrower products an image's bits depend on its
        place in the batch.
        """

        def fill(tensor: Tensor) -> Tensor:
            moved = tensor.to(self.backbone.device, self._head_dtype)
            rows = (0,) * (2 * (tensor.ndim - 1)) + (0, -len(tensor) % HEAD_ROWS)
            return F.pad(moved, rows)

        pooled = None if task.pooled_weight is None else fill(task.pooled_weight)
        return fill(task.head_weight), fill(task.head_bias), pooled

    def _make_layout(self, names: tuple[str, ...]) -> Layout:
        return Layout(self.backbone, [self.tasks[name] for name in names], self._memory)

    def _select(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        unknown = [name for name in tasks or () if name not in self.tasks]
        if unknown:
            known = ", ".join(repr(name) for name in self.tasks) or "none"
            raise UnknownTaskError(f"Task {unknown[0]!r} is not in this model. Known: {known}.")
        return tuple(self.tasks) if tasks is None else tuple(dict.fromkeys(tasks))

    @torch.no_grad()
    def __call__(self, images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Float[Tensor, "B C"]]:
        """Logits of every task, or of some, in float32 on the backbone's device.

        Args:
            images: Float[B, 3, H, W], of the backbone's input size, normalised, as `backbone.transform` gives them.
            tasks: names of the tasks to answer; None answers all.

        Raises:
            BackboneError: images of another shape.
            UnknownTaskError: a name that this model does not hold.
        """
        self.backbone.check_images(images)
        names = self._select(tasks)
        if not names:
            return {}
        layout = self._layout(names)
        pieces: dict[str, list[Tensor]] = {name: [] for name in names}
        for batch, count in self._micro_batches(images):
            for name, logits in self._answer(batch, names, layout).items():
                pieces[name].append(logits[:count])
        return {name: torch.cat(parts) for name, parts in pieces.items()}

    def backbone_logits(self, images: Tensor) -> Float[Tensor, "B C"]:
        """Stock timm's own logits of images Float[B, 3, H, W], computed in the same micro-batches."""
        self.backbone.check_images(images)
        return torch.cat([self.backbone.backbone_logits(batch)[:count] for batch, count in self._micro_batches(images)])

    def slots(self, tasks: Sequence[Task]) -> list[int]:
        """Where `observe` finds the tokens of some of its tasks or their ancestors."""
        layout = self._layout(tuple(self.tasks))
        return [layout.slot[task.sha256] for task in tasks]

    @torch.no_grad()
    def observe(self, images: Float[Tensor, "B 3 H W"], observer: Observer) -> Float[Tensor, "B D"]:
        """Runs one micro-batch or less and shows an observer each layer's keys and values, before any padding is cut.

        Returns:
            The backbone's own pooled feature of each image.
        """
        layout = self._layout(tuple(self.tasks))
        assert len(images) <= self.micro_batch
        batch, count = next(self._micro_batches(images))
        stream = self.backbone.stream(batch)
        task_features(self.backbone, stream, layout, observer)
        return stream.pooled[:count]

    def predict(
        self, paths: Sequence[str | Path], top: int = 3, tasks: Sequence[str] | None = None
    ) -> dict[str, list[list[tuple[str, float]]]]:
        """Reads image files and answers every task.

        Args:
            paths: image files.
            top: how many labels to give for each image, best first.
            tasks: names of the tasks to answer; None answers all.

        Returns:
            For each task and each path, (label, probability) pairs.

        Raises:
            DataError: a file that is not a readable image.
        """
        answers: dict[str, list[list[tuple[str, float]]]] = {name: [] for name in self._select(tasks)}
        for start in range(0, len(paths), self.micro_batch):
            batch = [self.backbone.transform(read_image(path)) for path in paths[start : start + self.micro_batch]]
            for name, logits in self(torch.stack(batch), tasks).items():
                labels = self.tasks[name].labels
                best = logits.softmax(-1).topk(min(top, len(labels)))
                for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    answers[name].append([(labels[i], value) for i, value in zip(indices, values, strict=True)])
        return answers

    def _micro_batches(self, images: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Cuts images into batches of one shape, the last filled up with zeros; gives each with its count."""
        for part in images.split(self.micro_batch):
            fill = (0, 0, 0, 0, 0, 0, 0, self.micro_batch - len(part))
            yield F.pad(part.to(self.backbone.device, self.backbone.precision), fill), len(part)

    def _answer(self, images: Tensor, names: Sequence[str], layout: Layout) -> dict[str, Tensor]:
        """One micro-batch: the frozen stream and the task streams, layer by layer, then the heads one by one."""
        stream = self.backbone.stream(images, pooled=any(self.tasks[name].reads_pooled for name in names))
        features = task_features(self.backbone, stream, layout).to(self._head_dtype)
        pooled = stream.pooled.to(self._head_dtype) if stream.gives_pooled else None
        return {name: self._logits(self.tasks[name], features, pooled, layout) for name in names}

    def _logits(self, task: Task, features: Tensor, pooled: Tensor | None, layout: Layout) -> Tensor:
        weight, bias, pooled_weight = self._heads[task.sha256]
        if task.class_token is None:
            assert pooled is not None
            logits = F.linear(pooled, weight, bias)
        else:
            logits = F.linear(features[:, layout.slot[task.sha256]].contiguous(), weight, bias)
            if pooled_weight is not None:
                assert pooled is not None
                logits = logits + F.linear(pooled, pooled_weight)
        return logits[:, : len(task.labels)].contiguous()


def _check_fits(task: Task, backbone: FrozenBackbone) -> None:
    """Raises an error that names the task unless it can run on this backbone."""
    if task.backbone != backbone.fingerprint:
        raise BackboneError(
            f"Task {task.ref!r} was learned on the backbone with fingerprint {task.backbone[:12]}…; "
            f"{backbone.name!r} as loaded has {backbone.fingerprint[:12]}…. Weights, input size and preprocessing must "
            "be the same."
        )
    for parent in task.parents:
        if parent.class_token is None:
            raise RegistryError(
                f"Task {task.ref!r} extends {parent.ref!r}, which is head-only: it has no token to see."
            )
    if task.memory is not None and (len(task.memory), task.memory.shape[2]) != (backbone.depth, backbone.embed_dim):
        raise RegistryError(
            f"Task {task.ref!r} has memory {list(task.memory.shape)}; backbone {backbone.name!r} has {backbone.depth} "
            f"layers of {backbone.embed_dim} dimensions."
        )
