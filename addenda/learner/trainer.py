"""Training candidates on the same activations in the same order, side by side, each as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import TypeAdapter
from torch import Tensor

from addenda.backbones import Adapter, BlockAdapters, FrozenBackbone, KeyValue
from addenda.combined import TileStore
from addenda.learner.activations import Activations, family
from addenda.learner.candidates import HEAD_WEIGHTS, Candidate, Tensors, adapter_name, first_tensors
from addenda.learner.context import QUIET, Epoch, RunContext
from addenda.learner.learn_config import LearnConfig, Settings
from addenda.learner.objectives import LinearProbe
from addenda.learner.token_stream import Batch, stream_features
from addenda.registry import Task

EVALUATION_BATCH = 64

ENOUGH_TO_CHOOSE_AN_EPOCH = 200
"""Validation images; by fewer, the epoch that looks best is worse than the last (docs/results.md)."""

T = TypeVar("T")


class Trainer:
    """Trains candidates that extend `parents`, whose tokens the activations hold; those of one shape in one pass."""

    def __init__(
        self, activations: Activations, parents: Sequence[Task], config: LearnConfig, context: RunContext = QUIET
    ) -> None:
        self._activations, self._config, self._context = activations, config, context
        self._backbone, self._objective = activations.backbone, activations.objective
        self._parent_memory = parent_memory(self._backbone, parents)
        self._what = f"training beside {', '.join(parent.ref for parent in parents)}" if parents else "training"
        self._targets = activations.targets.to(self._backbone.device)
        self._class_weights = None
        if config.class_weights == "balanced":
            self._class_weights = self._objective.balanced_weights(self._targets, activations.num_classes)
        self._together: dict[object, bool] = {}

    def run(
        self,
        linear_probe: LinearProbe,
        sweep: Sequence[Settings],
        train: Int[Tensor, " N"],
        validation: Int[Tensor, " M"],
        stop_after: int,
        phase: str,
    ) -> tuple[list[Candidate], list[Epoch]]:
        """Trains candidates from a regression, whose penalty goes on as theirs; gives them, and every epoch.

        The schedule spans the config's `epochs`, of which the last here is `stop_after`. In the refit there are no
        images to validate on.
        """
        config, device = self._config, self._backbone.device
        steps_per_epoch = math.ceil(len(train) / config.batch_size)
        candidates = []
        for settings in sweep:
            first = first_tensors(self._backbone, linear_probe, settings, config.memory_std)
            candidates.append(Candidate(settings, first, config, steps_per_epoch * config.epochs, device))
        # The regression's own penalty, twice: a function shared in halves by two like features weighs half as much.
        penalty = 1 / (linear_probe.strength * len(train))
        history = self._resume(phase, candidates)
        for epoch in range(len(history) + 1, stop_after + 1):
            live = [candidate for candidate in candidates if candidate.stopped is None]
            if not live:
                break
            totals = {id(candidate): torch.zeros((), device=device, dtype=torch.float32) for candidate in live}
            order, views = self._order(train, epoch)
            batches = zip(order.split(config.batch_size), views.split(config.batch_size), strict=True)
            for step, (rows, chosen) in enumerate(batches, (epoch - 1) * steps_per_epoch + 1):
                batch, targets = self._activations.batch(rows, chosen), self._targets[rows.to(device)]
                for group in _by_shape(live):
                    found = self._gradients(group, batch, targets, penalty)
                    for candidate, (mean, *gradients) in zip(group, found, strict=True):
                        candidate.step(gradients)
                        totals[id(candidate)] += mean * len(rows)
                self._context.report(f"{self._what}, {_standing(history)}", step, stop_after * steps_per_epoch)
            losses = tuple((totals[id(c)] / len(train)).item() if c in live else math.nan for c in candidates)
            scores = self._judge(epoch, losses, candidates, validation)
            swept = tuple(candidate.settings for candidate in candidates)
            history.append(Epoch(phase, epoch, stop_after, losses, *scores, swept))
            self._note(phase, candidates, history)
            self._context.on_epoch(history[-1])
        return candidates, history

    def _note(self, phase: str, candidates: Sequence[Candidate], history: Sequence[Epoch]) -> None:
        """Saves where the candidates stand; what they are trained with, a run says itself."""
        if self._context.checkpoint is None:
            return
        states = [candidate.state() for candidate in candidates]
        tensors = {f"{i}.{name}": tensor for i, (own, _) in enumerate(states) for name, tensor in own.items()}
        epochs = [asdict(epoch) | {"candidates": None} for epoch in history]
        standing = {"candidates": [plain for _, plain in states], "history": epochs}
        self._context.checkpoint.save(phase, tensors, standing)

    def _resume(self, phase: str, candidates: Sequence[Candidate]) -> list[Epoch]:
        """Takes up an earlier run of the same content where it was interrupted; the epochs that it had done."""
        found = None if self._context.checkpoint is None else self._context.checkpoint.load(phase)
        if found is None:
            return []
        tensors, standing = found
        for i, (candidate, plain) in enumerate(zip(candidates, standing["candidates"], strict=True)):
            own = {key.removeprefix(f"{i}."): value for key, value in tensors.items() if key.startswith(f"{i}.")}
            candidate.restore(own, plain)
        swept = tuple(candidate.settings for candidate in candidates)
        read = TypeAdapter(Epoch)
        return [read.validate_python(row | {"candidates": swept}) for row in standing["history"]]

    @torch.no_grad()
    def losses(self, tensors: Tensors, rows: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The loss on each of some images, as candidates are compared by it."""
        return self._calibrated(self.logits(tensors, rows), self._activations.targets[rows])

    def _calibrated(self, logits: Float[Tensor, "N C"], targets: Tensor) -> Float[Tensor, " N"]:
        """The losses under the temperature that these images ask for: too sure can be mended, wrong cannot."""
        calibrate = self._config.calibrate and bool(logits.isfinite().all())
        temperature = self._objective.fit_temperature(logits, targets) if calibrate else 1.0
        return self._objective.losses(logits / temperature, targets)

    @torch.no_grad()
    def logits(self, tensors: Tensors, rows: Int[Tensor, " N"]) -> Float[Tensor, "N C"]:
        """Logits of some images, as they are, under one set of tensors."""
        moved = {name: tensor.to(self._backbone.device) for name, tensor in tensors.items()}
        return self._evaluate([moved], rows)[0]

    def _order(self, train: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The images of an epoch, shuffled, and which view of each."""
        random = torch.Generator().manual_seed(self._config.first_seed * 1_000_003 + epoch)
        order = train[torch.randperm(len(train), generator=random, dtype=torch.int64, device="cpu")]
        how = self._config.augmentation
        if how.fresh:
            return order, torch.full_like(order, how.num_views + epoch)
        return order, torch.randint(1 + how.num_views, (len(order),), generator=random, dtype=torch.int64, device="cpu")

    def _gradients(
        self, group: Sequence[Candidate], batch: Batch, targets: Tensor, penalty: float
    ) -> list[list[Tensor]]:
        """For each candidate its loss, then the gradient of each of its tensors."""
        smoothing, class_weights = self._config.label_smoothing, self._class_weights

        def compute(some: Sequence[Candidate]) -> list[list[Tensor]]:
            logits = self._logits([candidate.tensors for candidate in some], batch)
            losses = torch.stack([self._objective.loss(part, targets, smoothing, class_weights) for part in logits])
            weights = [torch.stack([c.tensors[name].square().sum() for name in HEAD_WEIGHTS]).sum() for c in some]
            parameters = [tensor for candidate in some for tensor in candidate.tensors.values()]
            gradients = torch.autograd.grad((losses + penalty * torch.stack(weights)).sum(), parameters)
            each = len(gradients) // len(some)
            return [[mean, *gradients[i * each : (i + 1) * each]] for i, mean in enumerate(losses.detach())]

        return self._side_by_side(("gradients", group[0].shape, len(group), len(batch)), group, compute)

    def _side_by_side(
        self, key: object, group: Sequence[T], compute: Callable[[Sequence[T]], list[list[Tensor]]]
    ) -> list[list[Tensor]]:
        """Computes candidates in one pass where that was seen to give each the bits that it has alone, else one by one.

        A product's bits may depend on how many rows it has, and never on what they hold: so one trial stands for all
        that have its key.
        """
        if len(group) == 1 or self._together.get(key, False):
            return compute(group)
        alone = [compute([candidate])[0] for candidate in group]
        if key not in self._together:
            pairs = zip(alone, compute(group), strict=True)
            self._together[key] = all(all(map(torch.equal, found, tried)) for found, tried in pairs)
        return alone

    def _logits(self, group: Sequence[Mapping[str, Tensor]], batch: Batch) -> Float[Tensor, "S B C"]:
        """Logits of candidates of one shape."""

        def stacked(name: str) -> Tensor:
            return torch.stack([tensors[name] for tensors in group])

        adapters: list[BlockAdapters] = []
        if adapter_name("q", "down") in group[0]:
            precision = self._backbone.precision
            sites = [
                [stacked(adapter_name(site, part)).to(precision).unbind(1) for part in Adapter._fields]
                for site in BlockAdapters._fields
            ]
            adapters = [
                BlockAdapters(*(Adapter(down[layer], up[layer]) for down, up in sites))
                for layer in range(self._backbone.depth)
            ]
        tokens, memory = stacked("class_token"), stacked("memory")
        features = stream_features(self._backbone, batch, tokens, memory, self._parent_memory, adapters)
        heads = torch.cat([stacked("head_weight"), stacked("pooled_weight")], dim=2)
        inputs = torch.cat([features, batch.pooled.expand_as(features)], dim=2)
        return torch.baddbmm(stacked("head_bias").unsqueeze(1), inputs, heads.mT)

    @torch.no_grad()
    def _evaluate(self, group: Sequence[Mapping[str, Tensor]], rows: Tensor) -> Float[Tensor, "S N C"]:
        """Logits of images as they are, under candidates of one shape."""
        parts = []
        for part in rows.split(EVALUATION_BATCH):
            batch = self._activations.batch(part)

            def compute(some: Sequence[Mapping[str, Tensor]], batch: Batch = batch) -> list[list[Tensor]]:
                return [[logits] for logits in self._logits(some, batch)]

            key = ("logits", *(tensor.shape for tensor in group[0].values()), len(group), len(part))
            parts.append(torch.stack([logits for (logits,) in self._side_by_side(key, group, compute)]).cpu())
        return torch.cat(parts, dim=1)

    def _judge(
        self, epoch: int, train_losses: Sequence[float], candidates: Sequence[Candidate], validation: Tensor
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scores the candidates that are left on the validation part, and lets each draw its conclusion."""
        live = [candidate for candidate in candidates if candidate.stopped is None]
        targets = self._activations.targets[validation]
        patience = self._config.patience if len(validation) >= ENOUGH_TO_CHOOSE_AN_EPOCH else None
        scores: dict[int, tuple[float, float]] = {}
        for group in _by_shape(live) if len(validation) else ():
            logits = self._evaluate([candidate.tensors for candidate in group], validation)
            for candidate, found in zip(group, logits, strict=True):
                mean = self._calibrated(found, targets).mean().item()
                scores[id(candidate)] = mean, self._objective.accuracy(found, targets)
        for candidate, train_loss in zip(candidates, train_losses, strict=True):
            if candidate in live:
                reached = scores[id(candidate)][0] if scores else None
                candidate.judge(epoch, train_loss, reached, patience)
        shown = [scores.get(id(candidate), (math.nan, math.nan)) for candidate in candidates] if scores else []
        return tuple(loss for loss, _ in shown), tuple(accuracy for _, accuracy in shown)


def parent_memory(backbone: FrozenBackbone, parents: Sequence[Task]) -> list[KeyValue]:
    """For each layer the memory keys and values of all that a task would see, [1, H, m, d]."""
    store = TileStore(backbone)
    layers = zip(*(store.memory(task) for task in family(parents) if task.num_memory_tokens), strict=True)
    return [KeyValue(*(torch.cat(parts, dim=1).unsqueeze(0) for parts in zip(*layer, strict=True))) for layer in layers]


def _by_shape(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates that can share a pass, in their order."""
    groups: dict[object, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.shape, []).append(candidate)
    return list(groups.values())


def _standing(history: Sequence[Epoch]) -> str:
    if not history:
        return ""
    last = history[-1]
    reached = [accuracy for accuracy in last.validation_accuracy if math.isfinite(accuracy)]
    shown = f", validation {100 * max(reached):.1f} %" if reached else ""
    return f"loss {min(last.train_loss, key=lambda v: math.inf if math.isnan(v) else v):.3f}{shown}"
