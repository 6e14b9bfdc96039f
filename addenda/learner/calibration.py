"""How sure a task may be of itself: one temperature, fitted to what it did not learn from."""

from __future__ import annotations

import math

from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from addenda.learner.data.labelled import Targets
from addenda.learner.objectives import loss

BOUNDS = (0.2, 5.0)
"""The least and the largest temperature. Images that are all answered rightly would ask for 0."""


def fit_temperature(logits: Float[Tensor, "N C"], targets: Targets, objective: str) -> float:
    """The temperature of least negative log likelihood, to three decimals: what logits are divided by.

    Args:
        logits: of images that the task did not learn from.
        targets: theirs.
        objective: the task's.

    Returns:
        A number within BOUNDS; 1.0 where none is better than that, and where there are no images.

    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2; there
    without bounds.
    """
    if not len(targets):
        return 1.0
    exact, answers = logits.double().cpu(), targets.cpu()

    def negative_log_likelihood(log_temperature: float) -> float:  # convex in 1 / temperature: it has one valley
        return loss(exact / math.exp(log_temperature), answers, objective).item()

    found = minimize_scalar(
        negative_log_likelihood, bounds=tuple(map(math.log, BOUNDS)), method="bounded", options={"xatol": 1e-6}
    )
    temperature = round(math.exp(found.x), 3)
    better = negative_log_likelihood(math.log(temperature)) < negative_log_likelihood(0.0)
    return temperature if better else 1.0
