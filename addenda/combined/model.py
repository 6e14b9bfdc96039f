"""The combined model: the logits of every task from one frozen forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, plain, read_files, uncompiled
from addenda.combined.features import TASK_FEATURE, feature_tasks
from addenda.combined.forward import HeadFunction, backbone_logits, forward_pass
from addenda.combined.heads import Head, group_heads, load_head
from addenda.combined.numerics import operations_sample, runtime_settings
from addenda.combined.predictions import Prediction, predictions_of
from addenda.combined.routing import Choice, Router
from addenda.combined.selftest import prove
from addenda.combined.shapes import TILE, Shapes, micro_batch
from addenda.combined.tiles import Layout, TileStore
from addenda.exceptions import BackboneError, ExactnessError, RegistryError, UnknownTaskError
from addenda.registry import Task

RELEARN = "Run `addenda verify --deep`, or learn the task again."
"""What to do about a task that does not fit the backbone of its fingerprint."""


class TaskLogits(dict[str, Tensor]):
    """Logits Float[B, C] of each task, by name.

    Attributes:
        exact: whether the exactness promise holds for these logits.
        features: the backbone's pooled and layer features of each image, Float[B, D + n], if requested.
    """

    def __init__(self, logits: dict[str, Tensor], exact: bool, features: Tensor | None = None) -> None:
        super().__init__(logits)
        self.exact = exact
        self.features = features


class CombinedModel:
    """Computes all tasks in one forward pass; a task's bits depend on no other tasks than those that it extends.

    Images run in zero-padded batches of proven sizes, task tokens in tiles of fixed size, and heads one by one or in
    groups with the same bits, as docs/exactness.md explains. A self-test proves these shapes on this machine before
    anything is computed.

    Args:
        backbone: the frozen backbone.
        tasks: the tasks to predict, learned on this backbone. Tasks that they extend are computed too.
        exact: False skips the self-test and all padding: slightly faster for few tasks or images, but bits may depend
            on the other tasks and on the batch.

    Raises:
        BackboneError: a task was learned on another backbone.
        ExactnessError: the self-test failed on this machine.
        RegistryError: two different tasks have the same name.

    Examples:
        >>> from addenda import load_backbone
        >>> import torch
        >>> model = CombinedModel(load_backbone("glyphs", device="cpu"), [])
        >>> model(torch.zeros(2, 3, 32, 32))
        {}
    """

    def __init__(self, backbone: FrozenBackbone, tasks: Sequence[Task], exact: bool = True) -> None:
        self.backbone = backbone
        self.exact = exact
        self.micro_batch = micro_batch(backbone.device)
        self._store = TileStore(backbone)
        self._heads: dict[str, Head] = {}
        self._settings = runtime_settings(backbone), operations_sample()
        self._load(tasks)

    def with_tasks(self, tasks: Sequence[Task]) -> CombinedModel:
        """A model of other tasks that shares tiles and heads with this one; only new tasks are loaded.

        Args:
            tasks: all tasks of the new model.

        Raises:
            BackboneError, ExactnessError, RegistryError: as in the constructor.
        """
        model = object.__new__(type(self))
        vars(model).update(vars(self))
        model._load(tasks)
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        """Deep copies and pickles are rebuilt from the backbone and the tasks."""
        return CombinedModel, (self.backbone, list(self.tasks.values()), self.exact)

    @property
    def heads(self) -> list[Head]:
        """The heads of the tasks, in order."""
        return [self._heads[task.sha256] for task in self.tasks.values()]

    @uncompiled
    def _load(self, tasks: Sequence[Task]) -> None:
        self.tasks: dict[str, Task] = {}
        for task in tasks:
            for member in (*task.closure, task):
                check_fits(member, self.backbone)
            if self.tasks.setdefault(task.name, task).sha256 != task.sha256:
                raise RegistryError(
                    f"Two different tasks are named {task.name!r}; a combined model can hold one. Leave one out."
                )
        now = runtime_settings(self.backbone), operations_sample()
        if now != self._settings:  # bits may differ: share nothing
            self._settings, self._store, self._heads = now, TileStore(self.backbone), {}
        self.shapes = Shapes((self.micro_batch,), (TILE,))
        if self.exact and tasks:
            self.shapes = prove(self.backbone, tasks)
        self._heads = {
            task.sha256: self._heads.get(task.sha256) or load_head(self.backbone, task) for task in self.tasks.values()
        }
        with plain(self.backbone.device):
            group_heads(self._heads, self.shapes.heads)
        slots = self.shapes.slots if self.exact else None
        self.layout = layout = Layout(self._store, list(self.tasks.values()), slots)
        # The closure must not reference the model: that cycle would keep device memory until a garbage collection.
        self._subset_layout = lru_cache(maxsize=8)(lambda *tasks: Layout(layout, tasks, slots))

    def _select(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        unknown = [name for name in tasks or () if name not in self.tasks]
        if unknown:
            known = ", ".join(map(repr, islice(self.tasks, 10))) or "none"
            more = f" and {len(self.tasks) - 10} more" if len(self.tasks) > 10 else ""
            raise UnknownTaskError(f"Task {unknown[0]!r} is not in this model. Known: {known}{more}.")
        return tuple(self.tasks) if tasks is None else tuple(dict.fromkeys(tasks))

    @uncompiled
    def __call__(self, images: Tensor, tasks: Sequence[str] | None = None, features: bool = False) -> TaskLogits:
        """Logits of all or some tasks, in float32 on the backbone's device.

        Args:
            images: Float[B, 3, H, W] from `backbone.transform`.
            tasks: names of the tasks to compute; None computes all.
            features: whether to return the backbone's features too, for a `Router`.

        Returns:
            Float[B, C] for each task, by name.

        Raises:
            BackboneError: the images have another shape.
            ExactnessError: a setting that can change bits was changed since the model was made.
            IntegrityError: a module or weight of the backbone has changed since it was loaded.
            UnknownTaskError: a name is not a task of this model.
        """
        self.backbone.check_images(images)
        if self.exact:
            self.check_settings()
        names = self._select(tasks)
        if not names and not features:
            return TaskLogits({}, self.exact)
        requested = [self.tasks[name] for name in names]
        layout = self.layout if len(requested) == len(self.tasks) else self._subset_layout(*requested)
        heads = {task.sha256: self._heads[task.sha256] for task in requested}
        sizes = self.shapes.images if self.exact else None
        layers = features and self.backbone.num_layer_features > 0
        result = forward_pass(self.backbone, images, layout, heads, sizes, features, layers)
        logits = {task.name: result.answers[task.sha256] for task in requested}
        return TaskLogits(logits, self.exact, result.features)

    @uncompiled
    def embed(self, images: Tensor, features: Sequence[str] = ("pooled",)) -> dict[str, Tensor]:
        """Features of images, for retrieval or for detecting drift; like logits, their bits depend on no other image.

        Args:
            images: Float[B, 3, H, W] from `backbone.transform`.
            features: `"pooled"`, the backbone's pooled feature; `"layers"`, its layer features; and `"task:NAME"`, the
                feature that the head of a task of this model reads (of a head-only task, the pooled one).

        Returns:
            Float[B, D], for layer features Float[B, n], in float32 by name of the feature.

        Raises:
            DataError: a feature is unknown, or none is named.
            BackboneError, ExactnessError, IntegrityError, UnknownTaskError: as in a call of the model.
        """
        self.backbone.check_images(images)
        if self.exact:
            self.check_settings()
        tasks = [self.tasks[name] for name in self._select(feature_tasks(features, self.backbone))]
        layout = self._subset_layout(*tasks)
        heads: dict[str, HeadFunction] = {task.sha256: lambda feature, *_: feature for task in tasks}
        sizes = self.shapes.images if self.exact else None
        result = forward_pass(self.backbone, images, layout, heads, sizes, "pooled" in features, "layers" in features)
        found = {f"{TASK_FEATURE}{task.name}": result.answers[task.sha256] for task in tasks}
        found |= {name: each for name in ("pooled", "layers") if (each := getattr(result, name)) is not None}
        return {name: found[name].float() for name in features}

    def check_settings(self, threads: bool = True) -> None:
        """Raises ExactnessError or IntegrityError if a setting, module or weight changed since the model was made.

        `threads`: whether torch's number of threads counts, which each thread has for itself.
        """
        self.backbone.check_as_loaded()
        (before, sample), now = self._settings, runtime_settings(self.backbone)
        if not threads:
            now["threads"] = before["threads"]
        if now == before and operations_sample() == sample:
            return
        pairs = {name: (before.get(name, "the default"), now.get(name, "the default")) for name in before | now}
        named = ", ".join(f"{name} was {old}, now {new}" for name, (old, new) in pairs.items() if old != new)
        changed = named or "an unknown one, since basic torch operations now give different bits"
        raise ExactnessError(
            f"A setting that can change bits has changed since this model was made: {changed}. Restore it, or make a "
            "new model with model.with_tasks."
        )

    @uncompiled
    def backbone_logits(self, images: Tensor) -> Float[Tensor, "B C"]:
        """Logits of timm's own forward pass for images Float[B, 3, H, W], computed in canonical micro-batches."""
        return backbone_logits(self.backbone, images)

    def predict(
        self,
        paths: Sequence[str | Path],
        top: int | None = None,
        tasks: Sequence[str] | None = None,
        min_probability: float | None = None,
    ) -> dict[str, list[Prediction]]:
        """Reads image files and predicts every task.

        Args:
            paths: image files.
            top: maximum number of labels per image, best first. None gives 3 for a single-label task if
                `min_probability` is None, or else every label.
            tasks: names of the tasks to predict; None predicts all.
            min_probability: minimum probability of a label. None gives 0.5 for a multi-label task, or else 0.

        Returns:
            For each task and path, (label, probability) pairs.

        Raises:
            DataError: a file is not a readable image.
        """
        results: dict[str, list[Prediction]] = {name: [] for name in self._select(tasks)}
        for files in read_files(self.backbone, paths, self.micro_batch):
            for name, batch in self.predict_images(files.images, top, tasks, min_probability).items():
                results[name] += batch
        return results

    def predict_images(
        self,
        images: Float[Tensor, "B 3 H W"],
        top: int | None = None,
        tasks: Sequence[str] | None = None,
        min_probability: float | None = None,
    ) -> dict[str, list[Prediction]]:
        """Like `predict`, for images from `backbone.transform`."""
        logits = self(images, tasks)
        return predictions_of(map(self.tasks.__getitem__, logits), logits, top, min_probability)

    def route(
        self, paths: Sequence[str | Path], router: Router, top: int | None = None, min_probability: float | None = None
    ) -> list[tuple[Choice, Prediction]]:
        """Reads image files, chooses a task for each with a router, and returns that task's prediction.

        Args:
            paths: image files.
            router: a router over tasks of this model.
            top: maximum number of labels per image; see `predict`.
            min_probability: minimum probability of a label.

        Returns:
            For each path, the choice and (label, probability) pairs of the chosen task.

        Raises:
            DataError: a file is not a readable image.
            UnknownTaskError: the router has a task that is not in this model.
        """
        batches = read_files(self.backbone, paths, self.micro_batch)
        return [routed for files in batches for routed in self.route_images(files.images, router, top, min_probability)]

    def route_images(
        self,
        images: Float[Tensor, "B 3 H W"],
        router: Router,
        top: int | None = None,
        min_probability: float | None = None,
    ) -> list[tuple[Choice, Prediction]]:
        """Like `route`, for images from `backbone.transform`."""
        logits = self(images, router.tasks, features=True)
        assert logits.features is not None
        results = predictions_of(map(self.tasks.__getitem__, logits), logits, top, min_probability)
        return [(choice, results[choice.task][i]) for i, choice in enumerate(router.choose(logits.features))]


def check_fits(task: Task, backbone: FrozenBackbone) -> None:
    """Raises an error unless the task can run on this backbone."""
    if task.backbone != backbone.fingerprint:
        raise BackboneError(
            f"Task {task.ref!r} was learned on the backbone with fingerprint {task.backbone[:12]}…; "
            f"{backbone.name!r} as loaded has {backbone.fingerprint[:12]}…. Weights, input size and preprocessing must "
            "match."
        )
    if task.head_weight.shape[1] != backbone.embed_dim:
        raise RegistryError(
            f"Task {task.ref!r} does not fit backbone {backbone.name!r}: its features have {task.head_weight.shape[1]} "
            f"dimensions, not {backbone.embed_dim}. {RELEARN}"
        )
    if task.num_layer_features not in (0, backbone.num_layer_features):
        raise RegistryError(
            f"Task {task.ref!r} does not fit backbone {backbone.name!r}: it reads {task.num_layer_features} layer "
            f"features, not {backbone.num_layer_features}. {RELEARN}"
        )
    if task.class_token is not None:
        backbone.check_tokens(f"Task {task.ref!r}")
    for parent in task.parents:
        if parent.class_token is None:
            raise RegistryError(
                f"Task {task.ref!r} extends {parent.ref!r}, which is head-only: it has no class token to attend to. "
                "Extend another task."
            )
    if task.memory is not None and (len(task.memory), task.memory.shape[2]) != (backbone.depth, backbone.embed_dim):
        raise RegistryError(
            f"Task {task.ref!r} does not fit backbone {backbone.name!r}: its memory is {list(task.memory.shape)}, not "
            f"of {backbone.depth} layers and {backbone.embed_dim} dimensions. {RELEARN}"
        )
    if not task.adapters:
        return
    reason = backbone.adapter_obstacle()
    if reason is not None:
        raise BackboneError(
            f"Task {task.ref!r} has adapters, which backbone {backbone.name!r} cannot carry: {reason}. {RELEARN}"
        )
    shapes = {site: (len(down), down.shape[-1], up.shape[1]) for site, (down, up) in task.adapters.items()}
    expected = {site: (backbone.depth, *ends) for site, ends in backbone.adapter_shapes().items()}
    if shapes != expected:
        raise RegistryError(
            f"Task {task.ref!r} does not fit backbone {backbone.name!r}: its adapters (layers, inputs, outputs) are "
            f"{shapes}, not {expected}. {RELEARN}"
        )
