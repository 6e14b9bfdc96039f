"""Linear classifiers in closed form from summed features, with strengths and temperatures tuned on a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64
from torch import Tensor

from addenda.combined.routing.statistics import Moments

PENALTIES = tuple(10.0**power for power in np.arange(-4, 2.1, 0.5))
"""Candidate penalties of the ridge regression, relative to the mean diagonal of the Gram matrix."""
SHRINKAGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Candidate shrinkages of a covariance towards a multiple of the identity."""


class Linear(NamedTuple):
    """A linear classifier."""

    weights: Float64[Tensor, "F C"]
    bias: Float64[Tensor, " C"]


def tuned(
    fit: Callable[[Moments, Sequence[float]], list[Linear]],
    strengths: Sequence[float],
    all_images: Moments,
    training: Moments,
    sample: Float64[Tensor, "K F"],
    targets: Int64[Tensor, " K"],
) -> tuple[Linear, Float64[Tensor, "K C"]]:
    """Selects a strength and a temperature by log loss on the sample, which `training` lacks; refits to all images.

    Also returns the scaled scores of the sample by the fit to `training`. Without a sample, the strength is the last
    one, and the temperature gives the class means, on average, a probability of about C / (C + 1).
    """
    if not len(sample):
        (weights, bias), (means, _) = fit(all_images, strengths[-1:])[0], gaussians(all_images)
        scores = means @ weights + bias
        scale = max(scores.std().item(), 1e-12) if scores.numel() > 1 else 1.0
        labels = torch.arange(len(scores), dtype=torch.int64, device="cpu")
        temperature = scale * best_temperature(scores / scale, labels)[1]
        return Linear(weights / temperature, bias / temperature), sample @ weights
    tried = []
    for strength, (weights, bias) in zip(strengths, fit(training, strengths), strict=True):
        scores = sample @ weights + bias
        tried.append((*best_temperature(scores, targets), strength, scores))
    _, temperature, strength, scores = min(tried, key=lambda row: row[0])
    weights, bias = fit(all_images, (strength,))[0]
    return Linear(weights / temperature, bias / temperature), scores / temperature


def ridge(moments: Moments, penalties: Sequence[float]) -> list[Linear]:
    """Ridge regressions of class indicators, one per penalty."""
    values, vectors = torch.linalg.eigh(moments.gram)
    scale, rotated = moments.gram.diagonal().mean(), vectors.T @ moments.sums.T
    bias = torch.zeros(len(moments.counts), dtype=torch.float64, device="cpu")
    return [
        Linear(vectors @ (rotated / (values.clamp(min=0) + penalty * scale)[:, None]), bias) for penalty in penalties
    ]


def discriminant(moments: Moments, shrinkages: Sequence[float]) -> list[Linear]:
    """Linear discriminants, one per shrinkage."""
    means, within = gaussians(moments)
    values, vectors = torch.linalg.eigh(within)
    rotated, linear = means @ vectors, []
    for shrinkage in shrinkages:
        shrunk = (1 - shrinkage) * values.clamp(min=0) + shrinkage * values.mean()
        shrunk = torch.where(shrunk > 0, shrunk, 1.0)  # without any spread within classes: nearest mean
        weights = vectors @ (rotated / shrunk).T
        linear.append(Linear(weights, -0.5 * (means * weights.T).sum(1)))
    return linear


def gaussians(moments: Moments) -> tuple[Float64[Tensor, "C F"], Float64[Tensor, "F F"]]:
    """The class means and the covariance within classes."""
    total = moments.counts.sum()
    means = moments.sums / moments.counts.clamp(min=1)[:, None]
    return means, moments.gram / total - (means * (moments.counts / total)[:, None]).T @ means


def best_temperature(scores: Float64[Tensor, "K C"], targets: Int64[Tensor, " K"]) -> tuple[float, float]:
    """Temperature scaling: the minimum log loss of the scores, and the temperature that gives it.

    The loss counts one further observation that has the label of its runner-up, because on few images all scores may be
    right, and certainty would then have no limit.
    """
    if scores.shape[1] == 1:
        return 0.0, 1.0
    true, doubt = F.one_hot(targets, scores.shape[1]).bool(), 1 / (1 + len(targets))

    def loss(power: float) -> float:
        log_probs = (scores / 10**power).log_softmax(1)
        runner_up = log_probs.masked_fill(true, -np.inf).amax(1)
        return -((1 - doubt) * log_probs[true] + doubt * runner_up).mean().item()

    from scipy.optimize import minimize_scalar  # its import takes half a second, which `predict` and `verify` save

    optimum = minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded")
    return float(optimum.fun), float(10**optimum.x)
