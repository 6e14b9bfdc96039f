"""Interface of the benchmark's methods: learn an experience, and score images with and without their task label."""

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
from addenda.combined import CombinedModel, pass_operations, task_cost
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.activations import Activations
from addenda.learner.data import LabelledImages
from addenda.registry import Task

Count = Annotated[int, Field(ge=1)]
Rates = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class BaselineSettings:
    """Settings of the baselines."""

    epochs: Count = 4  # per experience
    batch_size: Count = 16  # new images per optimizer step; replay adds as many old ones
    warmup_steps: NonNegativeInt = 5  # linear warm-up before the cosine schedule, in each experience
    clip_norm: PositiveFloat = 1.0  # maximum gradient norm
    weight_decay: NonNegativeFloat = 0.05  # for AdamW
    autocast: bool = False  # run the forward pass under bfloat16 autocast
    augment: bool = True  # fine-tune on a new random view of an image each time
    views: NonNegativeInt = 3  # fixed random views of each image for per-task models, held in memory
    finetuning_rate: PositiveFloat = 5e-5  # for sequential fine-tuning, EWC, LwF, replay and joint training
    full_rates: Rates = (5e-5,)  # for one full model per task; validation selects one
    lora_rates: Rates = (5e-4,)  # for one LoRA per task; validation selects one
    # Tried 10^3 and 10^6 (three pairs of CIFAR-10 classes, 48 images each, ViT-Ti): 10^3 did not reduce forgetting.
    ewc_lambda: NonNegativeFloat = 1e6
    lwf_alpha: NonNegativeFloat = 1.0  # weight of the distillation loss
    lwf_temperature: PositiveFloat = 2.0  # of the distillation softmax
    replay_images: Count = 200  # size of the replay buffer over all experiences
    gaussian_samples: Count = 256  # drawn per class for the Gaussian-replay head, as by SLCA
    gaussian_strength: PositiveFloat = 0.01  # inverse penalty C of that head
    ranpac_width: Count = 2000  # number M of random features; the paper uses 10,000, each experience costs O(M^3)


class Scores(NamedTuple):
    """Scores of N images for all C classes of the stream; the highest is the prediction."""

    task_incremental: Float[Tensor, "N C"]  # NEVER for classes of other tasks
    class_incremental: Float[Tensor, "N C"]  # NEVER for classes not seen so far


class Price(NamedTuple):
    """Storage and inference cost of a method."""

    stored_bytes: float  # mean per task, without the backbone: weights, statistics, images
    relative_inference: float  # operations to predict one image, relative to a forward pass of the backbone


@dataclass(eq=False)
class Method(ABC):
    """A continual-learning method with one seed; it starts from the backbone and leaves it unchanged."""

    name: str  # as in `--methods`
    stream: Stream
    backbone: FrozenBackbone
    settings: BaselineSettings
    seed: int
    num_learned: int = field(default=0, init=False)
    # Keyed by the id of the images; holds a reference to them, so that no other object can get the same id.
    _features: dict[int, tuple[LabelledImages, Tensor]] = field(default_factory=dict, init=False)

    @abstractmethod
    def __post_init__(self) -> None:
        """Create what the method needs in addition."""

    def learn(self, number: int) -> None:
        """Learn experience `number`; experiences are learned in order."""
        self._learn(number)
        self.num_learned = number + 1

    @abstractmethod
    def scores(self, experience: Experience) -> Scores:
        """Score the test images of an experience, learned or not."""

    def price(self) -> Price:
        """The current cost."""
        return Price(self._stored_bytes() / max(1, self.num_learned), self._relative_inference())

    def extra(self) -> dict[str, float | dict[str, float]]:
        """Additional metrics of this method."""
        return {}

    @abstractmethod
    def _learn(self, number: int) -> None: ...

    @abstractmethod
    def _stored_bytes(self) -> float:
        """Total bytes stored for all experiences."""

    def _relative_inference(self) -> float:
        return 1.0

    def pooled(self, images: LabelledImages) -> Float[Tensor, "N D"]:
        """The backbone's pooled feature of each image, on the CPU; computed once and kept in memory."""
        if id(images) not in self._features:
            cache = ActivationCache(budget_gb=0)  # none, so that every method's seconds include the backbone's pass
            features = Activations(self.backbone, images, Augmentation(views=0), cache, tokens=False).pooled
            self._features[id(images)] = images, features
        return self._features[id(images)][1]

    def pooled_inference(self) -> float:
        """Operations of the pooled feature, for which the last block is reduced, relative to a forward pass."""
        weight = torch.zeros(1, self.backbone.embed_dim, dtype=torch.float32, device="cpu")
        bias = torch.zeros(1, dtype=torch.float32, device="cpu")
        head = Task("probe", self.backbone.fingerprint, ("any",), head_weight=weight, head_bias=bias)
        model = CombinedModel(self.backbone, [head], exact=False)
        return pass_operations(model) / task_cost(self.backbone, 0).backbone_operations

    def no_scores(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        """Scores of NEVER for every class."""
        return torch.full((len(images), len(self.stream.labels)), NEVER, dtype=torch.float32, device="cpu")


class OneHead(Method):
    """A method with a single head; task-incremental scores are the class-incremental ones of the task's classes."""

    def scores(self, experience: Experience) -> Scores:
        """Score the test images of an experience, learned or not."""
        class_incremental, task_incremental = self.no_scores(experience.test), self.no_scores(experience.test)
        if self.num_learned:
            learned = self.stream.experiences[: self.num_learned]
            seen = sorted({number for earlier in learned for number in earlier.classes})
            class_incremental[:, seen] = self._logits(experience.test)[:, seen]
            task_incremental[:, list(experience.classes)] = class_incremental[:, list(experience.classes)]
        return Scores(task_incremental, class_incremental)

    @abstractmethod
    def _logits(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        """Scores for all classes, on the CPU."""


def quiet_evaluator() -> EvaluationPlugin:
    """An Avalanche evaluator without metrics or loggers; the benchmark computes its own metrics."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No loggers specified")
        return EvaluationPlugin()
