"""What targets are and how they are learned and scored: a class for each objective, all of it in that class."""

from collections.abc import Mapping
from types import MappingProxyType

from addenda.learner.objectives.multi_label import MultiLabel
from addenda.learner.objectives.objective import ClassWeights, Objective, Regression, Targets
from addenda.learner.objectives.single_label import SingleLabel

__all__ = [
    "OBJECTIVES",
    "ClassWeights",
    "MultiLabel",
    "Objective",
    "Regression",
    "SingleLabel",
    "Targets",
    "objective_of",
]

OBJECTIVES: Mapping[str, Objective] = MappingProxyType({one.name: one for one in (SingleLabel(), MultiLabel())})


def objective_of(targets: Targets) -> Objective:
    """The objective whose form targets have."""
    return next(one for one in OBJECTIVES.values() if one.has_form(targets))
