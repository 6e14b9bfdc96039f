"""The honest rival: an L2 logistic regression on the backbone's own feature, by scikit-learn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from torch import Tensor

from addenda.learner.data.labelled import Targets

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Values of scikit-learn's C to choose from."""

Array = NDArray[np.float64]


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


def choose_strength(features: Float[Tensor, "N D"], targets: Targets, seed: int) -> float:
    """The C of least cross-validated log loss, 5 folds or as many as the smallest class allows.

    Of multi-label targets one C for all labels, by the mean log loss of all their answers, in 5 folds. A label that all
    images to learn from in a fold have, or none, is answered there as `fit_regression` answers it.
    """
    if _is_one_class(targets):
        return 1.0
    x = features.double().numpy()
    losses = _multi_label_losses(x, targets, seed) if targets.ndim == 2 else _single_label_losses(x, targets, seed)
    tried: list[float] = []
    for mean_loss in losses:  # from the strongest penalty on; past the best, weaker ones only get slower and worse
        tried.append(mean_loss)
        if len(tried) > 2 and tried[-1] > tried[-2] > tried[-3]:
            break
    return STRENGTHS[int(np.argmin(tried))]


def fit_regression(features: Float[Tensor, "N D"], targets: Targets, strength: float) -> Regression:
    """Fits to convergence; of multi-label targets one regression for each label against the rest.

    A label that every image has, or none, has nothing to be told by: its weight is 0, and its bias answers with
    (images that have it + 1) / (images + 2), Laplace's rule. So is a class that is the only one: its weight is 0.
    """
    x = features.double().numpy()
    if _is_one_class(targets):
        weight, bias = np.zeros((1, x.shape[1])), np.zeros(1)
    elif targets.ndim == 2:
        rows = [_Binary(strength).fit(x, column) for column in targets.T.numpy()]
        weight, bias = np.stack([row.weight for row in rows]), np.array([row.bias for row in rows])
    else:
        fitted = _fit(_model(strength), x, targets.numpy())
        weight, bias = fitted.coef_, fitted.intercept_
        if len(weight) == 1:  # two classes are fitted as one: half of the margin to each gives the same probabilities
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Regression(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), strength)


def _is_one_class(targets: Targets) -> bool:
    return targets.ndim == 1 and not targets.any()


def _single_label_losses(x: Array, targets: Int[Tensor, " N"], seed: int) -> Iterator[float]:
    """Mean log loss over the folds, strength by strength."""
    y = targets.numpy()
    splitter = StratifiedKFold(min(5, int(np.bincount(y).min())), shuffle=True, random_state=seed)
    for strength in STRENGTHS:
        yield -cross_val_score(_model(strength), x, y, cv=splitter, scoring="neg_log_loss").mean()


def _multi_label_losses(x: Array, targets: Bool[Tensor, "N C"], seed: int) -> Iterator[float]:
    """Mean binary log loss of all answers, strength by strength; each fit starts from the last one's solution."""
    y = targets.numpy()
    folds = list(KFold(min(5, len(y)), shuffle=True, random_state=seed).split(x))
    models = [[_Binary(STRENGTHS[0]) for _ in range(y.shape[1])] for _ in folds]
    for strength in STRENGTHS:
        total = 0.0
        for (train, held_out), row in zip(folds, models, strict=True):
            for label, model in enumerate(row):
                model.strength = strength
                model.fit(x[train], y[train, label])
                margin = x[held_out] @ model.weight + model.bias
                total += np.logaddexp(0, np.where(y[held_out, label], -margin, margin)).sum()
        yield total / y.size


class _Binary:
    """One label against the rest; fitted again, it starts from where it was."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._model = _model(strength, warm_start=True)

    def fit(self, x: Array, y: NDArray[np.bool_]) -> _Binary:
        if y.all() or not y.any():
            self.weight, self.bias = np.zeros(x.shape[1]), math.log((y.sum() + 1) / ((~y).sum() + 1))
            return self
        fitted = _fit(self._model.set_params(C=self.strength), x, y)
        self.weight, self.bias = fitted.coef_[0], fitted.intercept_[0]
        return self


def _fit(model: LogisticRegression, x: Array, y: NDArray[np.generic]) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        return model.fit(x, y)


def _model(strength: float, warm_start: bool = False) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=20_000, tol=1e-5, warm_start=warm_start)
