"""Each image has any number of labels: a sigmoid for each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision, binary_calibration_error, binary_f1_score

from addenda.combined.predictions import LIKELY
from addenda.learner.objectives.objective import STRENGTHS, Array, ClassWeights, Objective, Splits, converged, logistic
from addenda.registry import probabilities

LAYER_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""Values of scikit-learn's C for regressions on layer features, whose rows have lengths of about 1."""


class MultiLabel(Objective):
    """Targets say of each label whether an image has it, Bool[N, C]."""

    name = "multi-label"
    learns_from_views = False  # a label's regression takes far longer than all classes' discriminants
    routable = False

    def has_form(self, targets: Tensor) -> bool:
        """A row of yes and no for each image."""
        return targets.ndim == 2 and targets.dtype == torch.bool

    def counts(self, targets: Bool[Tensor, "N C"], num_classes: int) -> Int[Tensor, " C"]:
        """How many images have each label."""
        return targets.sum(0)

    def answer(self, target: Sequence[bool], labels: Sequence[str]) -> str:
        """All the image's labels in their order."""
        return json.dumps(sorted(label for label, has in zip(labels, target, strict=True) if has))

    def reordered(
        self, targets: Bool[Tensor, "N c"], order: Int[Tensor, " c"], num_classes: int
    ) -> Bool[Tensor, "N C"]:
        """The columns in another order; a label that is not among them no image has."""
        found = torch.zeros(len(targets), num_classes, dtype=torch.bool, device="cpu")
        found[:, order] = targets
        return found

    def too_common(self, counts: Sequence[int], num_images: int) -> list[int]:
        """Labels that fewer than two images are without."""
        return [label for label, count in enumerate(counts) if count > num_images - 2]

    def is_settled(self, num_classes: int) -> bool:
        """Never: an image may be without the one label."""
        return False

    def _split(
        self, targets: Bool[Tensor, "N C"], num_classes: int, fraction: float, seed: int
    ) -> tuple[Int[Tensor, " T"], Int[Tensor, " V"]]:
        """Shared out label by label, the rarest first, each image to the part that still lacks most of that label.

        Not to have a label counts as one too. A label on two images or more asks for one at least to validate on.

        Source: Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-label Data", ECML PKDD 2011, section
        3.3, for two parts. Theirs does not count what an image is not, and asks for no minimum.
        """
        has = torch.cat([targets, ~targets], dim=1).numpy()  # each image is on one side or more of each label
        counts = has.sum(0)
        wanted = np.minimum(np.maximum(fraction * counts, 1), np.maximum(counts - 1, 0))
        lacks = np.stack([counts - wanted, wanted])  # [2, K]: to learn from, to validate on
        room = np.array([(1 - fraction) * len(has), fraction * len(has)])
        part = np.full(len(has), -1)
        order = np.random.default_rng(seed).permutation(len(has))
        while (part < 0).any():
            left = has[part < 0].sum(0)
            side = int(np.where(left > 0, left, len(has) + 1).argmin())
            for row in order[(part[order] < 0) & has[order, side]]:
                part[row] = max((0, 1), key=lambda p: (lacks[p, side], room[p]))
                lacks[part[row]] -= has[row]
                room[part[row]] -= 1
        # The images of a side may all be held out by rarer ones.
        for lost in np.flatnonzero((counts > 1) & ~has[part == 0].any(0)):
            part[np.flatnonzero(has[:, lost])[0]] = 0
        return torch.from_numpy(np.flatnonzero(part == 0)), torch.from_numpy(np.flatnonzero(part == 1))

    def losses(
        self,
        logits: Float[Tensor, "*S N C"],
        targets: Bool[Tensor, "N C"],
        label_smoothing: float = 0.0,
        class_weights: ClassWeights | None = None,
    ) -> Float[Tensor, "*S N"]:
        """The sum over an image's labels of their binary cross-entropies.

        Not the mean: each head row's gradient, and a penalty's weight beside it, are then those of the cross-entropy.
        """
        truth = targets.to(logits.dtype)
        smooth = truth * (1 - label_smoothing) + label_smoothing / 2
        if class_weights is None:
            class_weights = logits.new_ones(2, logits.shape[-1])
        absent, present = class_weights
        answers: Tensor = -present * smooth * F.logsigmoid(logits) - absent * (1 - smooth) * F.logsigmoid(-logits)
        return answers.sum(-1)

    def balanced_weights(self, targets: Bool[Tensor, "N C"], num_classes: int) -> Float[Tensor, "2 C"]:
        """Each label is a choice between two classes, with it and without it."""
        total, counts = len(targets), targets.sum(0)
        return total / (2 * torch.stack([total - counts, counts]).clamp(min=1).float())

    def accuracy(self, logits: Float[Tensor, "N C"], targets: Bool[Tensor, "N C"]) -> float:
        """The share of answers that are right, all labels pooled."""
        return ((logits > 0) == targets).float().mean().item()

    def score(
        self, logits: Float[Tensor, "N C"], targets: Bool[Tensor, "N C"], labels: Sequence[str]
    ) -> dict[str, Any]:
        """The mean over the labels that some image has of average precision and of F1 at probability 0.5, and more.

        `exact_match` counts images with every label right; the expected `calibration_error`, in 15 bins, is of all
        answers pooled. Of a label that no image has, figures are None.
        """
        logits, targets = logits.cpu(), targets.cpu()
        chance, truth = probabilities(logits, self.name), targets.int()
        answers = chance >= LIKELY
        precision: dict[str, float | None] = dict.fromkeys(labels)
        f1 = []
        for i in targets.any(0).nonzero().flatten().tolist():
            precision[labels[i]] = binary_average_precision(_ranks(logits[:, i]), truth[:, i]).item()
            f1.append(binary_f1_score(answers[:, i].int(), truth[:, i]).item())
        known = [value for value in precision.values() if value is not None]
        return {
            "mean_average_precision": sum(known) / len(known) if known else None,
            "f1_micro": binary_f1_score(answers.int().flatten(), truth.flatten()).item() if known else None,
            "f1_macro": sum(f1) / len(f1) if f1 else None,
            "exact_match": (answers == targets).all(1).float().mean().item(),
            "calibration_error": binary_calibration_error(chance.flatten(), truth.flatten()).item(),
            "per_class": precision,
            "num_images": len(targets),
        }

    def reads(self, targets: Bool[Tensor, "N C"], label: int) -> Bool[Tensor, " N"]:
        """Those that have it, among others maybe."""
        return targets[:, label]

    def strata(self, targets: Bool[Tensor, "N C"]) -> Int[Tensor, " N"]:
        """Nothing: an image may have several labels."""
        return torch.zeros(len(targets), dtype=torch.int64, device="cpu")

    def fit_layers(
        self, z: Float64[Tensor, "N k"], targets: Bool[Tensor, "N C"], num_classes: int, num_features: int
    ) -> list[tuple[Float64[Tensor, "C k"], Float64[Tensor, " C"]]]:
        """A logistic regression for each label, one for each of LAYER_STRENGTHS."""
        x, models, found = z.numpy(), [_Binary(LAYER_STRENGTHS[0]) for _ in range(num_classes)], []
        for strength in LAYER_STRENGTHS:
            for model, column in zip(models, targets.numpy().T, strict=True):
                model.strength = strength
                model.fit(x, column)
            weight, bias = np.stack([model.weight for model in models]), np.array([model.bias for model in models])
            found.append((torch.from_numpy(weight), torch.from_numpy(bias)))
        return found

    def _fold_losses(self, x: Array, y: NDArray[Any], splits: Splits) -> Iterator[float]:
        """One C for all labels, by the mean of all their answers; each fit starts from the last one's solution."""
        models = [[_Binary(STRENGTHS[0]) for _ in range(y.shape[1])] for _ in splits]
        for strength in STRENGTHS:
            total = 0.0
            for (train, held_out), row in zip(splits, models, strict=True):
                for label, model in enumerate(row):
                    model.strength = strength
                    model.fit(x[train], y[train, label])
                    margin = x[held_out] @ model.weight + model.bias
                    total += np.logaddexp(0, np.where(y[held_out, label], -margin, margin)).sum()
            yield total / y.size

    def _fit(self, x: Array, y: NDArray[Any], strength: float, num_classes: int | None) -> tuple[Array, Array]:
        """One regression for each label against the rest."""
        rows = [_Binary(strength).fit(x, column) for column in y.T]
        return np.stack([row.weight for row in rows]), np.array([row.bias for row in rows])


class _Binary:
    """One label against the rest; fitted again, it starts from where it was.

    A label that every image has, or none, has nothing to be told by: its weight is 0, and its bias answers with
    (images that have it + 1) / (images + 2), Laplace's rule.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._model = logistic(strength, warm_start=True)

    def fit(self, x: Array, y: NDArray[np.bool_]) -> _Binary:
        if y.all() or not y.any():
            self.weight, self.bias = np.zeros(x.shape[1]), math.log((y.sum() + 1) / ((~y).sum() + 1))
            return self
        fitted = converged(self._model.set_params(C=self.strength), x, y)
        self.weight, self.bias = fitted.coef_[0], fitted.intercept_[0]
        return self


def _ranks(logits: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The logits' order as numbers in 0..1: the sigmoids of large logits are all 1 and have none."""
    order: Tensor = torch.unique(logits, return_inverse=True)[1]
    return order.double() / len(logits)
