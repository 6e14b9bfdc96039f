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
from addenda.learner.candidates import HEAD, Candidate, Tensors, as_fields, silenced
from addenda.learner.config import LearnConfig
from addenda.learner.context import Epoch, RunContext
from addenda.learner.objectives import Regression
from addenda.learner.probes import LinearHead, as_tensors, best_weight, choose, layer_probe, of_regression
from addenda.learner.training import Trainer
from addenda.registry import Task, digest

TRIED = 3
"""Tasks to extend that are tried by training, at most."""
LINEAR_PROBE, LAYER_PROBE = "linear probe", "layer probe"
"""What the baselines are called beside the task; no task can have these names."""

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
    """One learning run; `baselines` are the linear and the layer probe on the same images, as tasks."""

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
        heads = {LINEAR_PROBE: (of_regression(self._fitted), of_regression(self._last))}
        self._metrics: dict[str, Any] = {"linear_probe": {"strength": strength}}
        settled = objective.is_settled(activations.num_classes)
        if config.layer_head and activations.layers.shape[1] and not settled:
            heads[LAYER_PROBE] = self._layer_probe()
        self.baselines = []
        for name, (fitted, last) in heads.items():
            logits = fitted(pooled[self._validation], activations.layers[self._validation])
            temperature, scores = self._judge(logits)
            self._metrics[name.replace(" ", "_")]["validation"] = self._metrics["validation"] = scores
            task = Task(
                name=name, backbone=activations.backbone.fingerprint, labels=activations.labels,
                objective=objective.name, temperature=temperature, config=config.to_json(), **as_tensors(last),
            )  # fmt: skip
            self.baselines.append(task)
        self._head, self._head_logits = last, logits  # of the better probe: what a token must add something to
        self._head_losses = objective.losses(logits / temperature, self._truth)

    def task(self, parents: tuple[Task, ...], pool: Sequence[Task] | None = None) -> Task:
        """Learns the task, with what was measured on the validation part; TrainingError where all diverged.

        It extends `parents`, which the activations hold; or of a pool, where there is one, those that help.
        """
        probe, metrics = self.baselines[-1], dict(self._metrics)
        if self._config.head_only or self._objective.is_settled(self._activations.num_classes):
            return replace(probe, name=self._name, metrics=metrics)
        best = self._sweep(self._activations, parents)
        if pool is not None:
            best, metrics["extensions"] = self._extend(best, pool)
        metrics |= _record(best)
        if len(self.baselines) > 1:
            return self._fused(best, metrics)
        temperature = probe.temperature
        if best.chosen is None:
            settings, std = self._config.candidates[0], self._config.memory_std
            tensors = silenced(self._activations.backbone, self._last, settings, std)
        else:
            tensors = best.chosen.best.tensors
            temperature, metrics["validation"] = self._judge(best.trainer.logits(tensors, self._validation))
            if self._config.refit:
                tensors = self._refit(best.trainer, best.chosen)
        whole = replace(probe, name=self._name, parents=best.parents, temperature=temperature, metrics=metrics)
        return replace(whole, **as_fields(tensors))

    def _layer_probe(self) -> tuple[LinearHead, LinearHead]:
        """Fitted to the images to learn from, and to all: the recipe is chosen on the former."""
        objective, classes = self._objective, self._activations.num_classes
        pooled, layers, targets = self._activations.pooled, self._activations.layers, self._activations.targets
        some = pooled[self._train], layers[self._train], targets[self._train]
        recipe = choose(objective, *some, classes, self._config.first_seed)
        self._metrics["layer_probe"] = {"fit": recipe.fit, "weight": recipe.weight}
        fitted = layer_probe(recipe, objective, *some, classes)
        if not self._config.refit:
            return fitted, fitted
        return fitted, layer_probe(recipe, objective, pooled, layers, targets, classes)

    def _fused(self, best: Sweep, metrics: dict[str, Any]) -> Task:
        """The layer probe and the best token, each calibrated, their logits added where validation says that it pays.

        Where the token's weight is 0 the task has none.
        """
        probe, weight, tensors = self.baselines[-1], 0.0, dict[str, Tensor]()
        share = 1 / probe.temperature
        if best.chosen is not None:
            own = best.trainer.logits(best.chosen.best.tensors, self._validation).double()
            own_temperature, _ = self._judge(own)
            base = self._head_logits * share
            weight = best_weight(self._objective, base, own / own_temperature, self._truth)
        metrics["token_weight"] = weight
        if not weight:
            return replace(probe, name=self._name, metrics=metrics)
        tensors = self._refit(best.trainer, best.chosen) if self._config.refit else best.chosen.best.tensors
        logits = (1 - weight) * base + weight * own / own_temperature
        temperature, metrics["validation"] = self._judge(logits)
        of_probe = as_tensors(self._head * (share * (1 - weight)))
        scaled = {name: tensors[name] * (weight / own_temperature) for name in HEAD}
        scaled["pooled_weight"] = scaled["pooled_weight"] + of_probe.pop("head_weight")
        scaled["head_bias"] = scaled["head_bias"] + of_probe.pop("head_bias")
        whole = replace(probe, name=self._name, parents=best.parents, temperature=temperature, metrics=metrics)
        return replace(whole, **as_fields({**tensors, **scaled}), **of_probe)

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
        if config.fall_back and len(self.baselines) == 1 and chosen.best.loss >= self._head_losses.mean():
            return Sweep(parents, trainer, candidates, history, None, self._head_losses)
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
