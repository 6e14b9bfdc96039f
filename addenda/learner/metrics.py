"""How good a task is, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_calibration_error,
    binary_f1_score,
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from addenda.combined.predictions import LIKELY
from addenda.learner.data.labelled import Targets
from addenda.registry import probabilities


def accuracy(logits: Float[Tensor, "N C"], targets: Targets) -> float:
    """The share of images whose class is right; of multi-label targets, the share of answers."""
    right = logits.argmax(-1) == targets if targets.ndim == 1 else (logits > 0) == targets
    return right.float().mean().item()


def score(logits: Float[Tensor, "N C"], targets: Targets, labels: Sequence[str], objective: str) -> dict[str, Any]:
    """Scores logits. A temperature moves only the calibration error: for that, divide the logits by it first.

    Returns:
        `num_images`, and figures in 0..1. `registry.headline` names the one that stands for all.

        Single-label: `accuracy` (top-1), `balanced_accuracy` (mean over classes), `calibration_error` (expected, 15
        bins); `per_class` accuracies by label, None where no image is of it; `confusion`, rows true and columns
        predicted.

        Multi-label: `mean_average_precision`, over the labels that some image has; `f1_micro` of all answers at
        probability 0.5, `f1_macro`, the mean of the F1 of those labels; `exact_match`, images with every label right;
        `calibration_error` (expected, 15 bins, all answers pooled); `per_class` average precisions by label, None where
        no image has it. Where no image has any label, the means are None too.
    """
    logits, targets = logits.cpu(), targets.cpu()
    if objective == "single-label":
        return _single_label(logits, targets, labels)
    return _multi_label(logits, targets, labels)


def _single_label(logits: Float[Tensor, "N C"], targets: Int[Tensor, " N"], labels: Sequence[str]) -> dict[str, Any]:
    count = len(labels)
    if count == 1:  # torchmetrics asks for two classes; where there is one, every answer is it
        return {
            "accuracy": 1.0, "balanced_accuracy": 1.0, "calibration_error": 0.0, "per_class": {labels[0]: 1.0},
            "confusion": [[len(targets)]], "num_images": len(targets),
        }  # fmt: skip
    per_class = multiclass_accuracy(logits, targets, count, average="none")
    present = targets.bincount(minlength=count) > 0
    return {
        "accuracy": multiclass_accuracy(logits, targets, count, average="micro").item(),
        "balanced_accuracy": per_class[present].mean().item(),
        "calibration_error": multiclass_calibration_error(probabilities(logits, "single-label"), targets, count).item(),
        "per_class": {
            label: value.item() if there else None
            for label, value, there in zip(labels, per_class, present.tolist(), strict=True)
        },
        "confusion": multiclass_confusion_matrix(logits, targets, count).tolist(),
        "num_images": len(targets),
    }


def _multi_label(logits: Float[Tensor, "N C"], targets: Bool[Tensor, "N C"], labels: Sequence[str]) -> dict[str, Any]:
    chance, truth = probabilities(logits, "multi-label"), targets.int()
    answers = chance >= LIKELY
    precision: dict[str, float | None] = dict.fromkeys(labels)
    f1 = []
    for i in targets.any(0).nonzero().flatten().tolist():
        precision[labels[i]] = binary_average_precision(_ranks(logits[:, i]), truth[:, i]).item()
        f1.append(binary_f1_score(answers[:, i].int(), truth[:, i]).item())
    known = [value for value in precision.values() if value is not None]
    return {
        "mean_average_precision": sum(known) / len(known) if known else None,
        "f1_micro": binary_f1_score(answers.int().flatten(), truth.flatten()).item() if known else None,
        "f1_macro": sum(f1) / len(f1) if f1 else None,
        "exact_match": (answers == targets).all(1).float().mean().item(),
        "calibration_error": binary_calibration_error(chance.flatten(), truth.flatten()).item(),
        "per_class": precision,
        "num_images": len(targets),
    }


def _ranks(logits: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The logits' order as numbers in 0..1: the sigmoids of large logits are all 1 and have none."""
    order: Tensor = torch.unique(logits, return_inverse=True)[1]
    return order.double() / len(logits)
