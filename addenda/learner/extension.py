"""Which registered tasks a new one might extend: those whose own feature tells something about its images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from addenda.learner.activations import Activations
from addenda.learner.objectives import Regression
from addenda.registry import Task

TRIED = 3
"""Tasks that are tried by training, at most."""


def promising(
    activations: Activations,
    pool: Sequence[Task],
    regression: Regression,
    train: Int[Tensor, " N"],
    validation: Int[Tensor, " M"],
) -> list[Task]:
    """The tasks of a pool worth trying, the best first.

    A task is ranked by the validation loss of a logistic regression that reads its token's final feature beside the
    backbone's pooled one. Those that make it no better than the pooled feature alone are left out; of equals the first
    by name comes first, in whatever order they were registered.

    Args:
        activations: of the new task's images.
        pool: registered tasks with a token, on the same backbone.
        regression: on the pooled feature of the training part.
        train: images to fit to.
        validation: images to rank by.
    """
    targets, pooled, objective = activations.targets, activations.pooled, activations.objective

    def reached(fitted: Regression, features: Tensor) -> float:
        logits = F.linear(features[validation], fitted.weight, fitted.bias)
        return objective.loss(logits, targets[validation]).item()

    bar = reached(regression, pooled)
    ranked = []
    for task, feature in zip(pool, activations.features(pool), strict=True):
        both = torch.cat([pooled, feature], dim=1)
        found = reached(objective.fit_regression(both[train], targets[train], regression.strength), both)
        if found < bar:
            ranked.append((found, task.name, task))
    return [task for *_, task in sorted(ranked)[:TRIED]]
