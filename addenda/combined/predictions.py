"""What a task says about images: labels and probabilities, from its logits."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from addenda.registry import Task

TOP = 3
"""Labels that a single-label task gives for each image, unless told."""
LIKELY = 0.5
"""The probability from which a multi-label task gives a label."""


def predictions(task: Task, logits: Float[Tensor, "B C"], top: int | None = None) -> list[list[tuple[str, float]]]:
    """Reads a task's logits as labels.

    Args:
        task: whose logits they are.
        logits: as the combined model gives them.
        top: at most so many labels for each image. None gives 3 of a single-label task, and of a multi-label one all
            that are likely.

    Returns:
        For each image (label, probability) pairs, best first. A multi-label task gives the labels of probability 0.5
        and more: none, where no label has it.
    """
    single = task.objective == "single-label"
    count = TOP if top is None and single else top
    best = task.probabilities(logits.cpu()).sort(dim=-1, descending=True, stable=True)
    return [
        [(task.labels[i], value) for i, value in zip(indices, values, strict=True) if single or value >= LIKELY]
        for values, indices in zip(best.values[:, :count].tolist(), best.indices[:, :count].tolist(), strict=True)
    ]
