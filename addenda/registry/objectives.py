"""What a task's logits mean: its objective, and how they become probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Objective(NamedTuple):
    """What an objective means, wherever logits are read.

    Attributes:
        headline: the one metric that stands for a task of this objective: a key of what `learner.metrics.score` gives.
        exclusive: whether each image has one label, by a softmax; else any number of labels, each by a sigmoid of its
            own.
    """

    headline: str
    exclusive: bool


OBJECTIVES = {
    "single-label": Objective("accuracy", exclusive=True),
    "multi-label": Objective("mean_average_precision", exclusive=False),
}


def headline(objective: str) -> str:
    """The one metric that stands for a task of this objective."""
    return OBJECTIVES[objective].headline


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
        Of an exclusive objective's logits a softmax, which sums to 1; of another's a sigmoid of each.
    """
    scaled = logits / temperature
    if OBJECTIVES[objective].exclusive:
        return scaled.softmax(-1)
    # torch's sigmoid has other bits at a tensor's end than elsewhere: they would depend on an image's place in a batch.
    return torch.stack([scaled, torch.zeros_like(scaled)], -1).softmax(-1)[..., 0].contiguous()
