"""The combined model: one frozen pass, and every task's answer from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, read_files, uncompiled
from addenda.combined.forward import backbone_logits, forward_pass
from addenda.combined.heads import Head
from addenda.combined.numerics import arithmetic, touch
from addenda.combined.predictions import Prediction, predictions_of
from addenda.combined.routing import Choice, Router
from addenda.combined.selftest import prove
from addenda.combined.shapes import TILE, Shapes, micro_batch
from addenda.combined.tiles import Layout, TileStore
from addenda.exceptions import BackboneError, ExactnessError, RegistryError, UnknownTaskError
from addenda.registry import Task


class TaskLogits(dict[str, Tensor]):
    """Logits Float[B, C] of each task by name.

    Attributes:
        exact: whether the bits are those that each task has in any company and batch.
        pooled: the backbone's own pooled feature of each image, Float[B, D], where it was asked for.
    """

    def __init__(self, logits: dict[str, Tensor], exact: bool, pooled: Tensor | None = None) -> None:
        super().__init__(logits)
        self.exact = exact
        self.pooled = pooled


class CombinedModel:
    """Answers every task from one pass over an image; a task's bits depend on no other task that it does not extend.

    Images run in batches of proven shapes, filled up with zeros; task tokens in tiles of fixed size; heads one by one.
    docs/exactness.md says why. Before it computes anything, a self-test proves the shapes on this machine.

    Args:
        backbone: the frozen backbone.
        tasks: the tasks to answer, each learned on this backbone. Those that they extend are computed too.
        exact: False fills up neither tiles nor batches and tests nothing: a little faster for few tasks or images, and
            bits may depend on the company.

    Raises:
        BackboneError: a task was learned on another backbone.
        ExactnessError: this machine's arithmetic does not keep the promise.
        RegistryError: two different tasks of one name.

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
        self._settings = arithmetic(backbone), touch()
        self._load(tasks)

    def with_tasks(self, tasks: Sequence[Task]) -> CombinedModel:
        """A model of other tasks that shares with this one what both need; only what is new is computed and moved.

        Args:
            tasks: all that the new model answers.

        Raises:
            BackboneError, ExactnessError, RegistryError: as for a model made anew.
        """
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        made._load(tasks)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """A deep copy, or one from a pickle, is made anew of what it answers for."""
        return CombinedModel, (self.backbone, list(self.tasks.values()), self.exact)

    @property
    def heads(self) -> list[Head]:
        """Its tasks' heads, in their order."""
        return [self._heads[task.sha256] for task in self.tasks.values()]

    @uncompiled
    def _load(self, tasks: Sequence[Task]) -> None:
        self.tasks: dict[str, Task] = {}
        for task in tasks:
            for member in (*task.closure, task):
                _check_fits(member, self.backbone)
            if self.tasks.setdefault(task.name, task).sha256 != task.sha256:
                raise RegistryError(
                    f"Two different tasks are named {task.name!r}; a combined model answers one of them."
                )
        now = arithmetic(self.backbone), touch()
        if now != self._settings:  # other settings, other bits
            self._settings, self._store, self._heads = now, TileStore(self.backbone), {}
        self._heads = {
            task.sha256: self._heads.get(task.sha256) or Head(self.backbone, task) for task in self.tasks.values()
        }
        self.shapes = Shapes((self.micro_batch,), (TILE,))
        if self.exact and tasks:
            self.shapes = prove(self.backbone, tasks)
        slots = self.shapes.slots if self.exact else None
        self.layout = whole = Layout(self._store, list(self.tasks.values()), slots)
        # Without a reference to this model, which would keep what lies on the device until a garbage collection.
        self._some = lru_cache(maxsize=8)(lambda *tasks: Layout(whole, tasks, slots))

    def _select(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        unknown = [name for name in tasks or () if name not in self.tasks]
        if unknown:
            known = ", ".join(map(repr, islice(self.tasks, 10))) or "none"
            more = f" and {len(self.tasks) - 10} more" if len(self.tasks) > 10 else ""
            raise UnknownTaskError(f"Task {unknown[0]!r} is not in this model. Known: {known}{more}.")
        return tuple(self.tasks) if tasks is None else tuple(dict.fromkeys(tasks))

    @uncompiled
    def __call__(self, images: Tensor, tasks: Sequence[str] | None = None, pooled: bool = False) -> TaskLogits:
        """Logits of every task, or of some, in float32 on the backbone's device.

        Args:
            images: Float[B, 3, H, W], of the backbone's input size, normalised, as `backbone.transform` gives them.
            tasks: names of the tasks to answer; None answers all.
            pooled: whether the backbone's own feature is wanted too, for a `Router`.

        Returns:
            Float[B, C] for each task, by name; its `exact` says whether the promise holds.

        Raises:
            BackboneError: images of another shape.
            ExactnessError: a setting that moves bits has been changed since the model was made; it is named.
            IntegrityError: a module or weight of the backbone is no longer what was loaded.
            UnknownTaskError: a name that this model does not hold.
        """
        self.backbone.check_images(images)
        if self.exact:
            self._check_settings()
        names = self._select(tasks)
        if not names and not pooled:
            return TaskLogits({}, self.exact)
        asked = [self.tasks[name] for name in names]
        layout = self.layout if len(asked) == len(self.tasks) else self._some(*asked)
        heads = {task.sha256: self._heads[task.sha256] for task in asked}
        sizes = self.shapes.images if self.exact else None
        answers, feature, _ = forward_pass(self.backbone, images, layout, heads, sizes, pooled)
        logits = {task.name: answers[task.sha256] for task in asked}
        return TaskLogits(logits, self.exact, None if feature is None else feature.float())

    def _check_settings(self) -> None:
        self.backbone.check_as_loaded()
        (before, bits), now = self._settings, arithmetic(self.backbone)
        if now == before and touch() == bits:
            return
        pairs = {name: (before.get(name, "the default"), now.get(name, "the default")) for name in before | now}
        named = ", ".join(f"{name} was {was}, now {is_}" for name, (was, is_) in pairs.items() if was != is_)
        changed = named or "one that has no name here: some of torch's own operations give other bits than then"
        raise ExactnessError(
            f"A setting that moves bits has changed since this model was made: {changed}. Set it back, or make the "
            "model anew (model.with_tasks)."
        )

    @uncompiled
    def backbone_logits(self, images: Tensor) -> Float[Tensor, "B C"]:
        """Stock timm's own logits of images Float[B, 3, H, W], computed in the canonical micro-batch."""
        return backbone_logits(self.backbone, images)

    def predict(
        self, paths: Sequence[str | Path], top: int | None = None, tasks: Sequence[str] | None = None
    ) -> dict[str, list[Prediction]]:
        """Reads image files and answers every task.

        Args:
            paths: image files.
            top: at most so many labels for each image, best first. None gives 3 of a single-label task, and of a
                multi-label one every label of probability 0.5 and more.
            tasks: names of the tasks to answer; None answers all.

        Returns:
            For each task and each path, (label, probability) pairs.

        Raises:
            DataError: a file that is not a readable image.
        """
        answers: dict[str, list[Prediction]] = {name: [] for name in self._select(tasks)}
        for files in read_files(self.backbone, paths, self.micro_batch):
            for name, labels in self.predict_images(files.images, top, tasks).items():
                answers[name] += labels
        return answers

    def predict_images(
        self, images: Float[Tensor, "B 3 H W"], top: int | None = None, tasks: Sequence[str] | None = None
    ) -> dict[str, list[Prediction]]:
        """Answers every task about images as `backbone.transform` gives them; see `predict`."""
        found = self(images, tasks)
        return predictions_of(map(self.tasks.__getitem__, found), found, top)

    def route(
        self, paths: Sequence[str | Path], router: Router, top: int | None = None
    ) -> list[tuple[Choice, Prediction]]:
        """Reads image files, lets a router choose a task for each, and gives that task's answer.

        Args:
            paths: image files.
            router: knows tasks of this model.
            top: at most so many labels for each image; None gives 3.

        Returns:
            For each path the choice, and (label, probability) pairs within the chosen task.

        Raises:
            DataError: a file that is not a readable image.
            UnknownTaskError: a task that this model does not hold.
        """
        batches = read_files(self.backbone, paths, self.micro_batch)
        return [routed for files in batches for routed in self.route_images(files.images, router, top)]

    def route_images(
        self, images: Float[Tensor, "B 3 H W"], router: Router, top: int | None = None
    ) -> list[tuple[Choice, Prediction]]:
        """Lets a router choose a task for each of some images as `backbone.transform` gives them; see `route`."""
        answers = self(images, router.tasks, pooled=True)
        assert answers.pooled is not None
        labels = predictions_of(map(self.tasks.__getitem__, answers), answers, top)
        return [(choice, labels[choice.task][i]) for i, choice in enumerate(router.choose(answers.pooled))]


def _check_fits(task: Task, backbone: FrozenBackbone) -> None:
    """Raises an error that names the task unless it can run on this backbone."""
    if task.backbone != backbone.fingerprint:
        raise BackboneError(
            f"Task {task.ref!r} was learned on the backbone with fingerprint {task.backbone[:12]}…; "
            f"{backbone.name!r} as loaded has {backbone.fingerprint[:12]}…. Weights, input size and preprocessing must "
            "be the same."
        )
    if task.head_weight.shape[1] != backbone.embed_dim:
        raise RegistryError(
            f"Task {task.ref!r} reads features of {task.head_weight.shape[1]} dimensions; backbone {backbone.name!r} "
            f"has {backbone.embed_dim}."
        )
    if task.num_layer_features not in (0, backbone.num_layer_features):
        raise RegistryError(
            f"Task {task.ref!r} reads {task.num_layer_features} layer features; backbone {backbone.name!r} has "
            f"{backbone.num_layer_features}."
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
    if not task.adapters:
        return
    why = backbone.adapter_obstacle()
    if why is not None:
        raise BackboneError(f"Task {task.ref!r} has adapters, which backbone {backbone.name!r} cannot carry: {why}.")
    found = {site: (len(down), down.shape[-1], up.shape[1]) for site, (down, up) in task.adapters.items()}
    expected = {site: (backbone.depth, *ends) for site, ends in backbone.adapter_shapes().items()}
    if found != expected:
        raise RegistryError(
            f"Task {task.ref!r} has adapters of (layers, inputs, outputs) {found}; backbone {backbone.name!r} takes "
            f"{expected}."
        )
