"""What methods with one head over all classes of a stream have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.continual.method import NEVER, Price, Scores
from addenda.benchmarks.continual.settings import BaselineSettings
from addenda.benchmarks.continual.stream import Experience, Stream
from addenda.learner.activations import Activations
from addenda.learner.augmentation import Augmentation
from addenda.learner.cache import ActivationCache
from addenda.learner.data.labelled import LabelledImages
from addenda.learner.regimes import EVALUATION_BATCH


class OneHead(ABC):
    """A method whose scores, told the task, are its scores untold of that task's classes.

    Args:
        stream: to be learned.
        backbone: where it starts; it stays as it is.
        settings: how it learns.
        seed: of all that is random.
    """

    def __init__(self, stream: Stream, backbone: FrozenBackbone, settings: BaselineSettings, seed: int) -> None:
        self._stream, self._backbone, self._settings, self._seed = stream, backbone, settings, seed
        self._num_learned = 0

    def learn(self, number: int) -> None:
        """Learns experience `number`; all before it were learned, in order."""
        self._learn(number)
        self._num_learned = number + 1

    def scores(self, experience: Experience) -> Scores:
        """Scores the test images of an experience, whether it was learned yet or not."""
        if self._num_learned == 0:
            nothing = torch.full(
                (len(experience.test), len(self._stream.labels)), NEVER, dtype=torch.float32, device="cpu"
            )
            return Scores(nothing, nothing)
        met = torch.zeros(len(self._stream.labels), dtype=torch.bool, device="cpu")
        for one in self._stream.experiences[: self._num_learned]:
            met[list(one.classes)] = True
        own = torch.zeros_like(met)
        own[list(experience.classes)] = True
        untold = self._logits(experience.test).masked_fill(~met, NEVER)
        return Scores(told=untold.masked_fill(~own, NEVER), untold=untold)

    def price(self) -> Price:
        """What it costs, now."""
        return Price(self._stored_bytes() / max(1, self._num_learned), self._relative_inference())

    def _relative_inference(self) -> float:
        return 1.0

    @abstractmethod
    def _learn(self, number: int) -> None: ...

    @abstractmethod
    def _logits(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        """Scores of all classes, on the CPU."""

    @abstractmethod
    def _stored_bytes(self) -> float:
        """What it keeps, of all experiences together."""


class PooledFeatures:
    """The backbone's own pooled feature of images, from the activation cache; what was read once stays in memory."""

    def __init__(self, backbone: FrozenBackbone) -> None:
        self._backbone = backbone
        self._kept: dict[int, tuple[LabelledImages, Tensor]] = {}  # the images too, so that no other gets their id

    def __call__(self, images: LabelledImages) -> Float[Tensor, "N D"]:
        """The feature of each image, on the CPU."""
        if id(images) not in self._kept:
            found = Activations(self._backbone, images, Augmentation(views=0), ActivationCache()).pooled
            self._kept[id(images)] = images, found
        return self._kept[id(images)][1]


def pixel_batches(images: LabelledImages, backbone: FrozenBackbone) -> Iterator[Float[Tensor, "B 3 H W"]]:
    """Images as the backbone takes them, a batch of evaluation at a time, on its device."""
    for rows in torch.arange(len(images), dtype=torch.int64, device="cpu").split(EVALUATION_BATCH):
        yield torch.stack([images.read(row, backbone) for row in rows.tolist()]).to(backbone.device)
