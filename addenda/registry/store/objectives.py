"""Objectives, and the headline metric of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class ObjectiveMeaning(NamedTuple):
    """The meaning of an objective."""

    headline: str  # key of the headline metric
    exclusive: bool  # True: one label per image (softmax); False: any number of labels (a sigmoid each)


MEANINGS = {
    "single-label": ObjectiveMeaning("accuracy", exclusive=True),
    "multi-label": ObjectiveMeaning("mean_average_precision", exclusive=False),
}


def headline(objective: str) -> str:
    """The name of an objective's headline metric."""
    return MEANINGS[objective].headline


BASELINES = {"linear_probe": "linear probe", "layer_probe": "layer probe", "regression": "linear probe"}
"""Baselines measured on a task's data, by their key in the metrics; version 0.1 used the last key."""


def baselines(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics of a task's baselines, by display name."""
    return {name: metrics[key] for key, name in BASELINES.items() if metrics.get(key)}


def score_of(objective: str, metrics: Mapping[str, Any]) -> float | None:
    """The headline metric on the test split, or else on the validation split; None if neither was measured."""
    for split in ("test", "validation"):
        value = (metrics.get(split) or {}).get(headline(objective))
        if value is not None:
            return float(value)
    return None
