"""What a task's logits mean: its objective, and the one metric that stands for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class ObjectiveMeaning(NamedTuple):
    """What an objective means, wherever logits are read."""

    headline: str  # a key of what the learner's objective scores
    exclusive: bool  # one label an image, by a softmax; else any number of labels, each by a sigmoid of its own


OBJECTIVES = {
    "single-label": ObjectiveMeaning("accuracy", exclusive=True),
    "multi-label": ObjectiveMeaning("mean_average_precision", exclusive=False),
}


def headline(objective: str) -> str:
    """The one metric that stands for a task of this objective."""
    return OBJECTIVES[objective].headline


BASELINES = {"linear_probe": "linear probe", "layer_probe": "layer probe", "regression": "linear probe"}
"""What is measured beside a task on the same images, by its name in metrics; the last is version 0.1's."""


def baselines(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was measured beside a task, by what it is called."""
    return {called: metrics[key] for key, called in BASELINES.items() if metrics.get(key)}


def score_of(objective: str, metrics: Mapping[str, Any]) -> float | None:
    """The headline metric on the test images, else on the validation part; None where neither was measured."""
    for part in ("test", "validation"):
        value = (metrics.get(part) or {}).get(headline(objective))
        if value is not None:
            return float(value)
    return None
