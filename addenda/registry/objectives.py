"""What a task's logits mean: its objective, and how they become probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

OBJECTIVES = ("single-label", "multi-label")
"""One label for each image, by a softmax; any number of labels, each by a sigmoid of its own."""

_HEADLINES = {"single-label": "accuracy", "multi-label": "mean_average_precision"}


def headline(objective: str) -> str:
    """The one metric that stands for a task of this objective: a key of what `learner.metrics.score` gives."""
    return _HEADLINES[objective]


def score_of(objective: str, metrics: Mapping[str, Any]) -> float | None:
    """The headline metric on the test images, else on the validation part; None where neither was measured."""
    for part in ("test", "validation"):
        value = (metrics.get(part) or {}).get(headline(objective))
        if value is not None:
            return float(value)
    return None


def probabilities(logits: Float[Tensor, "*B C"], objective: str, temperature: float = 1.0) -> Float[Tensor, "*B C"]:
    """Turns logits into probabilities, for every part of the package.

    Args:
        logits: as a task gives them.
        objective: one of OBJECTIVES.
        temperature: what logits are divided by first; above 1 it makes a task less sure of itself.

    Returns:
        Of single-label logits a softmax, which sums to 1; of multi-label ones a sigmoid of each.
    """
    scaled = logits / temperature
    if objective == "single-label":
        return scaled.softmax(-1)
    # torch's sigmoid has other bits at a tensor's end than elsewhere: they would depend on an image's place in a batch.
    return torch.stack([scaled, torch.zeros_like(scaled)], -1).softmax(-1)[..., 0].contiguous()
