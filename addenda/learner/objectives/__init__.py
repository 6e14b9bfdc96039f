"""Objectives, single-label and multi-label: the form of targets, losses, metrics, splits and probes of each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor

from addenda.learner.objectives.multi_label import MultiLabel
from addenda.learner.objectives.objective import Groups, LayerFits, LinearProbe, Objective, Targets, Weights
from addenda.learner.objectives.single_label import SingleLabel

__all__ = [
    "OBJECTIVES",
    "Groups",
    "LayerFits",
    "LinearProbe",
    "MultiLabel",
    "Objective",
    "SingleLabel",
    "Targets",
    "Weights",
    "accuracy",
    "objective_of",
]

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {objective.name: objective for objective in (SingleLabel(), MultiLabel())}
)


def objective_of(targets: Tensor) -> Objective:
    """The one objective whose form the targets have."""
    (objective,) = (candidate for candidate in OBJECTIVES.values() if candidate.has_form(targets))
    return objective


def accuracy(logits: Float[Tensor, "N C"], targets: Targets) -> float:
    """The share of correct predictions, under the objective of the targets."""
    return objective_of(targets).accuracy(logits, targets)
