"""How good a task is, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)


def score(logits: Float[Tensor, "N C"], targets: Int[Tensor, " N"], labels: Sequence[str]) -> dict[str, Any]:
    """Scores single-label logits.

    Returns:
        `accuracy` (top-1), `balanced_accuracy` (mean over classes), `calibration_error` (expected, 15 bins), each in
        0..1; `per_class` accuracies by label; `confusion`, rows true and columns predicted; `num_images`.
    """
    logits, count = logits.cpu(), len(labels)
    per_class = multiclass_accuracy(logits, targets, count, average="none")
    present = targets.bincount(minlength=count) > 0
    return {
        "accuracy": multiclass_accuracy(logits, targets, count, average="micro").item(),
        "balanced_accuracy": per_class[present].mean().item(),
        "calibration_error": multiclass_calibration_error(logits.softmax(-1), targets, count).item(),
        "per_class": {label: value.item() for label, value in zip(labels, per_class, strict=True)},
        "confusion": multiclass_confusion_matrix(logits, targets, count).tolist(),
        "num_images": len(targets),
    }
