"""Trains candidates side by side on the same batches, each bit for bit as if trained alone."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import TypeAdapter
from torch import Tensor

from addenda.backbones import Adapter, BlockAdapters, FrozenBackbone, KeyValue
from addenda.combined import TileStore
from addenda.learner.activations import Activations, extended_tasks
from addenda.learner.candidates import HEAD_WEIGHTS, Candidate, Tensors, adapter_name, first_tensors
from addenda.learner.context import QUIET, Epoch, RunContext
from addenda.learner.learn_config import LearnConfig, Settings
from addenda.learner.objectives import LinearProbe
from addenda.learner.token_stream import Batch, stream_features
from addenda.registry import Task
from addenda.text import estimate

EVALUATION_BATCH = 64

ENOUGH_TO_CHOOSE_AN_EPOCH = 200
"""Minimum number of validation images for early stopping; with fewer, the last epoch is better than the one with the
lowest validation loss (decision 0008)."""
MIN_TRIAL_EPOCHS = 5
"""A sweep may be given up after a third of its epochs, but not before this many."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Trainer:
    """Trains candidates that extend `parents`, whose tokens the activations hold.

    Candidates with the same tensor shapes share a forward pass.
    """

    def __init__(
        self, activations: Activations, parents: Sequence[Task], config: LearnConfig, context: RunContext = QUIET
    ) -> None:
        self._activations, self._config, self._context = activations, config, context
        self._backbone, self._objective = activations.backbone, activations.objective
        self._parent_memory = parent_memory(self._backbone, parents)
        refs = ", ".join(parent.ref for parent in parents)
        self._description = f"training (extends {refs})" if parents else "training"
        self._targets = activations.targets.to(self._backbone.device)
        self._class_weights = self._objective.class_weights(
            config.class_weights, self._targets, activations.num_classes
        )
        self._together: dict[object, bool] = {}  # whether sharing a forward pass preserves the bits, by shapes

    def run(
        self,
        linear_probe: LinearProbe,
        sweep: Sequence[Settings],
        train: Int[Tensor, " N"],
        validation: Int[Tensor, " M"],
        stop_after: int,
        phase: str,
        hopeless: Callable[[Sequence[Candidate]], bool] | None = None,
    ) -> tuple[list[Candidate], list[Epoch]]:
        """Trains a candidate for each of the settings, starting from a linear probe.

        Args:
            linear_probe: gives the initial head and the strength of its L2 penalty.
            sweep: the candidates' settings.
            train: rows of the training images.
            validation: rows of the validation images; empty in the refit.
            stop_after: last epoch to train; the learning rate schedule spans the config's `epochs` nevertheless.
            phase: `"sweep"` or `"refit"`.
            hopeless: whether no candidate can pay any more; asked once, after a third of the epochs.

        Returns:
            The candidates, and the results of all epochs.
        """
        config, device = self._config, self._backbone.device
        steps_per_epoch = math.ceil(len(train) / config.batch_size)
        candidates = []
        for settings in sweep:
            first = first_tensors(self._backbone, linear_probe, settings, config.memory_std)
            candidates.append(Candidate(settings, first, config, steps_per_epoch * config.epochs, device))
        # Twice the linear probe's penalty: a weight split in halves over two features has half the squared norm. Of two
        # exclusive classes it is once: scikit-learn penalises their margin, which has twice the norm of the two rows.
        penalty = 1 / (linear_probe.strength * len(train))
        history, trial_epochs = self._resume(phase, candidates), max(MIN_TRIAL_EPOCHS, config.epochs // 3)
        total_steps, first_step, clock = stop_after * steps_per_epoch, len(history) * steps_per_epoch + 1, 0.0
        for epoch in range(len(history) + 1, stop_after + 1):
            if hopeless and epoch == trial_epochs + 1 and hopeless([c for c in candidates if c.best.epoch]):
                log.info("Training ends after %d of %d epochs: no token is likely to pay.", epoch - 1, stop_after)
                for candidate in candidates:
                    candidate.stopped = candidate.stopped or "hopeless"
            live = [candidate for candidate in candidates if candidate.stopped is None]
            if not live:
                break
            totals = {candidate: torch.zeros((), device=device, dtype=torch.float32) for candidate in live}
            order, views = self._order(train, epoch)
            batches = zip(order.split(config.batch_size), views.split(config.batch_size), strict=True)
            for step, (rows, batch_views) in enumerate(batches, (epoch - 1) * steps_per_epoch + 1):
                batch, targets = self._activations.batch(rows, batch_views), self._targets[rows.to(device)]
                for group in _by_shape(live):
                    results = self._gradients(group, batch, targets, penalty)
                    for candidate, (mean, *gradients) in zip(group, results, strict=True):
                        candidate.step(gradients)
                        totals[candidate] += mean * len(rows)
                self._context.report(f"{self._description}, {_progress(history)}", step, total_steps)
                if step == first_step + 1:  # the first step also tests whether candidates can share a forward pass
                    seconds = time.monotonic() - clock
                    if ahead := estimate(f"steps of the {phase}", total_steps - first_step, 1, seconds):
                        log.info("%s", ahead)
                clock = time.monotonic()
            losses = {candidate: (total / len(train)).item() for candidate, total in totals.items()}
            scores = self._validate(epoch, losses, validation)
            train_loss, validation_loss, accuracy = (
                tuple(values.get(candidate, math.nan) for candidate in candidates if values)
                for values in (losses, *scores)
            )
            result = Epoch(phase, epoch, stop_after, train_loss, validation_loss, accuracy, tuple(sweep))
            history.append(result)
            self._save_checkpoint(phase, candidates, history)
            self._context.on_epoch(result)
        return candidates, history

    def _save_checkpoint(self, phase: str, candidates: Sequence[Candidate], history: Sequence[Epoch]) -> None:
        """Saves the candidates' state and the history, without the settings, which the run's configuration holds."""
        if self._context.checkpoint is None:
            return
        states = [candidate.state() for candidate in candidates]
        tensors = {f"{i}.{name}": tensor for i, (state, _) in enumerate(states) for name, tensor in state.items()}
        epochs = [asdict(epoch) | {"candidates": None} for epoch in history]
        values = {"candidates": [candidate_values for _, candidate_values in states], "history": epochs}
        self._context.checkpoint.save(phase, tensors, values)

    def _resume(self, phase: str, candidates: Sequence[Candidate]) -> list[Epoch]:
        """Restores the candidates from the checkpoint of an interrupted run; returns the epochs it had completed."""
        checkpoint = None if self._context.checkpoint is None else self._context.checkpoint.load(phase)
        if checkpoint is None:
            return []
        tensors, values = checkpoint
        for i, (candidate, candidate_values) in enumerate(zip(candidates, values["candidates"], strict=True)):
            state = {key.removeprefix(f"{i}."): value for key, value in tensors.items() if key.startswith(f"{i}.")}
            candidate.restore(state, candidate_values)
        settings, adapter = tuple(candidate.settings for candidate in candidates), TypeAdapter(Epoch)
        return [adapter.validate_python(row | {"candidates": settings}) for row in values["history"]]

    def losses(self, logits: Float[Tensor, "N C"], targets: Tensor) -> Float[Tensor, " N"]:
        """Returns the losses by which candidates are compared: after temperature scaling if `calibrate` is set.

        It is fitted to the same images, so that overconfidence does not count.
        """
        calibrate = self._config.calibrate and bool(logits.isfinite().all())
        temperature = self._objective.fit_temperature(logits, targets, prior=0.0) if calibrate else 1.0
        return self._objective.losses(logits / temperature, targets)

    @torch.no_grad()
    def logits(self, tensors: Tensors, rows: Int[Tensor, " N"]) -> Float[Tensor, "N C"]:
        """Computes a candidate's logits of unaugmented images."""
        on_device = {name: tensor.to(self._backbone.device) for name, tensor in tensors.items()}
        return self._evaluate([on_device], rows)[0]

    def _order(self, train: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Shuffles the training images for an epoch and draws a view of each."""
        random = torch.Generator().manual_seed(self._config.first_seed * 1_000_003 + epoch)
        order = train[torch.randperm(len(train), generator=random, dtype=torch.int64, device="cpu")]
        num_views = self._config.augmentation.num_views
        if self._config.augmentation.fresh:
            return order, torch.full_like(order, num_views + epoch)
        return order, torch.randint(1 + num_views, (len(order),), generator=random, dtype=torch.int64, device="cpu")

    def _gradients(
        self, group: Sequence[Candidate], batch: Batch, targets: Tensor, penalty: float
    ) -> list[list[Tensor]]:
        """Returns each candidate's loss, followed by the gradients of its tensors."""
        smoothing, class_weights = self._config.label_smoothing, self._class_weights

        def compute(candidates: Sequence[Candidate]) -> list[list[Tensor]]:
            logits = self._logits([candidate.tensors for candidate in candidates], batch)
            losses = torch.stack([self._objective.loss(rows, targets, smoothing, class_weights) for rows in logits])
            squares = [torch.stack([c.tensors[name].square().sum() for name in HEAD_WEIGHTS]).sum() for c in candidates]
            parameters = [tensor for candidate in candidates for tensor in candidate.tensors.values()]
            gradients = torch.autograd.grad((losses + penalty * torch.stack(squares)).sum(), parameters)
            count = len(gradients) // len(candidates)  # tensors of each candidate
            return [[mean, *gradients[i * count : (i + 1) * count]] for i, mean in enumerate(losses.detach())]

        return self._side_by_side(("gradients", group[0].shape, len(group), len(batch)), group, compute)

    def _side_by_side(
        self, key: object, group: Sequence[T], compute: Callable[[Sequence[T]], list[list[Tensor]]]
    ) -> list[list[Tensor]]:
        """Computes candidates in one forward pass if a trial gave each the bits it has alone, otherwise one by one.

        The bits of a matrix product may depend on its shape but not on its values, so one trial is valid for all groups
        with the same key.
        """
        if len(group) == 1 or self._together.get(key, False):
            return compute(group)
        alone = [compute([candidate])[0] for candidate in group]
        if key not in self._together:
            pairs = zip(alone, compute(group), strict=True)
            self._together[key] = all(all(map(torch.equal, separate, joint)) for separate, joint in pairs)
        return alone

    def _logits(self, group: Sequence[Mapping[str, Tensor]], batch: Batch) -> Float[Tensor, "S B C"]:
        """Computes logits of candidates that have the same shapes."""

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
        """Computes logits of unaugmented images for candidates that have the same shapes."""
        batches = []
        for batch_rows in rows.split(EVALUATION_BATCH):
            batch = self._activations.batch(batch_rows)

            def compute(candidates: Sequence[Mapping[str, Tensor]], batch: Batch = batch) -> list[list[Tensor]]:
                return [[logits] for logits in self._logits(candidates, batch)]

            key = ("logits", *(tensor.shape for tensor in group[0].values()), len(group), len(batch_rows))
            batches.append(torch.stack([logits for (logits,) in self._side_by_side(key, group, compute)]).cpu())
        return torch.cat(batches, dim=1)

    def _validate(
        self, epoch: int, train_losses: Mapping[Candidate, float], validation: Tensor
    ) -> tuple[dict[Candidate, float], dict[Candidate, float]]:
        """Evaluates the remaining candidates on the validation split and applies early stopping.

        Returns:
            Their losses and their accuracies; both empty without validation images.
        """
        targets = self._activations.targets[validation]
        patience = self._config.patience if len(validation) >= ENOUGH_TO_CHOOSE_AN_EPOCH else None
        losses, accuracies = dict[Candidate, float](), dict[Candidate, float]()
        for group in _by_shape(train_losses) if len(validation) else ():
            logits = self._evaluate([candidate.tensors for candidate in group], validation)
            for candidate, candidate_logits in zip(group, logits, strict=True):
                losses[candidate] = self.losses(candidate_logits, targets).mean().item()
                accuracies[candidate] = self._objective.accuracy(candidate_logits, targets)
        for candidate, train_loss in train_losses.items():
            candidate.end_epoch(epoch, train_loss, losses.get(candidate), patience)
        return losses, accuracies


def parent_memory(backbone: FrozenBackbone, parents: Sequence[Task]) -> list[KeyValue]:
    """Returns for each layer the memory keys and values of the parents and all that they extend, [1, H, m, d]."""
    store = TileStore(backbone)
    layers = zip(*(store.memory(task) for task in extended_tasks(parents) if task.num_memory_tokens), strict=True)
    return [KeyValue(*(torch.cat(parts, dim=1).unsqueeze(0) for parts in zip(*layer, strict=True))) for layer in layers]


def _by_shape(candidates: Iterable[Candidate]) -> list[list[Candidate]]:
    """Groups candidates that can share a forward pass, in order."""
    groups: dict[object, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.shape, []).append(candidate)
    return list(groups.values())


def _progress(history: Sequence[Epoch]) -> str:
    if not history:
        return ""
    last = history[-1]
    accuracies = [accuracy for accuracy in last.validation_accuracy if math.isfinite(accuracy)]
    accuracy = f", validation accuracy {100 * max(accuracies):.1f} %" if accuracies else ""
    return f"loss {min(last.train_loss, key=lambda v: math.inf if math.isnan(v) else v):.3f}{accuracy}"
