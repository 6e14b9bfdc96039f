"""Addenda as an Avalanche strategy: each experience becomes a registered task."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins.evaluation import EvaluationPlugin, default_evaluator
from avalanche.training.templates import SupervisedTemplate
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from addenda.backbones import FrozenBackbone
from addenda.combined import CombinedModel
from addenda.learner import LearnConfig, Learner
from addenda.registry import Registry

NEVER = -1e4
"""Score of a class that no task offers; Avalanche's own padding of 0 would win over an all-negative head."""


class TaskAnswers(nn.Module):
    """The combined model as a classifier over the stream's classes.

    Where Avalanche gives task labels, a sample is answered by the tasks of its label; else by all, and the most
    confident wins.
    """

    def __init__(self, backbone: FrozenBackbone) -> None:
        super().__init__()
        self.combined = CombinedModel(backbone, [])
        self._classes: dict[str, tuple[int, list[int]]] = {}

    def add(self, combined: CombinedModel, name: str, task_label: int, classes: list[int]) -> None:
        """Answers with another combined model, and with one more task: its task label and the classes of its head."""
        self.combined = combined
        self._classes[name] = (task_label, classes)

    def forward(
        self, images: Float[Tensor, "B 3 H W"], task_labels: Tensor | None = None, num_classes: int = 0
    ) -> Float[Tensor, "B C"]:
        """Scores of every class: log-probabilities within the task that offers it."""
        width = max([num_classes, *(max(classes) + 1 for _, classes in self._classes.values())])
        scores = torch.full((len(images), width), NEVER, device=images.device)
        wanted = [n for n, (t, _) in self._classes.items() if task_labels is None or bool((task_labels == t).any())]
        for name, logits in self.combined(images, wanted).items():
            task_label, classes = self._classes[name]
            rows = (
                torch.ones(len(images), dtype=torch.bool) if task_labels is None else (task_labels == task_label).cpu()
            )
            offered = logits.log_softmax(-1).to(images.device)
            scores[rows[:, None].to(images.device) & _columns(classes, width, images.device)] = offered[rows].flatten()
        return scores


class MaskedMemory(SupervisedTemplate):  # type: ignore[misc]
    """The paper's masked memory tokens as a strategy: training an experience learns and registers one task.

    Args:
        backbone: the frozen backbone. The benchmark's images must come through `backbone.transform`, or be PIL images.
        registry: where the tasks go; a stream met again finds its tasks there.
        config: settings of each learning run.
        prefix: experience 3 becomes the task `prefix-003`.
        eval_mb_size: images in an evaluation batch.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        registry: Registry,
        config: LearnConfig | None = None,
        prefix: str = "experience",
        eval_mb_size: int = 64,
        plugins: list[Any] | None = None,
        evaluator: EvaluationPlugin | Any = default_evaluator,
    ) -> None:
        placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0)
        super().__init__(
            model=TaskAnswers(backbone),
            optimizer=placeholder,  # the learner has its own; Avalanche asks for one
            eval_mb_size=eval_mb_size,
            device=backbone.device,
            plugins=plugins,
            evaluator=evaluator,
        )
        self.learner = Learner(backbone, registry)
        self._config = config or LearnConfig()
        self._prefix = prefix

    def check_model_and_optimizer(self, reset_optimizer: bool = False, **kwargs: Any) -> None:
        """Nothing to adapt: the learner makes what a new task needs."""

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        name = f"{self._prefix}-{experience.current_experience:03d}"
        images = ExperienceImages(experience.dataset)
        task = self.learner.learn(name, images, config=self._config)
        combined = CombinedModel(self.learner.backbone, [*self.model.combined.tasks.values(), task])
        label = next(iter(experience.task_labels)) if hasattr(experience, "task_labels") else 0
        self.model.add(combined, name, int(label), [int(c) for c in task.labels])

    def forward(self) -> Tensor:
        """Scores of the current mini-batch."""
        task_aware = hasattr(self.experience, "task_labels")
        scores: Tensor = self.model(self.mb_x, self.mb_task_id if task_aware else None, int(self.mb_y.max()) + 1)
        return scores


class ExperienceImages(Dataset[tuple[Any, int]]):
    """An Avalanche dataset as the learner takes it: its classes are those that occur, by their number in the stream."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        stream_targets = [int(target) for target in dataset.targets]
        numbers = sorted(set(stream_targets))
        self.classes = tuple(map(str, numbers))
        self.targets = tuple(numbers.index(target) for target in stream_targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._dataset[index][0], self.targets[index]


def _columns(classes: list[int], width: int, device: torch.device) -> Tensor:
    """True at the columns of some classes, [1, width]; `classes` rise, as a head's rows do."""
    mask = torch.zeros(1, width, dtype=torch.bool, device=device)
    mask[0, classes] = True
    return mask
