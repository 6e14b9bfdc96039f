"""Predictions: labels and probabilities from the logits of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.exceptions import IntegrityError
from addenda.registry import MEANINGS, Task, probabilities

Prediction = list[tuple[str, float]]
"""A task's prediction for one image: (label, probability) pairs, best first."""

TOP = 3
"""Default number of labels in a single-label prediction."""
LIKELY = 0.5
"""Default minimum probability of a label in a multi-label prediction."""


def not_finite(task: Task) -> IntegrityError:
    """The error for a task whose logits or probabilities are NaN or infinite."""
    return IntegrityError(
        f"Task {task.ref!r} gives logits or probabilities that are NaN or infinite for these images. Request other "
        f"tasks by name, or retire it: addenda tasks retire {task.ref}"
    )


class TaskGroup:
    """Tasks with equal objective and number of labels, whose predictions are computed at once."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self._objective, self._exclusive = tasks[0].objective, MEANINGS[tasks[0].objective].exclusive
        temperatures = [task.temperature for task in tasks]
        self._temperatures = torch.tensor(temperatures, dtype=torch.float64, device="cpu")[:, None, None]

    def best(
        self, logits: Float[Tensor, "T B C"], top: int | None = None, min_probability: float | None = None
    ) -> Iterator[tuple[Task, list[list[float]], list[list[int]]]]:
        """Each task with the probabilities and indices of the best labels for each image; see `predictions_of`."""
        count = TOP if self._exclusive and top is None and min_probability is None else top
        least = min_probability if min_probability is not None else 0 if self._exclusive else LIKELY
        values = probabilities(logits, self._objective, self._temperatures.to(logits.dtype))
        best = values.sort(descending=True, stable=True)
        finite = best.values.isfinite().flatten(1).all(1)
        if not finite.all():
            raise not_finite(self.tasks[finite.tolist().index(False)])
        best_values, best_indices = best.values[..., :count].tolist(), best.indices[..., :count].tolist()
        if least > 0:
            best_values = [[[v for v in values if v >= least] for values in images] for images in best_values]
        return zip(self.tasks, best_values, best_indices, strict=True)


def task_groups(tasks: Iterable[Task]) -> list[TaskGroup]:
    """Divides tasks into groups."""
    groups: dict[tuple[str, int], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.objective, len(task.labels)), []).append(task)
    return [TaskGroup(group) for group in groups.values()]


def predictions(task: Task, logits: Float[Tensor, "B C"], top: int | None = None) -> list[Prediction]:
    """Converts one task's logits to predictions; see `predictions_of`."""
    return predictions_of([task], {task.name: logits}, top)[task.name]


def predictions_of(
    tasks: Iterable[Task],
    logits: Mapping[str, Float[Tensor, "B C"]],
    top: int | None = None,
    min_probability: float | None = None,
) -> dict[str, list[Prediction]]:
    """Converts logits to predictions.

    Args:
        tasks: the tasks to convert.
        logits: logits of the same images by task name, from the combined model.
        top: maximum number of labels per image. None gives every label if `min_probability` is given or the task is
            multi-label, or else TOP.
        min_probability: minimum probability of a label. None gives LIKELY for a multi-label task, or else 0.

    Returns:
        For each task and image, (label, probability) pairs, best first; none if no label is probable enough.

    Raises:
        IntegrityError: a probability is NaN or infinite.
    """
    results: dict[str, list[Prediction]] = {}
    for group in task_groups(tasks):
        stacked = torch.stack([logits[task.name] for task in group.tasks]).cpu()
        for task, values, indices in group.best(stacked, top, min_probability):
            results[task.name] = [
                [(task.labels[i], value) for value, i in zip(*pairs, strict=False)]  # there may be fewer values
                for pairs in zip(values, indices, strict=True)
            ]
    return results
