"""What targets are and how they are learned and scored: a class for each objective, all of it in that class."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor

from addenda.learner.objectives.multi_label import MultiLabel
from addenda.learner.objectives.objective import ClassWeights, Groups, LinearProbe, Objective, Targets
from addenda.learner.objectives.single_label import SingleLabel

__all__ = [
    "OBJECTIVES",
    "ClassWeights",
    "Groups",
    "LinearProbe",
    "MultiLabel",
    "Objective",
    "SingleLabel",
    "Targets",
    "accuracy",
    "objective_of",
]

OBJECTIVES: Mapping[str, Objective] = MappingProxyType({one.name: one for one in (SingleLabel(), MultiLabel())})


def objective_of(targets: Tensor) -> Objective:
    """The objective whose form targets have: one and no other, else it is a mistake in the objectives' `has_form`."""
    (found,) = (one for one in OBJECTIVES.values() if one.has_form(targets))
    return found


def accuracy(logits: Float[Tensor, "N C"], targets: Targets) -> float:
    """The share of answers that are right, whatever the objective."""
    return objective_of(targets).accuracy(logits, targets)
