"""A head in closed form from feature statistics: how a task grows without the images that it was learned from."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from addenda.combined.routing.classifiers import SHRINKAGES, Linear, discriminant, gaussians, tuned
from addenda.combined.routing.statistics import SAMPLES, Moments, unhashed, unsampled_classes
from addenda.learner.probes import LinearHead, limited_rank
from addenda.registry import FeatureStatistics

LAYER_WEIGHT = 0.75
"""Share of the layer features in the logits; a weight chosen on the small sample is worse (decision 0010)."""


class ClosedForm(NamedTuple):
    """A head, and what validates it."""

    head: LinearHead
    sample_logits: Float64[Tensor, "K C"]  # of the statistics' sample, by the same fit to all other images
    sample_targets: Int64[Tensor, " K"]


def closed_form(statistics: FeatureStatistics) -> ClosedForm:
    """Fits linear discriminants of the pooled feature and of the hashed layer features, and sums their logits.

    Shrinkages and temperatures minimise the log loss of the sample. If it lacks a class (`unsampled_classes`), nothing
    is tuned on it and the returned sample is empty: the shrinkage is the largest, the temperatures follow from the
    class means. Equal statistics give equal heads, so learning classes one after another is the same as learning them
    at once.
    """
    if unsampled_classes(statistics):
        samples = {name: each[:0] for name, each in statistics.tensors.items() if name in (*SAMPLES, "sample_targets")}
        statistics = replace(statistics, **samples)
    counts, targets, width = statistics.counts, statistics.sample_targets, statistics.sample.shape[1]
    expanded = Moments.sum([counts], [statistics.sums], [statistics.gram])
    linear, logits = _fitted(expanded.first(width), statistics.sample, targets)
    head = LinearHead(linear.bias, linear.weights.T)
    lengths, directions = statistics.layer_lengths, statistics.layer_directions
    if statistics.layers is None or lengths is None or directions is None:
        return ClosedForm(head, logits, targets)
    sums, gram, sample = statistics.layers
    moments = Moments.sum([counts], [sums], [gram])
    linear, layer_logits = _fitted(moments, sample, targets)
    hashed_weight, bias = limited_rank(linear.weights.T, linear.bias, gaussians(moments)[0])
    total = counts.sum()
    layer_head = _on_layers(hashed_weight, bias, lengths.double() / total, directions.double() / total)
    return ClosedForm(
        head * (1 - LAYER_WEIGHT) + layer_head * LAYER_WEIGHT,
        logits * (1 - LAYER_WEIGHT) + layer_logits * LAYER_WEIGHT,
        targets,
    )


def _on_layers(
    hashed_weight: Float64[Tensor, "C H"],
    bias: Float64[Tensor, " C"],
    lengths: Float64[Tensor, " V"],
    directions: Float64[Tensor, " n"],
) -> LinearHead:
    """The head on layer features that approximates one on their hashes, for which each vector is scaled to length 1.

    Division by a vector's length is not linear. Divided by the mean length instead, the part along the mean direction
    varies with the length alone, so it is replaced by its mean; the other parts are right to first order.
    """
    weight = unhashed(hashed_weight, len(directions)).unflatten(1, (len(lengths), -1))
    mean = directions.unflatten(0, (len(lengths), -1))
    axis = F.normalize(mean, dim=1)
    along = (weight * axis).sum(2)
    scaled = torch.where(lengths > 0, 1 / lengths, 0.0)[:, None] * (weight - along.unsqueeze(2) * axis)
    return LinearHead(bias + along @ mean.norm(dim=1), None, scaled.flatten(1))


def _fitted(
    moments: Moments, sample: Float[Tensor, "K F"], targets: Int64[Tensor, " K"]
) -> tuple[Linear, Float64[Tensor, "K C"]]:
    """A linear discriminant of all images, and the sample's logits by that of the others."""
    features = sample.double()
    return tuned(discriminant, SHRINKAGES, moments, moments.without(features, targets), features, targets)
