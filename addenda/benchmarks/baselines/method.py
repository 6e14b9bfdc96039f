"""What the benchmark asks of every method: learn an experience, then score images, told of their task or not."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from avalanche.training.plugins import EvaluationPlugin
from jaxtyping import Float
from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.continual.stream import Experience, Stream
from addenda.benchmarks.strategy import NEVER
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.activations import Activations
from addenda.learner.data import LabelledImages

Count = Annotated[int, Field(ge=1)]
Rates = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class BaselineSettings:
    """Settings of the baselines."""

    epochs: Count = 4  # passes over an experience's images
    batch_size: Count = 16  # new images in an optimiser step; replay adds as many old ones
    warmup_steps: NonNegativeInt = 5  # of linear warm-up before the cosine, in each experience
    clip_norm: PositiveFloat = 1.0  # largest norm of the gradient
    weight_decay: NonNegativeFloat = 0.05  # AdamW's
    autocast: bool = False  # whether passes run in bfloat16 where torch's autocast thinks it safe
    augment: bool = True  # whether fine-tuning draws a fresh view of an image each time
    views: NonNegativeInt = 3  # random ones that per-task models learn from, held in memory
    finetuning_rate: PositiveFloat = 5e-5  # of fine-tuning in sequence, EWC, LwF, replay and joint training
    full_rates: Rates = (5e-5,)  # of one full model for each task; validation picks one
    lora_rates: Rates = (5e-4,)  # of one LoRA for each task, likewise
    # Of 10^3 and 10^6 (three pairs of CIFAR-10 classes, 48 images each, ViT-Ti) the first held nothing back.
    ewc_lambda: NonNegativeFloat = 1e6
    lwf_alpha: NonNegativeFloat = 1.0  # weight of the distillation
    lwf_temperature: PositiveFloat = 2.0  # of its softmax
    replay_images: Count = 200  # in memory, of all experiences together
    ranpac_width: Count = 2000  # random features M; the paper has 10,000, and solving takes M^3 for each experience


class Scores(NamedTuple):
    """A method's scores of all C classes of the stream on N images; the highest is its answer."""

    task_incremental: Float[Tensor, "N C"]  # where the task is known: NEVER for the classes of other tasks
    class_incremental: Float[Tensor, "N C"]  # where it is not: NEVER only for classes that were never met


class Price(NamedTuple):
    """What a method costs after a whole stream."""

    stored_bytes: float  # kept for one task, in the mean, beside one backbone: weights, statistics, images
    relative_inference: float  # arithmetic of one image's answer, over one pass of the backbone


class Method(ABC):
    """A way to learn a stream; one is made for each seed."""

    @abstractmethod
    def learn(self, number: int) -> None:
        """Learns experience `number`; all before it were learned, in order."""

    @abstractmethod
    def scores(self, experience: Experience) -> Scores:
        """Scores the test images of an experience, whether it was learned yet or not."""

    @abstractmethod
    def price(self) -> Price:
        """What it costs, now."""

    def extra(self) -> dict[str, float | dict[str, float]]:
        """Figures that only this method has."""
        return {}


@dataclass(eq=False)
class Baseline(Method):
    """A method that Addenda is compared with; the backbone, where it starts, stays as it is."""

    name: str  # as `--methods` has it
    stream: Stream
    backbone: FrozenBackbone
    settings: BaselineSettings
    seed: int
    num_learned: int = field(default=0, init=False)
    # the images too, so that no other gets their id
    _kept: dict[int, tuple[LabelledImages, Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Makes what a method needs beside these."""

    def learn(self, number: int) -> None:
        """Learns experience `number`; all before it were learned, in order."""
        self._learn(number)
        self.num_learned = number + 1

    def price(self) -> Price:
        """What it costs, now."""
        return Price(self._stored_bytes() / max(1, self.num_learned), self._relative_inference())

    @abstractmethod
    def _learn(self, number: int) -> None: ...

    @abstractmethod
    def _stored_bytes(self) -> float:
        """What it keeps, of all experiences together."""

    def _relative_inference(self) -> float:
        return 1.0

    def pooled(self, images: LabelledImages) -> Float[Tensor, "N D"]:
        """The backbone's pooled feature of each image, on the CPU; what was read once stays in memory."""
        if id(images) not in self._kept:
            found = Activations(self.backbone, images, Augmentation(views=0), ActivationCache()).pooled
            self._kept[id(images)] = images, found
        return self._kept[id(images)][1]

    def nothing(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        """Scores that offer no class."""
        return torch.full((len(images), len(self.stream.labels)), NEVER, dtype=torch.float32, device="cpu")


class OneHead(Baseline):
    """A method with one head over all classes: its scores, told the task, are its scores untold of that task's."""

    def scores(self, experience: Experience) -> Scores:
        """Scores the test images of an experience, whether it was learned yet or not."""
        class_incremental, task_incremental = self.nothing(experience.test), self.nothing(experience.test)
        if self.num_learned:
            learned = self.stream.experiences[: self.num_learned]
            met = sorted({number for one in learned for number in one.classes})
            class_incremental[:, met] = self._logits(experience.test)[:, met]
            task_incremental[:, list(experience.classes)] = class_incremental[:, list(experience.classes)]
        return Scores(task_incremental, class_incremental)

    @abstractmethod
    def _logits(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        """Scores of all classes, on the CPU."""


def quiet_evaluator() -> EvaluationPlugin:
    """An Avalanche evaluator that measures and says nothing: the benchmark measures for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No loggers specified")
        return EvaluationPlugin()
