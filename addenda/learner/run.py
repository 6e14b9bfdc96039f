"""One learning run, from activations to a task: candidates are swept, validation chooses, all images refit."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from addenda.exceptions import TrainingError
from addenda.learner.activations import Activations
from addenda.learner.candidates import Candidate, Tensors, as_fields, silenced
from addenda.learner.config import LearnConfig
from addenda.learner.context import Epoch, RunContext
from addenda.learner.objectives import Regression
from addenda.learner.training import Trainer
from addenda.registry import Task, digest

TRIED = 3
"""Tasks to extend that are tried by training, at most."""
RIVAL = "logistic regression"
"""What the rival is called beside the task; no task can have this name."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """What came of training all candidates with one set of tasks to extend."""

    parents: tuple[Task, ...]
    trainer: Trainer
    candidates: list[Candidate]
    history: list[Epoch]
    chosen: Candidate | None  # the best by validation; None where the regression is better
    losses: Float[Tensor, " V"]  # of the best on each validation image; the regression's where that is better


class Run:
    """One learning run; `rival` is the logistic regression on the same images, as a task."""

    def __init__(self, name: str, activations: Activations, config: LearnConfig, context: RunContext) -> None:
        self._name, self._activations, self._config, self._context = name, activations, config, context
        self._objective = objective = activations.objective
        pooled, targets = activations.pooled, activations.targets
        self._train, self._validation = objective.split(
            targets, activations.num_classes, config.validation_fraction, config.first_seed
        )
        self._truth = targets[self._validation]
        strength = objective.choose_strength(pooled, targets, config.first_seed)
        self._fitted = objective.fit_regression(pooled[self._train], targets[self._train], strength)
        self._last = objective.fit_regression(pooled, targets, strength) if config.refit else self._fitted
        logits = F.linear(pooled[self._validation], self._fitted.weight, self._fitted.bias)
        temperature, scores = self._judge(logits)
        self._rival_losses = objective.losses(logits / temperature, self._truth)
        self.rival = Task(
            name=RIVAL,
            backbone=activations.backbone.fingerprint,
            labels=activations.labels,
            objective=objective.name,
            temperature=temperature,
            config=config.to_json(),
            metrics={"regression": {"strength": strength, "validation": scores}, "validation": scores},
            head_weight=self._last.weight,
            head_bias=self._last.bias,
        )

    def task(self, parents: tuple[Task, ...], pool: Sequence[Task] | None = None) -> Task:
        """Learns the task, with what was measured on the validation part; TrainingError where all diverged.

        It extends `parents`, which the activations hold; or of a pool, where there is one, those that help.
        """
        if self._config.head_only or self._objective.is_settled(self._activations.num_classes):
            return replace(self.rival, name=self._name)
        metrics = dict(self.rival.metrics)
        best = self._sweep(self._activations, parents)
        if pool is not None:
            best, metrics["extensions"] = self._extend(best, pool)
        metrics |= _record(best)
        temperature = self.rival.temperature
        if best.chosen is None:
            settings, std = self._config.candidates[0], self._config.memory_std
            tensors = silenced(self._activations.backbone, self._last, settings, std)
        else:
            tensors = best.chosen.best.tensors
            temperature, metrics["validation"] = self._judge(best.trainer.logits(tensors, self._validation))
            if self._config.refit:
                tensors = self._refit(best.trainer, best.chosen)
        whole = replace(self.rival, name=self._name, parents=best.parents, temperature=temperature, metrics=metrics)
        return replace(whole, **as_fields(tensors))

    def _judge(self, logits: Tensor) -> tuple[float, dict[str, Any]]:
        """The temperature that validation logits ask for, and their scores under it."""
        temperature = self._objective.fit_temperature(logits, self._truth) if self._config.calibrate else 1.0
        return temperature, self._objective.score(logits / temperature, self._truth, self._activations.labels)

    def _sweep(self, activations: Activations, parents: tuple[Task, ...]) -> Sweep:
        """Trains all candidates on the training part, with some tasks to extend, and lets validation choose."""
        config, checkpoint = self._config, self._context.checkpoint
        if checkpoint is not None:
            checkpoint = checkpoint.within(digest(" ".join(parent.sha256 for parent in parents).encode())[:16])
        trainer = Trainer(activations, parents, config, replace(self._context, checkpoint=checkpoint))
        candidates, history = trainer.run(
            self._fitted, config.candidates, self._train, self._validation, config.epochs, "sweep"
        )
        for candidate in candidates:
            if candidate.stopped == "diverged":
                log.warning("A candidate's loss became infinite or NaN and it is dropped: %s.", candidate.settings)
        reached = [candidate for candidate in candidates if candidate.best.epoch]
        if not reached:
            raise TrainingError("Every candidate's loss became infinite or NaN. Try smaller learning rates.")
        chosen = min(reached, key=lambda candidate: candidate.best.loss)
        losses = trainer.losses(chosen.best.tensors, self._validation)
        lean = [candidate for candidate in reached if not candidate.settings.adapter_rank]
        if config.adapter_rank == "auto" and chosen not in lean and lean:
            leanest = min(lean, key=lambda candidate: candidate.best.loss)
            without = trainer.losses(leanest.best.tensors, self._validation)
            if not pays(losses, without):
                chosen, losses = leanest, without
        if config.fall_back and chosen.best.loss >= self._rival_losses.mean().item():
            return Sweep(parents, trainer, candidates, history, None, self._rival_losses)
        return Sweep(parents, trainer, candidates, history, chosen, losses)

    def _extend(self, best: Sweep, pool: Sequence[Task]) -> tuple[Sweep, list[dict[str, Any]]]:
        """Tries the most promising tasks of a pool one after another, and keeps those that pay; with what was tried."""
        tried = []
        for task in promising(self._activations, pool, self._fitted, self._train, self._validation):
            parents = (*best.parents, task)
            found = self._sweep(self._activations.seeing(parents, self._context.report), parents)
            taken = found.chosen is not None and pays(found.losses, best.losses)
            tried.append({"task": task.ref, "validation_loss": found.losses.mean().item(), "taken": taken})
            best = found if taken else best
        return best, tried

    def _refit(self, trainer: Trainer, chosen: Candidate) -> Tensors:
        """The winner, trained again on training and validation images together, as long as it was best for."""
        everything = torch.arange(len(self._activations), dtype=torch.int64, device="cpu")
        (refitted,), _ = trainer.run(
            self._last, [chosen.settings], everything, everything[:0], chosen.best.epoch, "refit"
        )
        return chosen.best.tensors if refitted.stopped else refitted.best.tensors


def pays(dear: Float[Tensor, " N"], cheap: Float[Tensor, " N"]) -> bool:
    """Whether what costs more is better by more than a standard error: of the mean difference between their losses."""
    gain = cheap - dear
    return len(gain) > 1 and bool(gain.mean() > gain.std() / math.sqrt(len(gain)))


def promising(
    activations: Activations,
    pool: Sequence[Task],
    regression: Regression,
    train: Int[Tensor, " N"],
    validation: Int[Tensor, " M"],
) -> list[Task]:
    """The tasks of a pool worth trying, the best first.

    A task is ranked by the validation loss of a logistic regression that reads its token's final feature beside the
    backbone's pooled one. Those that make it no better than the pooled feature alone, the `regression` of the training
    part, are left out; of equals the first by name comes first, in whatever order they were registered.
    """
    targets, pooled, objective = activations.targets, activations.pooled, activations.objective

    def reached(fitted: Regression, features: Tensor) -> float:
        logits = F.linear(features[validation], fitted.weight, fitted.bias)
        return objective.loss(logits, targets[validation]).item()

    bar = reached(regression, pooled)
    ranked = []
    for task, feature in zip(pool, activations.features(pool), strict=True):
        both = torch.cat([pooled, feature], dim=1)
        found = reached(objective.fit_regression(both[train], targets[train], regression.strength), both)
        if found < bar:
            ranked.append((found, task.name, task))
    return [task for *_, task in sorted(ranked)[:TRIED]]


def _record(sweep: Sweep) -> dict[str, Any]:
    """What the task's record keeps of a sweep: each candidate at its best epoch, all losses, and what was chosen."""
    rows = []
    for i, candidate in enumerate(sweep.candidates):
        best, reached = candidate.best, bool(candidate.best.epoch)
        found = {
            "epoch": best.epoch,
            "validation_loss": best.loss if reached else None,
            "validation_accuracy": sweep.history[best.epoch - 1].validation_accuracy[i] if reached else None,
            "stopped": candidate.stopped,
        }
        rows.append(candidate.settings._asdict() | found)
    curves = [
        {"train_loss": _finite(epoch.train_loss), "validation_loss": _finite(epoch.validation_loss)}
        for epoch in sweep.history
    ]
    chosen = sweep.chosen
    picked = None if chosen is None else chosen.settings._asdict() | {"epoch": chosen.best.epoch}
    return {"candidates": rows, "curves": curves, "chosen": picked}


def _finite(values: Sequence[float]) -> list[float | None]:
    """A candidate that trains no more, or has diverged, has no loss."""
    return [value if math.isfinite(value) else None for value in values]
