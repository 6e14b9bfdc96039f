"""Predictions: labels and probabilities from a task's logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.exceptions import IntegrityError
from addenda.registry import OBJECTIVES, Task, probabilities

Prediction = list[tuple[str, float]]
"""A task's prediction for one image: (label, probability) pairs, best first."""

TOP = 3
"""Default number of labels in a single-label prediction."""
LIKELY = 0.5
"""Minimum probability of a label in a multi-label prediction."""


def not_finite(task: Task) -> IntegrityError:
    """The error for a task whose logits or probabilities are NaN or infinite."""
    return IntegrityError(
        f"Task {task.ref!r} gives logits or probabilities that are NaN or infinite for these images. Request other "
        f"tasks by name, or retire it: addenda tasks retire {task.ref}"
    )


def predictions(task: Task, logits: Float[Tensor, "B C"], top: int | None = None) -> list[Prediction]:
    """Converts one task's logits to predictions; see `predictions_of`."""
    return predictions_of([task], {task.name: logits}, top)[task.name]


def predictions_of(
    tasks: Iterable[Task], logits: Mapping[str, Float[Tensor, "B C"]], top: int | None = None
) -> dict[str, list[Prediction]]:
    """Converts logits to predictions, batching tasks with equal objective, temperature and number of classes.

    Args:
        tasks: the tasks to convert.
        logits: logits of the same images by task name, from the combined model.
        top: maximum number of labels per image. None gives TOP for a single-label task, and every label above the
            threshold for a multi-label task.

    Returns:
        For each task and image, (label, probability) pairs, best first. A multi-label prediction contains only labels
        with a probability of at least LIKELY, possibly none.
    """
    groups: dict[tuple[str, float, int], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.objective, task.temperature, len(task.labels)), []).append(task)
    results: dict[str, list[Prediction]] = {}
    for (objective, temperature, _), group in groups.items():
        single = OBJECTIVES[objective].exclusive
        count = TOP if top is None and single else top
        stacked = torch.stack([logits[task.name].cpu() for task in group])
        best = probabilities(stacked, objective, temperature).sort(dim=-1, descending=True, stable=True)
        if not best.values.isfinite().all():
            values_by_task = zip(group, best.values, strict=True)
            raise not_finite(next(task for task, values in values_by_task if not values.isfinite().all()))
        top_values, top_indices = best.values[..., :count].tolist(), best.indices[..., :count].tolist()
        for task, task_values, task_indices in zip(group, top_values, top_indices, strict=True):
            results[task.name] = [
                [(task.labels[i], value) for i, value in zip(*pairs, strict=True) if single or value >= LIKELY]
                for pairs in zip(task_indices, task_values, strict=True)
            ]
    return results
