"""The honest rival: an L2 logistic regression on the backbone's own feature, by scikit-learn."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torch import Tensor

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Values of scikit-learn's C to choose from."""


@dataclass(frozen=True)
class Regression:
    """A fitted logistic regression: logits are feature @ weight.T + bias.

    Attributes:
        weight: one row for each class.
        bias: one number for each class.
        strength: C, the inverse of the L2 penalty on the sum of losses.
    """

    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    strength: float


def choose_strength(features: Float[Tensor, "N D"], targets: Int[Tensor, " N"], seed: int) -> float:
    """The C of least cross-validated log loss, 5 folds or as many as the smallest class allows."""
    x, y = features.double().numpy(), targets.numpy()
    folds = min(5, int(np.bincount(y).min()))
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    scores: list[float] = []
    for strength in STRENGTHS:  # from the strongest penalty on; past the best, weaker ones only get slower and worse
        scores.append(cross_val_score(_model(strength), x, y, cv=splitter, scoring="neg_log_loss").mean())
        if len(scores) > 2 and scores[-1] < scores[-2] < scores[-3]:
            break
    return STRENGTHS[int(np.argmax(scores))]


def fit_regression(features: Float[Tensor, "N D"], targets: Int[Tensor, " N"], strength: float) -> Regression:
    """Fits to convergence."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        fitted = _model(strength).fit(features.double().numpy(), targets.numpy())
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # two classes are fitted as one: half of the margin to each gives the same probabilities
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Regression(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), strength)


def _model(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=20_000, tol=1e-5)
