"""What a task says about images: labels and probabilities, from its logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.exceptions import IntegrityError
from addenda.registry import OBJECTIVES, Task, probabilities

Prediction = list[tuple[str, float]]
"""What a task says about an image: (label, probability) pairs, best first."""

TOP = 3
"""Labels that a single-label task gives for each image, unless told."""
LIKELY = 0.5
"""The probability from which a multi-label task gives a label."""


def not_finite(task: Task) -> IntegrityError:
    """The error of a task whose answers are no numbers."""
    return IntegrityError(
        f"Task {task.ref!r} gives logits or probabilities that are NaN or infinite for these images. Ask for other "
        f"tasks by name, or have it retired: addenda tasks retire {task.ref}"
    )


def predictions(task: Task, logits: Float[Tensor, "B C"], top: int | None = None) -> list[Prediction]:
    """Reads a task's logits as labels; `predictions_of` with one task."""
    return predictions_of([task], {task.name: logits}, top)[task.name]


def predictions_of(
    tasks: Iterable[Task], logits: Mapping[str, Float[Tensor, "B C"]], top: int | None = None
) -> dict[str, list[Prediction]]:
    """Reads logits as labels; tasks of one kind and number of classes together, since each call of torch costs as much.

    Args:
        tasks: which, of those whose logits there are.
        logits: of each task by its name, as the combined model gives them, of the same images.
        top: at most so many labels for each image. None gives 3 of a single-label task, and of a multi-label one all
            that are likely.

    Returns:
        By task, for each image (label, probability) pairs, best first. A multi-label task gives the labels of
        probability 0.5 and more: none, where no label has it.
    """
    alike: dict[tuple[str, float, int], list[Task]] = {}
    for task in tasks:
        alike.setdefault((task.objective, task.temperature, len(task.labels)), []).append(task)
    found: dict[str, list[Prediction]] = {}
    for (objective, temperature, _), group in alike.items():
        single = OBJECTIVES[objective].exclusive
        count = TOP if top is None and single else top
        together = torch.stack([logits[task.name].cpu() for task in group])
        best = probabilities(together, objective, temperature).sort(dim=-1, descending=True, stable=True)
        if not best.values.isfinite().all():
            wrong = next(task for task, one in zip(group, best.values, strict=True) if not one.isfinite().all())
            raise not_finite(wrong)
        values, indices = best.values[..., :count].tolist(), best.indices[..., :count].tolist()
        for task, values_of, indices_of in zip(group, values, indices, strict=True):
            found[task.name] = [
                [(task.labels[i], value) for i, value in zip(*pairs, strict=True) if single or value >= LIKELY]
                for pairs in zip(indices_of, values_of, strict=True)
            ]
    return found
