"""Addenda as an Avalanche strategy: each experience becomes a registered task."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from avalanche.training.plugins.evaluation import EvaluationPlugin, default_evaluator
from avalanche.training.templates import SupervisedTemplate
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.plugins import check_plugin
from addenda.combined import CombinedModel, Router, TaskLogits
from addenda.exceptions import DataError, RegistryError
from addenda.learner import ActivationCache, LearnConfig, Learner
from addenda.registry import FeatureStatistics, Registry, Task

log = logging.getLogger(__name__)

NEVER = -1e4
"""Score of a class that is not offered; Avalanche's own padding of 0 would win over an all-negative head."""


class Learned(NamedTuple):
    """A task of the stream."""

    task: Task  # what was registered
    number: int  # of the experience
    task_label: int  # of the experience; 0 where the benchmark has none
    classes: tuple[int, ...]  # the stream's, by row of the head
    statistics: FeatureStatistics | None  # what a router knows of its images


class TaskAnswers(nn.Module):
    """The combined model as a classifier over the stream's classes.

    An image is answered by the task of its task label. Where there is no label, or several tasks have it, a router
    weighs them; a class that several tasks offer has the sum of what they give it.
    """

    def __init__(self, backbone: FrozenBackbone) -> None:
        super().__init__()
        self.combined = CombinedModel(backbone, [])
        self.learned: dict[str, Learned] = {}
        self._routers: dict[tuple[str, ...], Router] = {}

    def add(self, learned: Learned) -> None:
        """Answers one more task."""
        self.learned[learned.task.name] = learned
        self.combined = self.combined.with_tasks([one.task for one in self.learned.values()])
        self._routers.clear()

    def forward(
        self, images: Float[Tensor, "B 3 H W"], task_labels: Int[Tensor, " B"] | None = None, num_classes: int = 0
    ) -> Float[Tensor, "B C"]:
        """Log-probabilities of every class, of `num_classes` at least; NEVER where no task asked offers it."""
        return self.score(self.combined(images, pooled=True), task_labels, num_classes).to(images.device)

    def score(
        self, answers: TaskLogits, task_labels: Int[Tensor, " B"] | None = None, num_classes: int = 0
    ) -> Float[Tensor, "B C"]:
        """The same from what the combined model answered, with the backbone's own feature, on the CPU."""
        assert answers.pooled is not None
        count, learned = len(answers.pooled), self.learned.values()
        width = max([num_classes, *(max(one.classes) + 1 for one in learned)])
        scores = torch.full((count, width), NEVER, dtype=torch.float32, device="cpu")
        labels = torch.zeros(count, dtype=torch.int64, device="cpu") if task_labels is None else task_labels.cpu()
        for label in labels.unique():
            rows = labels == label
            asked = {one.task.name: one for one in learned if task_labels is None or one.task_label == label}
            within = {
                name: (answers[name].cpu()[rows] / one.task.temperature).log_softmax(1) for name, one in asked.items()
            }
            if len(asked) > 1:
                within = self._router(tuple(asked)).routed(within, answers.pooled[rows])
            held = scores[rows]
            for name, found in within.items():
                columns = list(asked[name].classes)
                held[:, columns] = held[:, columns].logaddexp(found.float()).clamp(min=NEVER / 2)
            scores[rows] = held
        return scores

    def logits(self, images: Float[Tensor, "B 3 H W"], number: int) -> Float[Tensor, "B C"]:
        """What the head of an experience's task gives, in the company of all the others."""
        (name,) = [name for name, one in self.learned.items() if one.number == number]
        return self.combined(images)[name].cpu()

    def _router(self, names: tuple[str, ...]) -> Router:
        if names not in self._routers:
            known = {name: kept for name in names if (kept := self.learned[name].statistics) is not None}
            if missing := sorted(set(names) - set(known)):
                raise RegistryError(
                    f"Nobody says which task an image is for, and of the images of task {missing[0]!r} nothing was "
                    "kept: it has too many classes. Give the benchmark task labels."
                )
            self._routers[names] = Router(known)
        return self._routers[names]


class MaskedMemory(SupervisedTemplate):  # type: ignore[misc]
    """The paper's masked memory tokens as a strategy: training an experience learns and registers one task.

    With task labels an image is answered by its task; without, or where experiences share a label, a router chooses.
    The registry is the checkpoint: a stream met again finds its tasks there, and an experience that was interrupted
    goes on from its last epoch.

    Args:
        backbone: the frozen backbone. Images to be tested on must come through `backbone.transform`: give that as the
            benchmark's `eval_transform`. Images to learn from come as they are (`train_transform=None`, PIL images, of
            which random views are made as `config` says), or else through `eval_transform` too.
        registry: where the tasks go.
        config: settings of each learning run.
        prefix: experience 3 becomes the task `prefix-003`.
        eval_mb_size: images in an evaluation batch.
        plugins: Avalanche plugins that look on. There are no epochs, iterations or backward passes of Avalanche's here.
        evaluator: Avalanche's evaluation plugin.
        eval_every: 0 evaluates the streams that `train` is given before and after each experience, as Avalanche's
            forward transfer asks for.
        cache: where activations are kept.
        skip_bad: leave out images that cannot be had or read.

    Raises:
        DataError: a plugin that would change how a strategy trains.
    """

    def __init__(
        self,
        *,
        backbone: FrozenBackbone,
        registry: Registry,
        config: LearnConfig | None = None,
        prefix: str = "experience",
        eval_mb_size: int = 64,
        plugins: list[Any] | None = None,
        evaluator: EvaluationPlugin | Any = default_evaluator,
        eval_every: int = -1,
        cache: ActivationCache | None = None,
        skip_bad: bool = False,
    ) -> None:
        for plugin in plugins or []:
            check_plugin(plugin)
        placeholder = torch.optim.SGD([nn.Parameter(torch.zeros((), dtype=torch.float32, device="cpu"))], lr=0.0)
        super().__init__(
            model=TaskAnswers(backbone),
            optimizer=placeholder,  # the learner has its own; Avalanche asks for one
            eval_mb_size=eval_mb_size,
            device=backbone.device,
            plugins=plugins,
            evaluator=evaluator,
            eval_every=eval_every,
        )
        self.learner = Learner(backbone, registry, cache)
        self._config = config or LearnConfig()
        self._prefix, self._within_train, self._skip_bad = prefix, False, skip_bad
        self._first_plugins = tuple(self.plugins)

    def check_model_and_optimizer(self, reset_optimizer: bool = False, **kwargs: Any) -> None:
        """Nothing to adapt: the learner makes what a new task needs."""

    def make_train_dataloader(self, *args: Any, **kwargs: Any) -> None:
        """Made for plugins to look at; the learner reads the experience's own dataset."""
        super().make_train_dataloader(*args, **kwargs)
        self._made = self.dataloader

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """As Avalanche's, of which plugins may make something else."""
        super().train_dataset_adaptation(**kwargs)
        self._adapted = self.adapted_dataset

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Learns a task from each experience given."""
        for plugin in self.plugins:
            if plugin not in self._first_plugins:
                check_plugin(plugin)
        self._within_train = True
        try:
            return super().train(*args, **kwargs)
        finally:
            self._within_train = False

    def eval(self, experiences: Any, **kwargs: Any) -> Any:
        """Scores experiences; those whose task comes later in the stream have no right answer yet, and a warning.

        Raises:
            DataError: nothing was learned for the task label of any of them.
        """
        listed = list(experiences) if isinstance(experiences, Iterable) else [experiences]
        if any(isinstance(_first(one.dataset.eval()), Image.Image) for one in listed):
            raise DataError(
                "The images to test on are PIL images: give the benchmark `eval_transform=backbone.transform`."
            )
        labels = set().union(*map(_task_labels, listed))
        known = {one.task_label for one in self.model.learned.values()}
        if labels - known and not self._within_train:
            named = ", ".join(map(str, sorted(labels - known)))
            if not known & labels:
                raise DataError(
                    f"No task was learned for task label {named}: there is nothing to score. Learned were "
                    f"{', '.join(map(str, sorted(known))) or 'none yet: train first, which finds what is registered'}."
                )
            log.warning("No task was learned for task label %s yet: its images count as wrong.", named)
        return super().eval(listed, **kwargs)

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        if self.dataloader is not self._made or self.adapted_dataset is not self._adapted:
            raise DataError(
                "A plugin has replaced what is to be learned from. MaskedMemory learns each experience's own images: "
                "leave the plugin out."
            )
        images, label = ExperienceImages(experience.dataset), task_label(experience)
        name = f"{self._prefix}-{experience.current_experience:03d}"
        task = self.learner.learn(name, images, config=self._config, skip_bad=self._skip_bad)
        classes = tuple(int(number) for number in task.labels)
        statistics = self.learner.registry.statistics(task.ref)
        self.model.add(Learned(task, experience.current_experience, label, classes, statistics))

    def forward(self) -> Tensor:
        """Scores of the current mini-batch; where nothing was learned for a task label, of a class that none has."""
        labels = self.mb_task_id if len(self.mbatch) > 2 else None  # where Avalanche has none, a router chooses
        scores: Tensor = self.model(self.mb_x, labels, int(self.mb_y.max()) + 1)
        if labels is None:
            return scores
        known = [one.task_label for one in self.model.learned.values()]
        unknown = ~torch.isin(labels.to(scores.device), scores.new_tensor(known, dtype=torch.int64))
        if not unknown.any():
            return scores
        return torch.cat([scores, torch.where(unknown, 0.0, NEVER)[:, None].to(scores)], dim=1)


def task_label(experience: Any) -> int:
    """An experience's task label; DataError where its images are of several."""
    labels = sorted(_task_labels(experience))
    if len(labels) > 1:
        raise DataError(
            f"Experience {experience.current_experience} has images of the task labels {labels}; a task is learned for "
            "one of them. Split it."
        )
    return labels[0]


def _task_labels(experience: Any) -> set[int]:
    """Of an experience's images, 0 where there are none; newer streams have them on the items."""
    found = getattr(experience, "task_labels", None)
    if found is None:
        found = getattr(experience.dataset, "targets_task_labels", None)
    return {int(label) for label in found or ()} or {0}


class ExperienceImages(Dataset[tuple[Any, int]]):
    """An Avalanche dataset as the learner takes it: its classes are those that occur, by their number in the stream.

    PIL images are taken as they are; of anything else, what the evaluation transform gives.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.eval() if isinstance(_first(dataset), Tensor) else dataset
        stream_targets = [int(target) for target in dataset.targets]
        numbers = sorted(set(stream_targets))
        self.classes = tuple(map(str, numbers))
        self._numbers = {number: row for row, number in enumerate(numbers)}
        self.targets = tuple(map(self._numbers.__getitem__, stream_targets))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self._dataset[index][:2]
        return image, self._numbers.get(int(target), -1)  # what the item says, for the learner to compare


def _first(dataset: Any) -> Any:
    """The image of the first item that can be had; None where none can."""
    for index in range(len(dataset)):
        try:
            return dataset[index][0]
        except Exception:  # the learner names it, or leaves it out
            continue
    return None
