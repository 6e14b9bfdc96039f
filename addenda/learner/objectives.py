"""What training minimises: the loss of each objective, and the weights that make classes count alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.learner.data.labelled import Targets, label_counts

ClassWeights = Float[Tensor, " C"] | Float[Tensor, "2 C"]
"""Single-label: the weight of each class's images. Multi-label: of each label's absence, then of its presence."""


def balanced_weights(targets: Targets, num_classes: int) -> ClassWeights:
    """Weights that are 1 on average over the images, and give each class's images the same sum.

    A class of n_c among N images weighs N / (C n_c). In a multi-label task each label is a choice between two classes,
    with it and without it. A class that no image has keeps the weight that one image would have.
    """
    total, counts = len(targets), label_counts(targets, num_classes)
    if targets.ndim == 1:
        return total / (num_classes * counts.clamp(min=1).float())
    return total / (2 * torch.stack([total - counts, counts]).clamp(min=1).float())


def loss(
    logits: Float[Tensor, "*S N C"],
    targets: Targets,
    objective: str,
    label_smoothing: float = 0.0,
    class_weights: ClassWeights | None = None,
) -> Float[Tensor, "*S"]:
    """The mean over images of the loss of each candidate: see `losses`."""
    return losses(logits, targets, objective, label_smoothing, class_weights).mean(-1)


def losses(
    logits: Float[Tensor, "*S N C"],
    targets: Targets,
    objective: str,
    label_smoothing: float = 0.0,
    class_weights: ClassWeights | None = None,
) -> Float[Tensor, "*S N"]:
    """The loss of each candidate on each image.

    An image's multi-label loss is the sum over its labels, not the mean: each head row's gradient, and the weight of a
    penalty beside it, are then those of the cross-entropy, whatever the number of labels. Weights do not change what is
    divided by in the mean, as they do in torch's: it is the number of images.

    Args:
        logits: of one candidate, or of several stacked.
        targets: the same for all.
        objective: `"single-label"`: cross-entropy; `"multi-label"`: binary cross-entropy of the logits' sigmoids.
        label_smoothing: the share of each target given to all classes alike; to both answers of a multi-label one.
        class_weights: what each class counts, as `balanced_weights` gives it; None counts each 1.
    """
    if objective == "single-label":
        flat = logits.reshape(-1, logits.shape[-1])
        classes = targets.expand(logits.shape[:-1]).reshape(-1)
        each = F.cross_entropy(flat, classes, class_weights, reduction="none", label_smoothing=label_smoothing)
        return each.view(logits.shape[:-1])
    truth = targets.to(logits.dtype)
    smooth = truth * (1 - label_smoothing) + label_smoothing / 2
    if class_weights is None:
        class_weights = logits.new_ones(2, logits.shape[-1])
    absent, present = class_weights
    answers: Tensor = -present * smooth * F.logsigmoid(logits) - absent * (1 - smooth) * F.logsigmoid(-logits)
    return answers.sum(-1)
