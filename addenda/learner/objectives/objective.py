"""The interface of objectives, and what all objectives share: splits, folds, calibration, the linear probe."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import ThreadpoolController
from torch import Tensor

from addenda.exceptions import DataError
from addenda.learner.objectives.stratification import divided, held_out_groups
from addenda.registry import MEANINGS

Classes = Int[Tensor, " N"]
"""Single-label targets: the class of each image."""
MultiHot = Bool[Tensor, "N C"]
"""Multi-label targets: whether each image has each label."""
Targets = Classes | MultiHot
Weights = Float[Tensor, " C"] | Float[Tensor, "2 C"] | None
"""Weights of the loss. Single-label: of each class. Multi-label: of the absence and of the presence of each label."""
Groups = Sequence[str] | None
"""The group of each image; a group is on one side of every split. None makes each image a group of its own."""
Rows = tuple[Int[Tensor, " T"], Int[Tensor, " V"]]
"""Rows of the training and of the validation split."""
LayerFits = list[tuple[Float64[Tensor, "C k"], Float64[Tensor, " C"]]]
"""Weight and bias of heads on layer features, for several regularisation strengths."""
Array = NDArray[np.float64]

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Candidate values of scikit-learn's C for the linear probe."""
NUM_FOLDS = 5
"""Folds of cross-validation; fewer if there are fewer groups."""
TEMPERATURES = (0.2, 5.0)
"""Bounds of the temperature."""
CERTAIN = 1 - 1e-6
"""Maximum confidence for torchmetrics' calibration error, which has a sixteenth bin for a confidence of exactly 1."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted logistic regression on the backbone's pooled feature: logits are feature @ weight.T + bias."""

    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    strength: float  # C, the inverse of the L2 penalty on the sum of losses


class Objective(ABC):
    """Training and evaluation for one form of targets; `addenda.registry` defines what the logits mean."""

    name: ClassVar[str]  # stored with registered tasks
    learns_from_views: ClassVar[bool]  # whether layer probes are also fitted on random views
    routable: ClassVar[bool]  # whether a router can use class statistics of the task

    @abstractmethod
    def has_form(self, targets: Tensor) -> bool:
        """Whether targets have the form of this objective."""

    @abstractmethod
    def counts(self, targets: Targets, num_classes: int) -> Int[Tensor, " C"]:
        """The number of images with each label."""

    @abstractmethod
    def label_text(self, target: Any, labels: Sequence[str]) -> str:
        """The labels of one target as text that does not depend on the order of the classes."""

    @abstractmethod
    def reordered(self, targets: Targets, order: Int[Tensor, " c"], num_classes: int) -> Targets:
        """Targets with renumbered classes: class i becomes order[i], of num_classes."""

    def too_common(self, counts: Sequence[int], num_images: int) -> list[int]:
        """Labels on so many images that too few images without them are left; none if labels exclude each other."""
        return []

    def is_settled(self, num_classes: int) -> bool:
        """Whether there is nothing to learn, since only one prediction is possible."""
        return num_classes == 1 and MEANINGS[self.name].exclusive

    def split(self, targets: Targets, num_classes: int, fraction: float, seed: int, groups: Groups = None) -> Rows:
        """Rows of the training and the validation split.

        The images of a group stay on one side. Validation takes a fraction of the images of each class, and at least
        one group of a class with two or more; an only group is for training. Without groups, each image counts as one.
        Where groups have several classes, or images several labels, training may need all groups of a class because of
        others; validation then lacks as few classes as possible.

        Raises:
            DataError: no group can be held out, since each holds the last images of a class.
        """
        counts, sizes, group_of_image = self._counts_by_group(targets, num_classes, groups)
        held_out = torch.from_numpy(held_out_groups(counts, sizes, fraction, seed, num_classes)[group_of_image])
        if not held_out.any():
            if groups is None:
                raise DataError(
                    f"None of the {len(targets)} images can be held out for validation: each is the last one with or "
                    "without some label. Add images."
                )
            raise DataError(
                f"The images form {len(sizes)} group{'' if len(sizes) == 1 else 's'}, and none can be held out for "
                "validation: each holds the last images of a class. Use smaller groups, or none."
            )
        return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]

    @abstractmethod
    def has_label(self, targets: Targets, label: int) -> Bool[Tensor, " N"]:
        """Which images have a label."""

    def folds(self, targets: Targets, seed: int, groups: Groups = None, count: int = NUM_FOLDS) -> Int[Tensor, " N"]:
        """The fold of each image, stratified by class; the images of a group are in one fold."""
        if groups is not None:
            counts, sizes, group_of_image = self._counts_by_group(targets, len(self.counts(targets, 0)), groups)
            count = min(count, len(sizes))
            wanted, room = counts.sum(0) / np.full((count, 1), count), np.full(count, len(targets) / count)
            return torch.from_numpy(divided(counts, sizes, wanted, room, seed)[group_of_image])
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(targets), generator=random, dtype=torch.int64, device="cpu")
        order = order[self.strata(targets)[order].argsort(stable=True)]
        folds = torch.empty(len(targets), dtype=torch.int64, device="cpu")
        folds[order] = torch.arange(len(targets), dtype=torch.int64, device="cpu") % min(count, len(targets))
        return folds

    def _counts_by_group(
        self, targets: Targets, num_classes: int, groups: Groups
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Images of each group with and (if labels can be absent) without each label; sizes; each image's group."""
        if groups is None:
            group_of_image = np.arange(len(targets))
        else:
            numbers = {group: number for number, group in enumerate(sorted(set(groups)))}
            group_of_image = np.array([numbers[group] for group in groups])
        num_groups = int(group_of_image.max()) + 1
        masks = [np.ones(len(targets), dtype=bool)] + [self.has_label(targets, i).numpy() for i in range(num_classes)]
        sizes, *present = (np.bincount(group_of_image[mask], minlength=num_groups) for mask in masks)
        counts = np.stack(present, axis=1)
        if not MEANINGS[self.name].exclusive:
            counts = np.concatenate([counts, sizes[:, None] - counts], axis=1)
        return counts, sizes, group_of_image

    @abstractmethod
    def losses(
        self, logits: Float[Tensor, "*S N C"], targets: Targets, smoothing: float = 0.0, class_weights: Weights = None
    ) -> Float[Tensor, "*S N"]:
        """The loss of each of S candidates on each image, with label smoothing.

        Unlike in torch, class weights do not change the divisor of the mean, which is the number of images.
        """

    def loss(
        self, logits: Float[Tensor, "*S N C"], targets: Targets, smoothing: float = 0.0, class_weights: Weights = None
    ) -> Float[Tensor, "*S"]:
        """The mean of `losses` over the images, for each candidate."""
        return self.losses(logits, targets, smoothing, class_weights).mean(-1)

    def class_weights(self, kind: str, targets: Targets, num_classes: int) -> Weights:
        """The weights that `LearnConfig.class_weights` names."""
        return self.balanced_weights(targets, num_classes) if kind == "balanced" else None

    @abstractmethod
    def balanced_weights(self, targets: Targets, num_classes: int) -> Float[Tensor, " C"] | Float[Tensor, "2 C"]:
        """Weights inverse to class frequency: equal sums for all classes, and a mean of 1 over the images."""

    @abstractmethod
    def accuracy(self, logits: Float[Tensor, "N C"], targets: Targets) -> float:
        """The share of correct predictions."""

    @abstractmethod
    def score(self, logits: Float[Tensor, "N C"], targets: Targets, labels: Sequence[str]) -> dict[str, Any]:
        """Metrics in 0..1, by torchmetrics. Divide the logits by the temperature first; it affects calibration only."""

    def fit_temperature(self, logits: Float[Tensor, "N C"], targets: Targets, prior: float = 0.5) -> float:
        """Temperature scaling: the temperature of minimal negative log likelihood and prior, to three decimals, or 1.0.

        The prior is a factor of the squared logarithm; 1/2 is a standard normal distribution. It matters on few images:
        where all are predicted correctly, their likelihood alone makes every prediction certain. Without it (0), logits
        of any scale have the same loss at their temperatures.

        Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2,
        here with the prior and bounds.
        """
        if not len(targets):
            return 1.0
        logits, targets = logits.cpu().double(), targets.cpu()
        fitted = self.least_loss_temperature(logits, targets, TEMPERATURES, prior=prior / len(targets))
        temperature = round(fitted, 3)
        better = self.loss(logits / temperature, targets) < self.loss(logits, targets)
        return temperature if better else 1.0

    def least_loss_temperature(
        self, logits: Float[Tensor, "N C"], targets: Targets, bounds: tuple[float, float], smoothing: float = 0.0,
        prior: float = 0.0,
    ) -> float:  # fmt: skip
        """The temperature of minimal loss, between two bounds; `prior` times its squared logarithm is added."""

        def loss(log_temperature: float) -> float:  # without `prior` convex in 1 / temperature: one minimum
            scaled = self.loss(logits / math.exp(log_temperature), targets, smoothing).item()
            return scaled + prior * log_temperature**2

        log_bounds = tuple(map(math.log, bounds))
        return math.exp(minimize_scalar(loss, bounds=log_bounds, method="bounded", options={"xatol": 1e-6}).x)

    def choose_strength(
        self,
        features: Float[Tensor, "N D"],
        targets: Targets,
        seed: int,
        groups: Groups = None,
        class_weights: Weights = None,
    ) -> float:
        """The C from STRENGTHS at which the cross-validated log loss stops to fall; 1.0 for a single class.

        Class weights apply to the fits, not to the held-out losses.
        """
        if self.is_settled(int(targets.max()) + 1):
            return 1.0
        fold, losses = self.folds(targets, seed, groups).numpy(), list[float]()
        held_out = [fold == number for number in range(fold.max() + 1)]
        # Starts with the strongest penalty; past the best one, weaker penalties are slower and worse.
        for mean_loss in self._fold_losses(_centred(features)[0], targets.numpy(), held_out, _array(class_weights)):
            losses.append(mean_loss)
            if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
                break
        return STRENGTHS[int(np.argmin(losses))]

    def fit_linear_probe(
        self,
        features: Float[Tensor, "N D"],
        targets: Targets,
        strength: float,
        num_classes: int | None = None,
        class_weights: Weights = None,
    ) -> LinearProbe:
        """L2-regularised logistic regression, fitted to convergence by scikit-learn.

        `num_classes` defaults to the number of classes in the targets.
        """
        x, mean = _centred(features)
        weight, bias = self._fit(x, targets.numpy(), strength, num_classes, _array(class_weights))
        return LinearProbe(torch.from_numpy(weight).float(), torch.from_numpy(bias - weight @ mean).float(), strength)

    def strata(self, targets: Targets) -> Int[Tensor, " N"]:
        """The classes by which folds without groups are stratified; zeros if an image may have several labels."""
        return torch.zeros(len(targets), dtype=torch.int64, device="cpu")

    @abstractmethod
    def fit_layers(
        self,
        z: Float64[Tensor, "N k"],
        targets: Targets,
        num_classes: int,
        num_features: int,
        class_weights: Weights = None,
    ) -> LayerFits:
        """Fits heads on layer features for several regularisation strengths, in their order, as (weight, bias).

        Args:
            z: coordinates of the standardised features, with the same inner products.
            targets: the targets.
            num_classes: C.
            num_features: n, the number of features before the change of coordinates.
            class_weights: weights of the loss, if the fit has one.
        """

    @abstractmethod
    def _fold_losses(
        self, x: Array, y: NDArray[Any], folds: Sequence[NDArray[np.bool_]], class_weights: Array | None
    ) -> Iterator[float]:
        """Mean log loss on held-out images, for each of STRENGTHS in turn; `folds` has the mask of each fold."""

    @abstractmethod
    def _fit(
        self, x: Array, y: NDArray[Any], strength: float, num_classes: int | None, class_weights: Array | None
    ) -> tuple[Array, Array]:
        """Fits a logistic regression; returns weight, one row per class, and bias."""


def _centred(features: Float[Tensor, "N D"]) -> tuple[Array, Array]:
    """Centred features, and their mean. The bias is not penalised, so the fit is the same in a third of the steps."""
    x = features.double().numpy()
    mean = x.mean(0)
    return x - mean, mean


def _array(class_weights: Weights) -> Array | None:
    return None if class_weights is None else class_weights.double().numpy()


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def fit_logistic(
    x: Array,
    y: NDArray[Any],
    strength: float,
    start: LogisticRegression | None = None,
    image_weights: Array | None = None,
) -> LogisticRegression:
    """Logistic regression by scikit-learn, which starts from an earlier fit if given; raises if it does not converge.

    Uses one thread: the matrix products are small, and OpenBLAS with two threads takes ten to twenty times as long.
    """
    model = LogisticRegression(max_iter=20_000, tol=1e-5, warm_start=True) if start is None else start
    with warnings.catch_warnings(), _blas().limit(limits=1, user_api="blas"):
        warnings.simplefilter("error", ConvergenceWarning)
        return model.set_params(C=strength).fit(x, y, image_weights)
