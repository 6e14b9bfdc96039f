"""Methods that keep a thing of its own for each task, and so forget nothing once told which: model, LoRA or probe."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.benchmarks.baselines.method import Baseline, Price, Scores
from addenda.benchmarks.baselines.regimes import Rival, RivalConfig, rival_logits, train_rival
from addenda.benchmarks.continual.stream import Experience
from addenda.learner import Augmentation
from addenda.learner.data import LabelledImages, check_learnable
from addenda.learner.objectives import Regression, objective_of


class PerTask(Baseline):
    """A method that answers, told the task, by what it keeps for that task; else the most confident task answers.

    What a task answers for an image never changes, so each is asked once for the images of an experience.
    """

    def __post_init__(self) -> None:
        self._tasks: list[Any] = []
        self._answers: dict[tuple[int, str], Tensor] = {}

    def learn(self, number: int) -> None:
        """Learns experience `number`; all before it were learned, in order."""
        experience = self.stream.experiences[number]
        check_learnable(experience.own(experience.train))
        self._tasks.append(self._learn(experience))

    def scores(self, experience: Experience) -> Scores:
        """Scores the test images of an experience, learned yet or not: log-probabilities within each task."""
        missing = [place for place in range(len(self._tasks)) if (place, experience.name) not in self._answers]
        if missing:
            inputs = self._read(experience.test)
            for place in missing:
                logits = self._logits(self._tasks[place], self.stream.experiences[place], inputs)
                self._answers[place, experience.name] = F.log_softmax(logits, dim=1)
        told, untold = self.nothing(experience.test), self.nothing(experience.test)
        for place, one in enumerate(self.stream.experiences[: len(self._tasks)]):
            found, columns = self._answers[place, experience.name], list(one.classes)
            untold[:, columns] = untold[:, columns].maximum(found)
            if one.name == experience.name:
                told[:, columns] = found
        return Scores(told, untold)

    def price(self) -> Price:
        """What it costs, now."""
        stored = sum(tensor.nbytes for task in self._tasks for tensor in self._kept_of(task))
        return Price(stored / max(1, len(self._tasks)), self._relative_inference())

    @abstractmethod
    def _learn(self, experience: Experience) -> Any:
        """What is kept of one experience."""

    @abstractmethod
    def _read(self, images: LabelledImages) -> Tensor:
        """Images as the tasks take them."""

    @abstractmethod
    def _logits(self, task: Any, of: Experience, inputs: Tensor) -> Float[Tensor, "N c"]:
        """One task's logits of its own classes, on the CPU."""

    @abstractmethod
    def _kept_of(self, task: Any) -> list[Tensor]: ...

    @abstractmethod
    def _relative_inference(self) -> float: ...


class RivalPerTask(PerTask):
    """One fully fine-tuned model for each task (`"full"`), or one LoRA, as `addenda bench paper` trains them."""

    def _learn(self, experience: Experience) -> Rival:
        how, images = self.settings, experience.own(experience.train)
        config = RivalConfig(
            epochs=how.epochs,
            batch_size=how.batch_size,
            learning_rate=how.full_rates if self.name == "full" else how.lora_rates,
            weight_decay=how.weight_decay,
            warmup_steps=how.warmup_steps,
            clip_norm=how.clip_norm,
            augmentation=Augmentation(views=how.views if images.can_vary else 0),
            autocast=how.autocast,
            seed=self.seed,
        )
        return train_rival(self.name, self.backbone, images, config=config)

    def _read(self, images: LabelledImages) -> Float[Tensor, "N 3 H W"]:
        return images.read_all(self.backbone)

    def _logits(self, task: Rival, of: Experience, inputs: Tensor) -> Float[Tensor, "N c"]:
        labels = of.own(of.test).labels
        return rival_logits(self.name, self.backbone, task, labels, inputs, self.settings.autocast)

    def _kept_of(self, task: Rival) -> list[Tensor]:
        return list(task.tensors.values())

    def _relative_inference(self) -> float:
        """A pass for each task: an image of which the task is not told is asked of every one."""
        return float(len(self._tasks))


class LinearProbe(PerTask):
    """One logistic regression on the frozen pooled feature for each task."""

    def _learn(self, experience: Experience) -> Regression:
        features, targets = self.pooled(experience.train), experience.own(experience.train).targets
        objective = objective_of(targets)
        return objective.fit_regression(features, targets, objective.choose_strength(features, targets, self.seed))

    def _read(self, images: LabelledImages) -> Float[Tensor, "N D"]:
        return self.pooled(images)

    def _logits(self, task: Regression, of: Experience, inputs: Tensor) -> Float[Tensor, "N c"]:
        return F.linear(inputs, task.weight, task.bias)

    def _kept_of(self, task: Regression) -> list[Tensor]:
        return [task.weight, task.bias]

    def _relative_inference(self) -> float:
        """One pass answers all; heads are left out, as in addenda.combined.task_cost."""
        return 1.0
