"""Exactness as an Avalanche metric: are the logits of all earlier tasks unchanged, bit for bit?"""

from __future__ import annotations

import math
from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from addenda.benchmarks.strategy import MaskedMemory, StreamClassifier, task_label
from addenda.exceptions import DataError


class LogitBits(PluginMetric[float]):  # type: ignore[misc]
    """After each experience, compares the logits of every earlier one with those when it was learned, byte for byte.

    Works with every supervised strategy. For each earlier experience it emits `LogitsIdentical` (1 or 0) and
    `MaxLogitDifference`, computed on some of its training images with the evaluation transform. `identical` and
    `max_difference` aggregate over the stream. For `MaskedMemory` the logits are those of the task's head; for other
    strategies, the strategy's `forward` with its model in evaluation mode, of the classes seen when the experience was
    learned.

    Args:
        num_images: maximum number of images per experience.
    """

    def __init__(self, num_images: int = 16) -> None:
        super().__init__()
        self._num_images = num_images
        self._before: dict[int, tuple[Tensor, int, list[int] | slice, Tensor]] = {}
        self._classes: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """Resets the result, but keeps the reference logits."""
        self.identical = True
        self.max_difference = 0.0

    def result(self) -> float:
        """Largest absolute change of any earlier logit so far."""
        return self.max_difference

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        """Compares the earlier experiences, then stores the logits of the new one."""
        experience = strategy.experience
        values: list[MetricValue] = []
        for number, (images, label, columns, before) in self._before.items():
            if number == experience.current_experience:
                continue
            now = _logits(strategy, images, label, number)[:, columns].contiguous()
            same = now.numpy().tobytes() == before.numpy().tobytes()
            difference = 0.0 if same else (now - before).abs().max().nan_to_num(nan=math.inf).item()
            self.identical = self.identical and same
            self.max_difference = max(self.max_difference, difference)
            step = strategy.clock.train_iterations
            for name, value in (("LogitsIdentical", float(same)), ("MaxLogitDifference", difference)):
                values.append(MetricValue(self, f"{name}/Exp{number:03d}", value, step))
        dataset = experience.dataset.eval()
        images = torch.stack([_tensor(strategy, dataset[i][0]) for i in range(min(self._num_images, len(dataset)))])
        label = task_label(experience)
        before = _logits(strategy, images, label, experience.current_experience)
        compared: list[int] | slice = slice(None)
        if not isinstance(strategy.model, StreamClassifier):
            self._classes |= {int(target) for target in experience.dataset.targets}
            compared = [number for number in sorted(self._classes) if number < before.shape[1]] or compared
        self._before[experience.current_experience] = (images, label, compared, before[:, compared].contiguous())
        return values

    def __str__(self) -> str:
        return "LogitBits"


def _tensor(strategy: Any, image: Any) -> Tensor:
    """An image as model input; the backbone of `MaskedMemory` transforms PIL images."""
    if isinstance(strategy, MaskedMemory) and isinstance(image, Image.Image):
        return strategy.learner.backbone.transform(image)
    if not isinstance(image, Tensor):
        raise DataError(
            f"LogitBits needs tensors, but the training datasets give {type(image).__name__} in evaluation mode; give "
            "the benchmark an `eval_transform` that returns tensors."
        )
    return image


@torch.no_grad()
def _logits(strategy: Any, images: Float[Tensor, "B 3 H W"], label: int, number: int) -> Float[Tensor, "B C"]:
    """Current logits of the strategy's model on images of an experience."""
    model, training = strategy.model, strategy.model.training
    if isinstance(model, StreamClassifier):
        return model.logits(images, number)
    model.eval()
    labels = torch.full((len(images),), label, device=strategy.device, dtype=torch.int64)
    mini_batch, strategy.mbatch = strategy.mbatch, [images.to(strategy.device), torch.zeros_like(labels), labels]
    try:
        logits: Tensor = strategy.forward()
    finally:
        strategy.mbatch = mini_batch
        model.train(training)
    return logits.float().cpu()
