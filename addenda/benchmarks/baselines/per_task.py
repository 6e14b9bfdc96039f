"""Baselines with a separate model, LoRA or linear probe per task; they have no task-incremental forgetting."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.method import BaselineSettings, Method, Rates, Scores
from addenda.benchmarks.baselines.paper_methods import (
    BaselineConfig,
    Rate,
    TrainedBaseline,
    baseline_logits,
    best_baseline,
    train_baselines,
)
from addenda.benchmarks.continual.stream import Experience
from addenda.learner import Augmentation
from addenda.learner.data import LabelledImages, check_learnable
from addenda.learner.objectives import LinearProbe


class PerTask(Method):
    """A method that predicts with the task's own model; without a task label, with the most confident task's.

    A task's predictions never change, so they are computed once per experience.
    """

    def __post_init__(self) -> None:
        self._tasks: list[Any] = []
        self._predictions: dict[str, list[Tensor]] = {}  # by experience: log-probabilities of each task so far

    def _learn(self, number: int) -> None:
        experience = self.stream.experiences[number]
        images = experience.relabelled(experience.train)
        check_learnable(images)
        self._tasks.append(self._fit(images))

    def scores(self, experience: Experience) -> Scores:
        """Score the test images of an experience, learned or not, by log-probabilities within each task."""
        predictions = self._predictions.setdefault(experience.name, [])
        if len(predictions) < len(self._tasks):
            logits = self._logits(self._tasks[len(predictions) :], experience.test)
            predictions += [F.log_softmax(task_logits, dim=1) for task_logits in logits]
        task_incremental, class_incremental = self.no_scores(experience.test), self.no_scores(experience.test)
        for learned, log_probabilities in zip(self.stream.experiences, predictions, strict=False):
            columns = list(learned.classes)
            class_incremental[:, columns] = class_incremental[:, columns].maximum(log_probabilities)
            if learned.name == experience.name:
                task_incremental[:, columns] = log_probabilities
        return Scores(task_incremental, class_incremental)

    @abstractmethod
    def _fit(self, images: LabelledImages) -> Any:
        """Train the model of one experience; targets are indices into the experience's classes."""

    @abstractmethod
    def _logits(self, tasks: Sequence[Any], images: LabelledImages) -> list[Float[Tensor, "N c"]]:
        """Each task's logits for its own classes, on the CPU."""


class TrainedPerTask(PerTask):
    """A fully fine-tuned model (`"full"`) or a LoRA per task, trained as by `addenda bench paper`."""

    _tasks: list[TrainedBaseline]

    def _fit(self, images: LabelledImages) -> TrainedBaseline:
        rates = self.settings.full_rates if self.name == "full" else self.settings.lora_rates
        return train(self.name, self.backbone, images, self.settings, rates, self.seed)

    def _logits(self, tasks: Sequence[TrainedBaseline], images: LabelledImages) -> list[Float[Tensor, "N c"]]:
        pixels = images.read_all(self.backbone)
        return [baseline_logits(self.backbone, task, pixels, self.settings.autocast) for task in tasks]

    def _stored_bytes(self) -> float:
        return sum(tensor.nbytes for task in self._tasks for tensor in task.tensors.values())

    def _relative_inference(self) -> float:
        """One forward pass per task: without a task label, an image runs through every model."""
        return float(len(self._tasks))


def train(
    name: str, backbone: FrozenBackbone, images: LabelledImages, settings: BaselineSettings, rates: Rates, seed: int
) -> TrainedBaseline:
    """A model of the images, trained with AdamW at the rate that validation selects."""
    config = BaselineConfig(
        epochs=settings.epochs, batch_size=settings.batch_size, warmup_steps=settings.warmup_steps,
        clip_norm=settings.clip_norm, rates=tuple(Rate("adamw", rate) for rate in rates),
        weight_decay=settings.weight_decay,
        augmentation=Augmentation(views=settings.views if images.can_vary else 0), autocast=settings.autocast,
        seed=seed,
    )  # fmt: skip
    return best_baseline(train_baselines(name, backbone, images, config=config))


class LinearProbePerTask(PerTask):
    """A logistic regression on the frozen pooled feature per task; all share one forward pass."""

    _tasks: list[LinearProbe]

    def _fit(self, images: LabelledImages) -> LinearProbe:
        features, objective = self.pooled(images), images.objective
        strength = objective.choose_strength(features, images.targets, self.seed)
        return objective.fit_linear_probe(features, images.targets, strength)

    def _logits(self, tasks: Sequence[LinearProbe], images: LabelledImages) -> list[Float[Tensor, "N c"]]:
        return [F.linear(self.pooled(images), task.weight, task.bias) for task in tasks]

    def _stored_bytes(self) -> float:
        return sum(task.weight.nbytes + task.bias.nbytes for task in self._tasks)

    def _relative_inference(self) -> float:
        return self.pooled_inference()
