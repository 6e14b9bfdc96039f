"""Addenda as an Avalanche strategy: training on an experience registers a task."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import strategy_plugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.plugins.evaluation import EvaluationPlugin, default_evaluator
from avalanche.training.templates import SupervisedTemplate
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from addenda.backbones import FrozenBackbone
from addenda.combined import CombinedModel, Router, TaskLogits, joined_statistics
from addenda.exceptions import DataError, NameTakenError, RegistryError, RetiredError
from addenda.learner import ActivationCache, LearnConfig, Learner
from addenda.registry import FeatureStatistics, Registry, Task

log = logging.getLogger(__name__)

NEVER = -1e4
"""Score of a class that no selected task has; Avalanche's own padding of 0 would win over an all-negative head."""


STEPS = ("training_epoch", "training_iteration", "forward", "backward", "update")
"""Steps of Avalanche's training loop, which `MaskedMemory` does not run."""

PLUGIN_BASES = tuple(vars(strategy_plugin).values())
"""Avalanche's base classes of plugins."""


class LearnedTask(NamedTuple):
    """A task of the stream."""

    task: Task  # as registered
    number: int  # of the experience
    task_label: int  # of the experience; 0 if the benchmark has none
    classes: tuple[int, ...]  # class indices of the stream, by row of the head
    statistics: FeatureStatistics | None  # routing statistics of its training images


class StreamClassifier(nn.Module):
    """The combined model as a classifier over all classes of the stream.

    An image is classified by the task with its task label. Without task labels, or if several tasks share a label, a
    router weights these tasks, and the probability of a class is summed over the tasks that have it. If there is such a
    class, the probabilities are averaged, in logarithms, with those of classifiers of the images of all tasks by class.
    """

    def __init__(self, backbone: FrozenBackbone) -> None:
        super().__init__()
        self.combined = CombinedModel(backbone, [])
        self.learned: dict[str, LearnedTask] = {}
        self._routers: dict[tuple[tuple[str, ...], bool], Router] = {}

    @property
    def task_labels(self) -> set[int]:
        """The task labels of the learned tasks."""
        return {entry.task_label for entry in self.learned.values()}

    def add(self, learned: LearnedTask) -> None:
        """Adds a task to the combined model."""
        self.learned[learned.task.name] = learned
        self.combined = self.combined.with_tasks([entry.task for entry in self.learned.values()])
        self._routers.clear()

    def forward(
        self, images: Float[Tensor, "B 3 H W"], task_labels: Int[Tensor, " B"] | None = None, num_classes: int = 0
    ) -> Float[Tensor, "B C"]:
        """Log-probabilities of at least `num_classes` classes; NEVER for a class that no selected task has."""
        return self.score(self.combined(images, features=True), task_labels, num_classes).to(images.device)

    def score(
        self, outputs: TaskLogits, task_labels: Int[Tensor, " B"] | None = None, num_classes: int = 0
    ) -> Float[Tensor, "B C"]:
        """Like `forward`, from outputs of the combined model that include the backbone's features; on the CPU."""
        assert outputs.features is not None
        count, learned = len(outputs.features), self.learned.values()
        width = max([num_classes, *(max(entry.classes) + 1 for entry in learned)])
        scores = torch.full((count, width), NEVER, dtype=torch.float32, device="cpu")
        labels = torch.zeros(count, dtype=torch.int64, device="cpu") if task_labels is None else task_labels.cpu()
        for label in labels.unique():
            rows = labels == label
            selected = {entry.task.name: entry for entry in learned if task_labels is None or entry.task_label == label}
            log_probs = {
                name: (outputs[name].cpu()[rows] / entry.task.temperature).log_softmax(1)
                for name, entry in selected.items()
            }
            if len(selected) > 1:
                log_probs = self._router(tuple(selected)).routed(log_probs, outputs.features[rows])
            selected_scores = scores[rows]
            for name, values in log_probs.items():
                columns = list(selected[name].classes)
                summed = selected_scores[:, columns].logaddexp(values.float())
                selected_scores[:, columns] = summed.clamp(min=NEVER / 2)
            classes = sorted({number for entry in selected.values() for number in entry.classes})
            if len(classes) < sum(len(entry.classes) for entry in selected.values()):
                across = self._router(tuple(selected), classes).class_scores(outputs.features[rows])
                mean = (selected_scores[:, classes] + across["combined"][""].float()) / 2
                selected_scores[:, classes] = mean.log_softmax(1).clamp(min=NEVER / 2)
            scores[rows] = selected_scores
        return scores

    def logits(self, images: Float[Tensor, "B 3 H W"], number: int) -> Float[Tensor, "B C"]:
        """Logits of the task of experience `number`, computed by the combined model of all tasks."""
        (name,) = [name for name, entry in self.learned.items() if entry.number == number]
        return self.combined(images)[name].cpu()

    def _router(self, names: tuple[str, ...], classes: Sequence[int] = ()) -> Router:
        """A router over tasks; given the classes that they share, over one task of these classes, named ""."""
        if (names, bool(classes)) not in self._routers:
            known = {name: entry for name in names if (entry := self.learned[name].statistics) is not None}
            if missing := sorted(set(names) - set(known)):
                raise RegistryError(
                    f"The stream has no task labels, and task {missing[0]!r} has no routing statistics because it has "
                    "too many classes; give the benchmark task labels."
                )
            if classes:
                parts = [(known[name], list(map(classes.index, self.learned[name].classes))) for name in names]
                known = {"": joined_statistics(parts, len(classes))}
            self._routers[names, bool(classes)] = Router(known)
        return self._routers[names, bool(classes)]


class MaskedMemory(SupervisedTemplate):  # type: ignore[misc]
    """An Avalanche strategy for `Learner`: training on an experience learns and registers a task.

    With task labels, an image is classified by its task; without, or if experiences share a label, by a router. The
    registry is the checkpoint: tasks of a repeated stream are found there, and an interrupted experience resumes from
    its last epoch.

    Args:
        backbone: the frozen backbone. Test images must be transformed by `backbone.transform`, the benchmark's
            `eval_transform`. Training images are either PIL images (`train_transform=None`), of which random views are
            made according to `config`, or are transformed by `eval_transform` too.
        registry: stores the tasks.
        config: settings of each learning run.
        prefix: experience 3 becomes the task `prefix-003`.
        eval_mb_size: images per evaluation mini-batch.
        plugins: Avalanche plugins that only observe; Avalanche's epochs, iterations and backward passes do not occur.
        evaluator: Avalanche's evaluation plugin.
        eval_every: 0 evaluates the streams passed to `train` before and after each experience, which Avalanche's
            forward transfer needs.
        cache: the activation cache.
        skip_bad: skip images that cannot be loaded.

    Raises:
        DataError: a plugin would change how the strategy trains.
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
            model=StreamClassifier(backbone),
            optimizer=placeholder,  # Avalanche requires one; the learner has its own
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
        """Does nothing; the learner creates the parameters of a new task."""

    def make_train_dataloader(self, *args: Any, **kwargs: Any) -> None:
        """Makes the data loader for plugins; the learner itself reads the dataset of the experience."""
        super().make_train_dataloader(*args, **kwargs)
        self._made_dataloader = self.dataloader

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Like Avalanche's; remembers the dataset, to detect a plugin that replaces it."""
        super().train_dataset_adaptation(**kwargs)
        self._made_dataset = self.adapted_dataset

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Learns one task from each experience."""
        for plugin in self.plugins:
            if plugin not in self._first_plugins:
                check_plugin(plugin)
        self._within_train = True
        try:
            return super().train(*args, **kwargs)
        finally:
            self._within_train = False

    def eval(self, experiences: Any, **kwargs: Any) -> Any:
        """Evaluates experiences; images of tasks not learned yet count as errors, with a warning.

        Raises:
            DataError: no task was learned for any of the task labels.
        """
        listed = list(experiences) if isinstance(experiences, Iterable) else [experiences]
        if any(isinstance(_first_image(experience.dataset.eval()), Image.Image) for experience in listed):
            raise DataError("The test images are PIL images; give the benchmark `eval_transform=backbone.transform`.")
        labels, known = set().union(*map(_task_labels, listed)), self.model.task_labels
        if labels - known and not self._within_train:
            unknown, learned = (", ".join(map(str, sorted(some))) for some in (labels - known, known))
            if not known & labels:
                raise DataError(
                    f"No task was learned for task label {unknown}, so there is nothing to evaluate. "
                    + (f"Learned labels: {learned}." if learned else "Call train first; it reuses registered tasks.")
                )
            log.warning("No task was learned yet for task label %s; such images count as errors.", unknown)
        return super().eval(listed, **kwargs)

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        if self.dataloader is not self._made_dataloader or self.adapted_dataset is not self._made_dataset:
            raise DataError(
                "A plugin has replaced the training data, but MaskedMemory learns from the experience's own images; "
                "remove the plugin."
            )
        self._check_transform(experience.dataset)
        images, label = ExperienceImages(experience.dataset), task_label(experience)
        name = f"{self._prefix}-{experience.current_experience:03d}"
        try:
            task = self.learner.learn(name, images, config=self._config, skip_bad=self._skip_bad)
        except (NameTakenError, RetiredError) as error:
            raise RegistryError(
                f"Task {name!r} is registered from other images, settings or numerics, or was retired. Give "
                "MaskedMemory another `prefix`, or a registry of its own."
            ) from error
        self.clock.train_iterations += 1  # the steps of metrics count experiences
        classes = tuple(int(number) for number in task.labels)
        statistics = self.learner.registry.statistics(task.ref)
        self.model.add(LearnedTask(task, experience.current_experience, label, classes, statistics))

    def _check_transform(self, dataset: Any) -> None:
        """Warns if test images would not be transformed like those that the learner reads."""
        image, prepared = _first_image(dataset), _first_image(dataset.eval())
        if isinstance(image, Image.Image) and isinstance(prepared, Tensor):
            expected = self.learner.backbone.transform(image)
            if prepared.shape != expected.shape or not torch.allclose(prepared.to(expected), expected, atol=1e-3):
                log.warning("The benchmark's eval_transform is not `backbone.transform`; test scores will be too low.")

    def forward(self) -> Tensor:
        """Scores of the current mini-batch; images with an unknown task label get an extra class that no image has."""
        # Without task labels a router chooses; an item's third element may be something else.
        labels = self.mb_task_id if hasattr(self.experience.dataset, "targets_task_labels") else None
        scores: Tensor = self.model(self.mb_x, labels, int(self.mb_y.max()) + 1)
        if labels is None:
            return scores
        known = scores.new_tensor(list(self.model.task_labels), dtype=torch.int64)
        unknown = ~torch.isin(labels.to(scores.device), known)
        if not unknown.any():
            return scores
        return torch.cat([scores, torch.where(unknown, 0.0, NEVER)[:, None].to(scores)], dim=1)


def task_label(experience: Any) -> int:
    """The task label of an experience; DataError if its images have several."""
    labels = sorted(_task_labels(experience))
    if len(labels) > 1:
        raise DataError(
            f"Experience {experience.current_experience} has images of the task labels {labels}, but a task needs a "
            "single label; split the experience."
        )
    return labels[0]


def _task_labels(experience: Any) -> set[int]:
    """Task labels of an experience's images, {0} if it has none; newer streams store them on the items."""
    labels = getattr(experience, "task_labels", None)
    if labels is None:
        labels = getattr(experience.dataset, "targets_task_labels", None)
    return {int(label) for label in labels or ()} or {0}


def check_plugin(plugin: Any) -> None:
    """Raises DataError if a plugin would change training or uses a hook that is never called."""
    if isinstance(plugin, EvaluationPlugin | Clock):
        return
    kind, name = type(plugin), type(plugin).__name__
    if any(b.__module__.startswith("avalanche.training.plugins.") and b not in PLUGIN_BASES for b in kind.mro()):
        raise DataError(
            f"{name} changes how a strategy trains. MaskedMemory has its own training and does not forget earlier "
            "tasks; remove the plugin."
        )
    for hook in (f"{when}_{step}" for step in STEPS for when in ("before", "after")):
        if getattr(kind, hook, None) is not getattr(SupervisedPlugin, hook):
            raise DataError(
                f"{name} uses the hook `{hook}`, which MaskedMemory never calls because it does not run Avalanche's "
                "training loop; remove the plugin."
            )


class ExperienceImages(Dataset[tuple[Any, int]]):
    """An Avalanche dataset for the learner; its classes are the class indices of the stream that occur in it.

    PIL images are used as they are; anything else goes through the evaluation transform.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "targets"):
            raise DataError(
                "A dataset of the benchmark has no attribute `targets`; make it with Avalanche's "
                "`as_classification_dataset`."
            )
        self._dataset = dataset.eval() if isinstance(_first_image(dataset), Tensor) else dataset
        stream_targets = [int(target) for target in dataset.targets]
        numbers = sorted(set(stream_targets))
        self.classes = tuple(map(str, numbers))
        self._rows = {number: row for row, number in enumerate(numbers)}
        self.targets = tuple(map(self._rows.__getitem__, stream_targets))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self._dataset[index][:2]
        return image, self._rows.get(int(target), -1)  # the item's own target, which the learner compares


def _first_image(dataset: Any) -> Any:
    """The image of the first item that can be loaded; None if there is none."""
    for index in range(len(dataset)):
        try:
            return dataset[index][0]
        except Exception:  # the learner reports it or skips it
            continue
    return None
