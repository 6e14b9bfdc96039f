"""Methods that keep a thing of its own for each task, and so forget nothing once told which: model, LoRA or probe."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.benchmarks.baselines.method import Baseline, Scores
from addenda.benchmarks.baselines.paper_methods import (
    BaselineConfig,
    Rate,
    TrainedBaseline,
    baseline_logits,
    train_baseline,
)
from addenda.benchmarks.continual.stream import Experience
from addenda.learner import Augmentation
from addenda.learner.data import LabelledImages, check_learnable
from addenda.learner.objectives import LinearProbe


class PerTask(Baseline):
    """A method that answers, told the task, by what it keeps for that task; else the most confident task answers.

    What a task answers for an image never changes, so each is asked once for the images of an experience.
    """

    def __post_init__(self) -> None:
        self._tasks: list[Any] = []
        self._predictions: dict[str, list[Tensor]] = {}  # by experience, of every task that was asked

    def _learn(self, number: int) -> None:
        experience = self.stream.experiences[number]
        images = experience.own(experience.train)
        check_learnable(images)
        self._tasks.append(self._fit(images))

    def scores(self, experience: Experience) -> Scores:
        """Scores the test images of an experience, learned yet or not: log-probabilities within each task."""
        answers = self._predictions.setdefault(experience.name, [])
        if len(answers) < len(self._tasks):
            logits = self._logits(self._tasks[len(answers) :], experience.test)
            answers += [F.log_softmax(found, dim=1) for found in logits]
        task_incremental, class_incremental = self.nothing(experience.test), self.nothing(experience.test)
        for one, found in zip(self.stream.experiences, answers, strict=False):
            columns = list(one.classes)
            class_incremental[:, columns] = class_incremental[:, columns].maximum(found)
            if one.name == experience.name:
                task_incremental[:, columns] = found
        return Scores(task_incremental, class_incremental)

    @abstractmethod
    def _fit(self, images: LabelledImages) -> Any:
        """What is kept of one experience, learned from its images among its own classes."""

    @abstractmethod
    def _logits(self, tasks: Sequence[Any], images: LabelledImages) -> list[Float[Tensor, "N c"]]:
        """Each task's logits of its own classes, on the CPU."""


class TrainedPerTask(PerTask):
    """One fully fine-tuned model for each task (`"full"`), or one LoRA, as `addenda bench paper` trains them."""

    _tasks: list[TrainedBaseline]

    def _fit(self, images: LabelledImages) -> TrainedBaseline:
        how = self.settings
        config = BaselineConfig(
            epochs=how.epochs, batch_size=how.batch_size, warmup_steps=how.warmup_steps, clip_norm=how.clip_norm,
            rates=tuple(Rate("adamw", rate) for rate in (how.full_rates if self.name == "full" else how.lora_rates)),
            weight_decay=how.weight_decay,
            augmentation=Augmentation(views=how.views if images.can_vary else 0), autocast=how.autocast, seed=self.seed,
        )  # fmt: skip
        return train_baseline(self.name, self.backbone, images, config=config)

    def _logits(self, tasks: Sequence[TrainedBaseline], images: LabelledImages) -> list[Float[Tensor, "N c"]]:
        pixels = images.read_all(self.backbone)
        return [baseline_logits(self.backbone, task, pixels, self.settings.autocast) for task in tasks]

    def _stored_bytes(self) -> float:
        return sum(tensor.nbytes for task in self._tasks for tensor in task.tensors.values())

    def _relative_inference(self) -> float:
        """A pass for each task: an image of which the task is not told is asked of every one."""
        return float(len(self._tasks))


class LinearProbePerTask(PerTask):
    """One logistic regression on the frozen pooled feature for each task, all answered by one pass."""

    _tasks: list[LinearProbe]

    def _fit(self, images: LabelledImages) -> LinearProbe:
        features, objective = self.pooled(images), images.objective
        strength = objective.choose_strength(features, images.targets, self.seed)
        return objective.fit_linear_probe(features, images.targets, strength)

    def _logits(self, tasks: Sequence[LinearProbe], images: LabelledImages) -> list[Float[Tensor, "N c"]]:
        return [F.linear(self.pooled(images), task.weight, task.bias) for task in tasks]

    def _stored_bytes(self) -> float:
        return sum(task.weight.nbytes + task.bias.nbytes for task in self._tasks)
