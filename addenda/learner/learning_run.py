"""One learning run, from activations to a task: candidates are swept, validation chooses, all images refit."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

from addenda.exceptions import TrainingError
from addenda.learner.activations import Activations
from addenda.learner.candidates import HEAD, Candidate, Tensors, as_fields
from addenda.learner.context import Epoch, RunContext
from addenda.learner.learn_config import LearnConfig
from addenda.learner.objectives import LinearProbe
from addenda.learner.probes import (
    EIGHTHS,
    LinearHead,
    as_tensors,
    best_weight,
    choose,
    layer_probe,
    of_linear_probe,
    some_of,
)
from addenda.learner.trainer import Trainer
from addenda.registry import Task, digest

TOKEN_ERRORS = 2
"""By how many standard errors a token must pay: its weight is chosen by the very images that say so."""
TRIED = 3
"""Tasks to extend that are tried by training, at most."""
LINEAR_PROBE, LAYER_PROBE = "linear_probe", "layer_probe"
"""What the baselines are called in metrics; their tasks' names have a space instead, which no other's has."""

NEAR, FEW = 0.2, 0.05
"""Of the mean squared distance within a class, what near-duplicates are within; and the share of them that is told."""

log = logging.getLogger(__name__)


class Fusion(NamedTuple):
    """A token's logits added to the probe's, each calibrated, as validation weighs them."""

    weight: float  # of the token's; the probe's is the rest
    temperature: float  # of the token's own
    logits: Float64[Tensor, "V C"]  # of the sum, on the validation images
    losses: Float64[Tensor, " V"]


@dataclass(frozen=True)
class Sweep:
    """What came of training all candidates with one set of tasks to extend."""

    parents: tuple[Task, ...]
    trainer: Trainer
    candidates: list[Candidate]
    history: list[Epoch]
    chosen: Candidate
    fusion: Fusion


class LearningRun:
    """One learning run; `baselines` are the linear probe and, with a layer head, the layer probe, as tasks."""

    def __init__(self, name: str, activations: Activations, config: LearnConfig, context: RunContext) -> None:
        self._name, self._activations, self._config, self._context = name, activations, config, context
        self._objective = objective = activations.objective
        pooled, targets, groups = activations.pooled, activations.targets, activations.groups
        self._train, self._validation = objective.split(
            targets, activations.num_classes, config.validation_fraction, config.first_seed, groups
        )
        self._truth = targets[self._validation]
        layers = activations.layers
        read = layers[0] if layers.shape[2] else pooled
        self.near_duplicates = near_duplicates(read, objective.strata(targets), self._train, self._validation)
        strength = objective.choose_strength(pooled, targets, config.first_seed, groups)
        self._fitted = objective.fit_linear_probe(pooled[self._train], targets[self._train], strength)
        self._last = objective.fit_linear_probe(pooled, targets, strength) if config.refit else self._fitted
        heads = {LINEAR_PROBE: (of_linear_probe(self._fitted), of_linear_probe(self._last))}
        self._metrics: dict[str, Any] = {LINEAR_PROBE: {"strength": strength}}
        settled = objective.is_settled(activations.num_classes)
        if config.layer_head and layers.shape[2] and not settled:
            heads[LAYER_PROBE] = self._layer_probe(strength, *heads[LINEAR_PROBE])
        self.baselines = []
        for called, (fitted, last) in heads.items():
            logits = fitted(pooled[self._validation], layers[0, self._validation])
            temperature, scores = self._judge(logits)
            self._metrics[called]["validation"] = self._metrics["validation"] = scores
            task = Task(
                name=called.replace("_", " "), backbone=activations.backbone.fingerprint, labels=activations.labels,
                objective=objective.name, temperature=temperature, config=config.to_json(), **as_tensors(last),
            )  # fmt: skip
            self.baselines.append(task)
        self._probe = last * (1 / temperature)
        self._probe_logits = logits / temperature

    def remarks(self) -> list[str]:
        """What a person should know of how the images were held out."""
        said, count = [], len(self._validation)
        if self.near_duplicates > FEW * count:
            said.append(
                f"{self.near_duplicates} of {count} validation images have near-duplicates among the images learned "
                "from, as frames of one video and crops of one photo are: their score flatters. Say what belongs "
                "together with --group-by (in Python: group_by), or in a listing's column `group`."
            )
        missing = (self._objective.counts(self._truth, self._activations.num_classes) == 0).nonzero()[:, 0].tolist()
        if missing and self._activations.groups is not None:
            named = ", ".join(repr(self._activations.labels[label]) for label in missing[:3])
            said.append(
                f"No image of {named}{' and others' if len(missing) > 3 else ''} was held out, since all are of one "
                "group, or of groups that other classes need."
            )
        return said

    def task(self, parents: tuple[Task, ...], pool: Sequence[Task] | None = None) -> Task:
        """Learns the task, with what was measured on the validation part; TrainingError where all diverged.

        It extends `parents`, which the activations hold; or of a pool, where there is one, those that help. Where
        validation finds that a token does not pay beside the probe, the task has none, and extends nothing.
        """
        probe, metrics = replace(self.baselines[-1], name=self._name), dict(self._metrics)
        if self._config.head_only or self._objective.is_settled(self._activations.num_classes):
            return replace(probe, metrics=metrics)
        best = self._sweep(self._activations, parents)
        if pool is not None:
            best, metrics["extensions"] = self._extend(best, pool)
        metrics |= _record(best)
        weight, own_temperature, logits, _ = best.fusion
        if not weight:
            return replace(probe, metrics=metrics)
        tensors = dict(self._refit(best.trainer, best.chosen) if self._config.refit else best.chosen.best.tensors)
        temperature, metrics["validation"] = self._judge(logits)
        rest: dict[str, Any] = as_tensors(self._probe * (1 - weight)) if weight < 1 else {}
        for name in HEAD:
            tensors[name] = tensors[name] * (weight / own_temperature)
        if rest:
            tensors["pooled_weight"] = tensors["pooled_weight"] + rest.pop("head_weight")
            tensors["head_bias"] = tensors["head_bias"] + rest.pop("head_bias")
        without_layers = replace(probe, layer_weight=None, layer_down=None)
        whole = replace(without_layers, parents=best.parents, temperature=temperature, metrics=metrics)
        return replace(whole, **as_fields(tensors), **rest)

    def _layer_probe(self, strength: float, fitted: LinearHead, last: LinearHead) -> tuple[LinearHead, LinearHead]:
        """Of the images to learn from and of all, whose linear probes are given: the recipe is chosen on the former."""
        objective, classes, groups = self._objective, self._activations.num_classes, self._activations.groups
        pooled, layers, targets = self._activations.pooled, self._activations.layers, self._activations.targets
        some = layers[:, self._train], targets[self._train], classes
        of_train = None if groups is None else [groups[row] for row in self._train.tolist()]
        recipe = choose(objective, pooled[self._train], *some, strength, self._config.first_seed, of_train)
        self._metrics[LAYER_PROBE] = {"fit": recipe.fit, "weight": recipe.weight}
        found = layer_probe(recipe, objective, fitted, *some)
        if not self._config.refit:
            return found, found
        return found, layer_probe(recipe, objective, last, layers, targets, classes)

    def _fuse(self, trainer: Trainer, candidate: Candidate) -> Fusion:
        """What a candidate's token adds to the probe; without a layer head it stands for itself, or is left out."""
        objective, config = self._objective, self._config
        own = trainer.logits(candidate.best.tensors, self._validation).double()
        temperature, _ = self._judge(own)
        weights = [
            weight for weight in (EIGHTHS if config.layer_head else (0.0, 1.0)) if weight or not config.keeps_token
        ]
        weight = best_weight(objective, self._probe_logits, own / temperature, self._truth, weights)
        logits = (1 - weight) * self._probe_logits + weight * own / temperature
        losses, without = (objective.losses(found, self._truth) for found in (logits, self._probe_logits))
        if weight and not config.keeps_token and not pays(losses, without, TOKEN_ERRORS):
            return Fusion(0.0, temperature, self._probe_logits, without)
        return Fusion(weight, temperature, logits, losses)

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
        fusion = self._fuse(trainer, chosen)
        lean = [candidate for candidate in reached if not candidate.settings.adapter_rank]
        if config.adapter_rank == "auto" and chosen not in lean and lean:
            leanest = min(lean, key=lambda candidate: candidate.best.loss)
            without = self._fuse(trainer, leanest)
            if not pays(fusion.losses, without.losses):
                chosen, fusion = leanest, without
        return Sweep(parents, trainer, candidates, history, chosen, fusion)

    def _extend(self, best: Sweep, pool: Sequence[Task]) -> tuple[Sweep, list[dict[str, Any]]]:
        """Tries the most promising tasks of a pool one after another, and keeps those that pay; with what was tried."""
        tried = []
        for task in promising(self._activations, pool, self._fitted, self._train, self._validation):
            parents = (*best.parents, task)
            found = self._sweep(self._activations.seeing(parents, self._context.report), parents)
            taken = found.fusion.weight > 0 and pays(found.fusion.losses, best.fusion.losses)
            tried.append({"task": task.ref, "validation_loss": found.fusion.losses.mean().item(), "taken": taken})
            best = found if taken else best
        return best, tried

    def _refit(self, trainer: Trainer, chosen: Candidate) -> Tensors:
        """The winner, trained again on training and validation images together, as long as it was best for."""
        everything = torch.arange(len(self._activations), dtype=torch.int64, device="cpu")
        (refitted,), _ = trainer.run(
            self._last, [chosen.settings], everything, everything[:0], chosen.best.epoch, "refit"
        )
        return chosen.best.tensors if refitted.stopped else refitted.best.tensors


def near_duplicates(
    features: Float[Tensor, "N n"], classes: Int[Tensor, " N"], train: Int[Tensor, " T"], validation: Int[Tensor, " V"]
) -> int:
    """How many of the validation images have a near-duplicate among those to learn from.

    It is one where the squared distance of their standardised features is under NEAR of what it is on average between
    images of a class. In docs/results.md: unlike pictures, and slightly shifted, cropped or compressed ones.
    """
    rows = some_of(train)
    learned = features[rows]
    mean, scale = learned.mean(0), learned.std(0).clamp(min=torch.finfo(features.dtype).tiny)
    z, (there, place) = (learned - mean) / scale, classes[rows].unique(return_inverse=True)
    means = torch.stack([z[place == number].mean(0) for number in range(len(there))])
    expected = 2 * (z - means[place]).square().sum(1).mean()
    held_out = ((features[some] - mean) / scale for some in validation.split(256))
    nearest = torch.cat([torch.cdist(some, z).min(1).values for some in held_out])
    return int((nearest.square() < NEAR * expected).sum())


def pays(dear: Float[Tensor, " N"], cheap: Float[Tensor, " N"], errors: int = 1) -> bool:
    """Whether what costs more is better by more than so many standard errors of their losses' mean difference."""
    gain = cheap - dear
    return len(gain) > 1 and bool(gain.mean() > errors * gain.std() / math.sqrt(len(gain)))


def promising(
    activations: Activations,
    pool: Sequence[Task],
    linear_probe: LinearProbe,
    train: Int[Tensor, " N"],
    validation: Int[Tensor, " M"],
) -> list[Task]:
    """The tasks of a pool worth trying, the best first.

    A task is ranked by the validation loss of a logistic regression that reads its token's final feature beside the
    backbone's pooled one. Those that make it no better than the pooled feature alone, the `regression` of the training
    part, are left out; of equals the first by name comes first, in whatever order they were registered.
    """
    targets, pooled, objective = activations.targets, activations.pooled, activations.objective

    def reached(fitted: LinearProbe, features: Tensor) -> float:
        logits = F.linear(features[validation], fitted.weight, fitted.bias)
        return objective.loss(logits, targets[validation]).item()

    bar = reached(linear_probe, pooled)
    ranked = []
    for task, feature in zip(pool, activations.features(pool), strict=True):
        both = torch.cat([pooled, feature], dim=1)
        found = reached(objective.fit_linear_probe(both[train], targets[train], linear_probe.strength), both)
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
    picked = sweep.chosen.settings._asdict() | {"epoch": sweep.chosen.best.epoch} if sweep.fusion.weight else None
    return {"candidates": rows, "curves": curves, "chosen": picked, "token_weight": sweep.fusion.weight}


def _finite(values: Sequence[float]) -> list[float | None]:
    """A candidate that trains no more, or has diverged, has no loss."""
    return [value if math.isfinite(value) else None for value in values]
