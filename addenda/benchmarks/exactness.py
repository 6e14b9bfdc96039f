"""Exactness as an Avalanche metric: did any old task's logits move by a bit?"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.models import avalanche_forward
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from addenda.benchmarks.strategy import MaskedMemory, TaskAnswers, task_label
from addenda.exceptions import DataError


class LogitBits(PluginMetric[float]):  # type: ignore[misc]
    """After each experience: compares every old one's logits with what they were when it was learned, byte for byte.

    Works with every strategy. It emits for each old experience `LogitsIdentical` (1 or 0) and `MaxLogitDifference`, on
    some of the images that it was learned from, through the evaluation transform. `identical` and `max_difference` sum
    up the whole stream. Of `MaskedMemory` they are the bare logits of the task's head, of other strategies what their
    model gives in evaluation mode; columns that a later experience adds are left out.

    Args:
        num_images: of each experience, at most.
    """

    def __init__(self, num_images: int = 16) -> None:
        super().__init__()
        self._num_images = num_images
        self._before: dict[int, tuple[Tensor, int, Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets the verdict, not the logits that later ones are compared with."""
        self.identical = True
        self.max_difference = 0.0

    def result(self) -> float:
        """Largest difference of any old logit so far."""
        return self.max_difference

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        """Compares the old experiences, then remembers the new one."""
        experience = strategy.experience
        emitted: list[MetricValue] = []
        for number, (images, label, before) in self._before.items():
            if number == experience.current_experience:
                continue
            now = _logits(strategy, images, label, number)[:, : before.shape[1]]
            same = now.numpy().tobytes() == before.numpy().tobytes()
            difference = (now - before).abs().max().item()
            self.identical = self.identical and same
            self.max_difference = max(self.max_difference, difference)
            at, place = strategy.clock.train_iterations, f"Exp{number:03d}"
            for what, value in (("LogitsIdentical", float(same)), ("MaxLogitDifference", difference)):
                emitted.append(MetricValue(self, f"{what}/{place}", value, at))
        dataset = experience.dataset.eval()
        images = torch.stack([_tensor(strategy, dataset[i][0]) for i in range(min(self._num_images, len(dataset)))])
        label = task_label(experience)
        before = _logits(strategy, images, label, experience.current_experience)
        self._before[experience.current_experience] = (images, label, before)
        return emitted

    def __str__(self) -> str:
        return "LogitBits"


def _tensor(strategy: Any, image: Any) -> Tensor:
    """An image as the strategy's model takes it: of PIL images `MaskedMemory` knows how."""
    if isinstance(strategy, MaskedMemory) and isinstance(image, Image.Image):
        return strategy.learner.backbone.transform(image)
    if not isinstance(image, Tensor):
        raise DataError(
            f"LogitBits compares tensors, and the training datasets give {type(image).__name__} in evaluation. Give "
            "them an evaluation transform (`eval_transform`)."
        )
    return image


@torch.no_grad()
def _logits(strategy: Any, images: Float[Tensor, "B 3 H W"], label: int, number: int) -> Float[Tensor, "B C"]:
    """Logits of an experience's images, as the strategy's model gives them now."""
    model, training = strategy.model, strategy.model.training
    if isinstance(model, TaskAnswers):
        return model.logits(images, number)
    model.eval()
    labels = torch.full((len(images),), label, device=strategy.device, dtype=torch.int64)
    logits: Tensor = avalanche_forward(model, images.to(strategy.device), labels)
    model.train(training)
    return logits.float().cpu().contiguous()
