"""One learning run, from activations to a task: probes, sweep, selection on the validation split, refit."""

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
from addenda.learner.objectives import LinearProbe, Weights
from addenda.learner.probes import (
    EIGHTHS,
    LayerFeatures,
    LinearHead,
    as_tensors,
    best_weight,
    from_linear_probe,
    subsample,
)
from addenda.learner.trainer import Trainer
from addenda.registry import Task, digest

TOKEN_ERRORS = 2
"""Standard errors by which a token must lower the loss; two, since the same images also chose its weight."""
TRIAL_ERRORS = 1
"""Standard errors by which a token must lower the loss after a third of the epochs for training to go on."""
MAX_TRIED_PARENTS = 3
"""Maximum number of tasks that `extends="auto"` tries by training."""
LINEAR_PROBE, LAYER_PROBE = "linear_probe", "layer_probe"
"""Names of the probes in metrics. Their tasks' names have a space instead, which no registered task's name has."""

NEAR_DUPLICATE_DISTANCE = 0.2
"""Squared distance below which two images are near-duplicates, relative to the mean within a class."""
SEARCH_ROWS = 1024
"""Number of training and of validation images that are compared at once, which bounds the memory."""
MAX_NEAR_DUPLICATES = 0.05
"""Share of near-duplicates among the validation images above which a warning is logged."""

log = logging.getLogger(__name__)


class Fusion(NamedTuple):
    """The weighted sum of a token's and the probe's logits after temperature scaling, on the validation split."""

    weight: float  # of the token's logits; the probe's have 1 - weight
    temperature: float  # of the token's logits
    logits: Float64[Tensor, "V C"]  # the weighted sum
    losses: Float64[Tensor, " V"]


class Probe(NamedTuple):
    """A calibrated probe, as a task, as a head, and by the logits that it has when fitted to the training split."""

    task: Task
    head: LinearHead  # divided by the temperature of highest likelihood, as everything that is compared
    logits: Float64[Tensor, "V C"]  # on the validation split, divided likewise
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """Result of training all candidates with one choice of tasks to extend."""

    parents: tuple[Task, ...]
    trainer: Trainer
    candidates: list[Candidate]
    history: list[Epoch]
    chosen: Candidate
    fusion: Fusion


class LearningRun:
    """One learning run; `baselines` holds the linear probe and, with a layer head, the layer probe as tasks."""

    def __init__(self, name: str, activations: Activations, config: LearnConfig, context: RunContext) -> None:
        self._name, self._activations, self._config, self._context = name, activations, config, context
        self._objective = objective = activations.objective
        pooled, targets, groups = activations.pooled, activations.targets, activations.groups
        self._train, self._validation = objective.split(
            targets, activations.num_classes, config.validation_fraction, config.first_seed, groups
        )
        self._validation_targets = targets[self._validation]
        layers = activations.layers
        features = layers[0] if layers.shape[2] else pooled
        self.near_duplicates = near_duplicates(features, objective.strata(targets), self._train, self._validation)
        self._class_weights = objective.class_weights(config.class_weights, targets, activations.num_classes)
        strength = objective.choose_strength(pooled, targets, config.first_seed, groups, self._class_weights)
        self._train_probe = self._fit_linear_probe(self._train, strength)
        self._final_probe = self._fit_linear_probe(slice(None), strength) if config.refit else self._train_probe
        heads = from_linear_probe(self._train_probe), from_linear_probe(self._final_probe)
        probes = {LINEAR_PROBE: self._calibrated(LINEAR_PROBE, *heads, {"strength": strength})}
        if config.layer_head and layers.shape[2] and not objective.is_settled(activations.num_classes):
            probes[LAYER_PROBE] = self._layer_probe(*heads, strength)
        self.baselines = [probe.task for probe in probes.values()]
        self._probe = list(probes.values())[-1]
        self._metrics: dict[str, Any] = {name: probe.metrics for name, probe in probes.items()}
        self._metrics["validation"] = self._probe.metrics["validation"]

    def _fit_linear_probe(self, rows: Tensor | slice, strength: float) -> LinearProbe:
        pooled, targets = self._activations.pooled[rows], self._activations.targets[rows]
        num_classes = self._activations.num_classes
        return self._objective.fit_linear_probe(pooled, targets, strength, num_classes, self._class_weights)

    def _layer_probe(self, train_linear: LinearHead, final_linear: LinearHead, strength: float) -> Probe:
        """Fits the layer probe, which adds to the linear probe; cross-validation on the training split chooses how."""
        activations, train = self._activations, self._train

        def features(rows: Tensor | slice) -> LayerFeatures:
            layers, targets = activations.layers[:, rows], activations.targets[rows]
            return LayerFeatures(self._objective, layers, targets, activations.num_classes, self._class_weights)

        groups = None if activations.groups is None else [activations.groups[row] for row in train.tolist()]
        if groups and len(set(groups)) == 1:  # cross-validation within the only group left for training
            groups = None
        of_train = features(train)
        recipe = of_train.choose_recipe(activations.pooled[train], strength, self._config.first_seed, groups)
        train_head = final_head = of_train.probe(recipe, train_linear)
        if self._config.refit:
            final_head = features(slice(None)).probe(recipe, final_linear)
        return self._calibrated(LAYER_PROBE, train_head, final_head, {"fit": recipe.fit, "weight": recipe.weight})

    def _calibrated(self, name: str, train_head: LinearHead, head: LinearHead, metrics: dict[str, Any]) -> Probe:
        """Makes a probe of a head and of the one fitted to the training split, whose temperature it gets."""
        activations, rows = self._activations, self._validation
        logits = train_head(activations.pooled[rows], activations.layers[0, rows])
        temperature, scores = self._calibrate(logits)
        task = Task(
            name=name.replace("_", " "), backbone=activations.backbone.fingerprint, labels=activations.labels,
            objective=self._objective.name, temperature=temperature, config=self._config.to_json(), **as_tensors(head),
        )  # fmt: skip
        likeliest = self._likeliest_temperature(logits)
        return Probe(task, head * (1 / likeliest), logits / likeliest, {**metrics, "validation": scores})

    def log_warnings(self) -> None:
        """Warns the user about the validation split."""
        count = len(self._validation)
        if self.near_duplicates > MAX_NEAR_DUPLICATES * count:
            log.warning(
                "Near-duplicates of %d of %d validation images are among the training images, such as frames of one "
                "video or crops of one photo, which inflates the validation score. Name the groups with --group-by "
                "(in Python: group_by) or in a listing's column `group`.", self.near_duplicates, count,
            )  # fmt: skip
        counts = self._objective.counts(self._validation_targets, self._activations.num_classes)
        missing = (counts == 0).nonzero()[:, 0].tolist()
        if missing:
            classes = ", ".join(repr(self._activations.labels[label]) for label in missing[:3])
            reasons = "; ".join(sorted(set(map(self._why_not_validated, missing))))
            more = " and others" if len(missing) > 3 else ""
            log.warning("The validation split has no image of %s%s: %s.", classes, more, reasons)

    def _why_not_validated(self, label: int) -> str:
        rows = self._objective.has_label(self._activations.targets, label).nonzero()[:, 0].tolist()
        if len(rows) == 1:
            return "a class has a single image"
        groups = self._activations.groups
        if groups is not None and len({groups[row] for row in rows}) == 1:
            return "all images of a class are in one group"
        return "training needs all images of a class because of other classes"

    def task(self, parents: tuple[Task, ...], pool: Sequence[Task] | None = None) -> Task:
        """Learns the task.

        It extends `parents`, whose tokens the activations hold, or those tasks of `pool` that pay (see `pays`). If a
        token does not pay, the task is the probe: it has no token and extends nothing.

        Raises:
            TrainingError: every candidate diverged.
        """
        probe, metrics = replace(self._probe.task, name=self._name), dict(self._metrics)
        if self._config.head_only or self._objective.is_settled(self._activations.num_classes):
            return replace(probe, metrics=metrics)
        best = self._sweep(self._activations, parents)
        if pool is not None:
            best, metrics["extensions"] = self._extend(best, pool)
        metrics |= _sweep_metrics(best)
        weight, token_temperature, logits, _ = best.fusion
        if not weight:
            return replace(probe, metrics=metrics)
        tensors = self._refit(best.trainer, best.chosen) if self._config.refit else best.chosen.best.tensors
        tensors = fused(tensors, weight / token_temperature, self._probe.head * (1 - weight) if weight < 1 else None)
        temperature, metrics["validation"] = self._calibrate(logits)
        without_layers = replace(probe, layer_weight=None, layer_down=None)
        task = replace(without_layers, parents=best.parents, temperature=temperature, metrics=metrics)
        return replace(task, **as_fields(tensors))

    def _fuse(self, trainer: Trainer, candidate: Candidate, num_errors: int = TOKEN_ERRORS) -> Fusion:
        """Chooses the weight of a candidate's token beside the probe; without a layer head it is 0 or 1."""
        objective, config, targets = self._objective, self._config, self._validation_targets
        token_logits = trainer.logits(candidate.best.tensors, self._validation).double()
        temperature = self._likeliest_temperature(token_logits)
        weights = [
            weight for weight in (EIGHTHS if config.layer_head else (0.0, 1.0)) if weight or not config.keeps_token
        ]
        weight = best_weight(objective, self._probe.logits, token_logits / temperature, targets, weights)
        logits = (1 - weight) * self._probe.logits + weight * token_logits / temperature
        losses = objective.losses(logits, targets)
        probe_losses = objective.losses(self._probe.logits, targets)
        if weight and not config.keeps_token and not pays(losses, probe_losses, num_errors):
            return Fusion(0.0, temperature, self._probe.logits, probe_losses)
        return Fusion(weight, temperature, logits, losses)

    def _likeliest_temperature(self, logits: Tensor) -> float:
        """The temperature of probes and tokens that are compared: without a prior, so that no scale is preferred."""
        targets = self._validation_targets
        return self._objective.fit_temperature(logits, targets, prior=0.0) if self._config.calibrate else 1.0

    def _calibrate(self, logits: Tensor) -> tuple[float, dict[str, Any]]:
        """Fits a temperature to validation logits; returns it and the metrics after temperature scaling."""
        targets = self._validation_targets
        temperature = self._objective.fit_temperature(logits, targets) if self._config.calibrate else 1.0
        return temperature, self._objective.score(logits / temperature, targets, self._activations.labels)

    def _sweep(self, activations: Activations, parents: tuple[Task, ...]) -> Sweep:
        """Trains all candidates on the training split and selects one on the validation split."""
        config, checkpoint = self._config, self._context.checkpoint
        if checkpoint is not None:
            checkpoint = checkpoint.within(digest(" ".join(parent.sha256 for parent in parents).encode())[:16])
        trainer = Trainer(activations, parents, config, replace(self._context, checkpoint=checkpoint))

        def hopeless(candidates: Sequence[Candidate]) -> bool:
            return not any(self._fuse(trainer, candidate, TRIAL_ERRORS).weight for candidate in candidates)

        has_layer_probe = len(self.baselines) > 1
        candidates, history = trainer.run(
            self._train_probe, config.candidates, self._train, self._validation, config.epochs, "sweep",
            hopeless if has_layer_probe else None,
        )  # fmt: skip
        for candidate in candidates:
            if candidate.stopped == "diverged":
                log.warning("Dropped a candidate whose loss became infinite or NaN: %s.", candidate.settings)
        finite = [candidate for candidate in candidates if candidate.best.epoch]
        if not finite:
            raise TrainingError("Every candidate's loss became infinite or NaN. Try smaller learning rates.")
        chosen = min(finite, key=lambda candidate: candidate.best.loss)
        fusion = self._fuse(trainer, chosen)
        plain = [candidate for candidate in finite if not candidate.settings.adapter_rank]
        if config.adapter_rank == "auto" and chosen not in plain and plain:
            best_plain = min(plain, key=lambda candidate: candidate.best.loss)
            plain_fusion = self._fuse(trainer, best_plain)
            if not pays(fusion.losses, plain_fusion.losses):
                chosen, fusion = best_plain, plain_fusion
        return Sweep(parents, trainer, candidates, history, chosen, fusion)

    def _extend(self, best: Sweep, pool: Sequence[Task]) -> tuple[Sweep, list[dict[str, Any]]]:
        """Tries to extend the most promising tasks one by one, and keeps those that pay; also returns what it tried."""
        tried = []
        rows = self._train, self._validation
        for task in promising(self._activations, pool, self._train_probe, *rows, self._class_weights):
            parents = (*best.parents, task)
            sweep = self._sweep(self._activations.with_parents(parents, self._context.report), parents)
            taken = sweep.fusion.weight > 0 and pays(sweep.fusion.losses, best.fusion.losses)
            tried.append({"task": task.ref, "validation_loss": sweep.fusion.losses.mean().item(), "taken": taken})
            best = sweep if taken else best
        return best, tried

    def _refit(self, trainer: Trainer, chosen: Candidate) -> Tensors:
        """Trains the chosen candidate on all images for its best number of epochs."""
        all_rows = torch.arange(len(self._activations), dtype=torch.int64, device="cpu")
        (refitted,), _ = trainer.run(
            self._final_probe, [chosen.settings], all_rows, all_rows[:0], chosen.best.epoch, "refit"
        )
        return chosen.best.tensors if refitted.stopped else refitted.best.tensors


def fused(tensors: Tensors, factor: float, probe: LinearHead | None) -> Tensors:
    """Returns the tensors of a task whose logits are a token's times `factor`, plus a probe's if there is one."""
    both = tensors | {name: tensors[name] * factor for name in HEAD}
    if probe is None:
        return both
    of_probe = as_tensors(probe)
    # The pooled feature is a probe's only one, so its head weight; beside a token it has a weight of its own.
    both["pooled_weight"] = both["pooled_weight"] + of_probe.pop("head_weight")
    both["head_bias"] = both["head_bias"] + of_probe.pop("head_bias")
    return both | of_probe


def near_duplicates(
    features: Float[Tensor, "N n"], classes: Int[Tensor, " N"], train: Int[Tensor, " T"], validation: Int[Tensor, " V"]
) -> int:
    """Counts the validation images that have a near-duplicate among the training images.

    Near-duplicates are closer, in squared distance of standardised features, than NEAR_DUPLICATE_DISTANCE times the
    mean between images of one class, or between all images if no class has two. docs/results.md has the distances of
    different pictures and of slightly shifted, cropped or compressed copies.

    Only the scale is that of a subsample of the training images; all of them are searched. Of N images a fifth of which
    validates, this takes N / 50,000 % of the multiply-adds of four frozen passes with a ViT-Ti, and a third of that
    with a ViT-B.
    """
    rows = subsample(train)
    if len(rows) < 2:
        return 0
    mean, deviation = features[rows].double().mean(0), features[rows].double().std(0)
    constant = deviation <= torch.finfo(features.dtype).tiny
    shift, scale = mean.to(features.dtype), (1 / deviation).masked_fill(constant, 0).to(features.dtype)

    def standardised(chosen: Tensor) -> Tensor:
        return (features[chosen] - shift) * scale

    z, (_, index, counts) = standardised(rows), classes[rows].unique(return_inverse=True, return_counts=True)
    if counts.max() < 2:
        index, counts = torch.zeros_like(index), counts.sum(0, keepdim=True)
    several = counts[index] > 1
    means = torch.stack([z[index == number].mean(0) for number in range(len(counts))])
    unbiased = counts / (counts - 1).clamp(min=1)
    expected = 2 * ((z - means[index]).square().sum(1) * unbiased[index])[several].mean()
    num_near = 0
    for batch in map(standardised, validation.split(SEARCH_ROWS)):
        chunks = map(standardised, train.split(SEARCH_ROWS))
        nearest = torch.stack([torch.cdist(batch, chunk).min(1).values for chunk in chunks]).min(0).values
        num_near += int((nearest.square() < NEAR_DUPLICATE_DISTANCE * expected).sum())
    return num_near


def pays(costly: Float[Tensor, " N"], cheap: Float[Tensor, " N"], num_errors: int = 1) -> bool:
    """Whether the costly option's losses are lower by more than `num_errors` standard errors of the mean difference."""
    gain = cheap - costly
    return len(gain) > 1 and bool(gain.mean() > num_errors * gain.std() / math.sqrt(len(gain)))


def promising(
    activations: Activations,
    pool: Sequence[Task],
    linear_probe: LinearProbe,
    train: Int[Tensor, " N"],
    validation: Int[Tensor, " M"],
    class_weights: Weights = None,
) -> list[Task]:
    """Returns the most promising tasks to extend, best first.

    A task is ranked by the validation loss of a linear probe on its token's final feature concatenated with the pooled
    feature. Tasks that do not beat `linear_probe`, which reads the pooled feature alone, are left out. Ties are broken
    by name, so the order of registration has no influence.
    """
    targets, pooled, objective = activations.targets, activations.pooled, activations.objective

    def validation_loss(probe: LinearProbe, features: Tensor) -> float:
        logits = F.linear(features[validation], probe.weight, probe.bias)
        return objective.loss(logits, targets[validation]).item()

    baseline_loss = validation_loss(linear_probe, pooled)
    ranked = []
    for task, feature in zip(pool, activations.features(pool), strict=True):
        both = torch.cat([pooled, feature], dim=1)
        fit = objective.fit_linear_probe
        probe = fit(both[train], targets[train], linear_probe.strength, len(linear_probe.weight), class_weights)
        loss = validation_loss(probe, both)
        if loss < baseline_loss:
            ranked.append((loss, task.name, task))
    return [task for *_, task in sorted(ranked)[:MAX_TRIED_PARENTS]]


def _sweep_metrics(sweep: Sweep) -> dict[str, Any]:
    """Returns what is registered of a sweep: every candidate at its best epoch, the loss curves, and the choice."""
    rows = []
    for i, candidate in enumerate(sweep.candidates):
        best, finite = candidate.best, bool(candidate.best.epoch)
        result = {
            "epoch": best.epoch,
            "validation_loss": best.loss if finite else None,
            "validation_accuracy": sweep.history[best.epoch - 1].validation_accuracy[i] if finite else None,
            "stopped": candidate.stopped,
        }
        rows.append(candidate.settings._asdict() | result)
    curves = [
        {"train_loss": _finite(epoch.train_loss), "validation_loss": _finite(epoch.validation_loss)}
        for epoch in sweep.history
    ]
    chosen = sweep.chosen.settings._asdict() | {"epoch": sweep.chosen.best.epoch} if sweep.fusion.weight else None
    return {"candidates": rows, "curves": curves, "chosen": chosen, "token_weight": sweep.fusion.weight}


def _finite(values: Sequence[float]) -> list[float | None]:
    """Replaces the losses of candidates that have stopped or diverged by None."""
    return [value if math.isfinite(value) else None for value in values]
