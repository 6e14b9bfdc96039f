"""Methods that keep a thing of its own for each task, and so forget nothing once told which: model, LoRA or probe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.continual.method import NEVER, Price, Scores
from addenda.benchmarks.continual.one_head import PooledFeatures
from addenda.benchmarks.continual.settings import BaselineSettings
from addenda.benchmarks.continual.stream import Experience, Stream
from addenda.learner.augmentation import Augmentation
from addenda.learner.data.labelled import LabelledImages
from addenda.learner.data.learnable import check_learnable
from addenda.learner.regimes import Rival, RivalConfig, rival_logits, train_rival
from addenda.learner.regression import Regression, choose_strength, fit_regression


class PerTask(ABC):
    """A method that answers, told the task, by what it keeps for that task; else the most confident task answers.

    What a task answers for an image never changes, so each is asked once for the images of an experience.

    Args:
        stream: to be learned.
        backbone: where every task starts; it stays as it is.
        settings: how they are learned.
        seed: of all that is random.
    """

    def __init__(self, stream: Stream, backbone: FrozenBackbone, settings: BaselineSettings, seed: int) -> None:
        self._stream, self._backbone, self._settings, self._seed = stream, backbone, settings, seed
        self._tasks: list[Any] = []
        self._answers: dict[tuple[int, str], Tensor] = {}

    def learn(self, number: int) -> None:
        """Learns experience `number`; all before it were learned, in order."""
        experience = self._stream.experiences[number]
        check_learnable(experience.own(experience.train))
        self._tasks.append(self._learn(experience))

    def scores(self, experience: Experience) -> Scores:
        """Scores the test images of an experience, learned yet or not: log-probabilities within each task."""
        missing = [place for place in range(len(self._tasks)) if (place, experience.name) not in self._answers]
        if missing:
            inputs = self._read(experience.test)
            for place in missing:
                logits = self._logits(self._tasks[place], self._stream.experiences[place], inputs)
                self._answers[place, experience.name] = F.log_softmax(logits, dim=1)
        told, untold = torch.full(
            (2, len(experience.test), len(self._stream.labels)), NEVER, dtype=torch.float32, device="cpu"
        )
        for place, one in enumerate(self._stream.experiences[: len(self._tasks)]):
            found, columns = self._answers[place, experience.name], list(one.classes)
            untold[:, columns] = untold[:, columns].maximum(found)
            if one.name == experience.name:
                told[:, columns] = found
        return Scores(told, untold)

    def price(self) -> Price:
        """What it costs, now: an image of which the task is not told is asked of every task."""
        stored = sum(self._num_bytes(task) for task in self._tasks)
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
    def _num_bytes(self, task: Any) -> int: ...

    @abstractmethod
    def _relative_inference(self) -> float: ...


class RivalPerTask(PerTask):
    """One fully fine-tuned model for each task, or one LoRA, as `addenda bench paper` trains them.

    Args:
        regime: `"full"` or `"lora-R"`.
        stream: to be learned.
        backbone: where every task starts; it stays as it is.
        settings: how they are learned.
        seed: of the split, of the first values and of the order of images.
    """

    def __init__(
        self, regime: str, stream: Stream, backbone: FrozenBackbone, settings: BaselineSettings, seed: int
    ) -> None:
        super().__init__(stream, backbone, settings, seed)
        self._regime = regime

    def _learn(self, experience: Experience) -> Rival:
        how, images = self._settings, experience.own(experience.train)
        config = RivalConfig(
            epochs=how.epochs,
            batch_size=how.batch_size,
            learning_rate=how.full_rates if self._regime == "full" else how.lora_rates,
            weight_decay=how.weight_decay,
            warmup_steps=how.warmup_steps,
            clip_norm=how.clip_norm,
            augmentation=Augmentation(views=how.views if images.can_vary else 0),
            autocast=how.autocast,
            seed=self._seed,
        )
        return train_rival(self._regime, self._backbone, images, config=config)

    def _read(self, images: LabelledImages) -> Float[Tensor, "N 3 H W"]:
        return images.read_all(self._backbone)

    def _logits(self, task: Rival, of: Experience, inputs: Tensor) -> Float[Tensor, "N c"]:
        labels = of.own(of.test).labels
        return rival_logits(self._regime, self._backbone, task, labels, inputs, self._settings.autocast)

    def _num_bytes(self, task: Rival) -> int:
        return sum(tensor.nbytes for tensor in task.tensors.values())

    def _relative_inference(self) -> float:
        """A pass for each task."""
        return float(len(self._tasks))


class LinearProbe(PerTask):
    """One logistic regression on the frozen pooled feature for each task."""

    def __init__(self, stream: Stream, backbone: FrozenBackbone, settings: BaselineSettings, seed: int) -> None:
        super().__init__(stream, backbone, settings, seed)
        self._pooled = PooledFeatures(backbone)

    def _learn(self, experience: Experience) -> Regression:
        features, targets = self._pooled(experience.train), experience.own(experience.train).targets
        return fit_regression(features, targets, choose_strength(features, targets, self._seed))

    def _read(self, images: LabelledImages) -> Float[Tensor, "N D"]:
        return self._pooled(images)

    def _logits(self, task: Regression, of: Experience, inputs: Tensor) -> Float[Tensor, "N c"]:
        return F.linear(inputs, task.weight, task.bias)

    def _num_bytes(self, task: Regression) -> int:
        return task.weight.nbytes + task.bias.nbytes

    def _relative_inference(self) -> float:
        """One pass answers all; heads are left out, as in addenda.combined.task_cost."""
        return 1.0
