"""Exactness as an Avalanche metric: did any old task's logits move by a bit?"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from torch import Tensor

NUM_IMAGES = 16


class LogitBits(PluginMetric[float]):  # type: ignore[misc]
    """After each experience: compares every old task's logits with what they were when it was learned, byte for byte.

    Emits for each old task `LogitsIdentical` (1 or 0) and `MaxLogitDifference`, on the first NUM_IMAGES images of its
    experience. `identical` and `max_difference` sum up the whole stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self._probes: dict[str, tuple[Tensor, Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets the verdict, not the logits that later ones are compared with."""
        self.identical = True
        self.max_difference = 0.0

    def result(self) -> float:
        """Largest difference of any old logit so far."""
        return self.max_difference

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        """Compares the old tasks, then remembers the new one."""
        combined = strategy.model.combined
        emitted: list[MetricValue] = []
        for name, (images, before) in self._probes.items():
            now = combined(images)[name].cpu()  # in the company of all the others, which must not show
            same = now.numpy().tobytes() == before.numpy().tobytes()
            difference = (now - before).abs().max().item()
            self.identical = self.identical and same
            self.max_difference = max(self.max_difference, difference)
            at = strategy.clock.train_iterations
            emitted.append(MetricValue(self, f"LogitsIdentical/{name}", float(same), at))
            emitted.append(MetricValue(self, f"MaxLogitDifference/{name}", difference, at))
        for name in combined.tasks:
            if name not in self._probes:
                dataset = strategy.experience.dataset
                images = torch.stack([dataset[i][0] for i in range(min(NUM_IMAGES, len(dataset)))])
                self._probes[name] = (images, combined(images)[name].cpu())
        return emitted

    def __str__(self) -> str:
        return "LogitBits"
