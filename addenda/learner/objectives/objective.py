"""What an objective is: all that learning asks of targets, and what is the same for each objective."""

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

Targets = Int[Tensor, " N"] | Bool[Tensor, "N C"]
"""The class of each image; or, of a multi-label task, whether each image has each label."""

ClassWeights = Float[Tensor, " C"] | Float[Tensor, "2 C"]
"""Single-label: the weight of each class's images. Multi-label: of each label's absence, then of its presence."""

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Values of scikit-learn's C to choose from."""

NUM_FOLDS = 5
"""Of cross-validation, where the images allow as many."""

TEMPERATURES = (0.2, 5.0)
"""The least and the largest temperature. Images that are all answered rightly would ask for 0."""

Array = NDArray[np.float64]
Splits = Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]]
"""Of each fold, which images a fit sees, and which it does not."""

Groups = Sequence[str] | None
"""The group of each image: those of one stand on one side of every split. None: each image is one of its own."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted logistic regression on the backbone's own feature: logits are feature @ weight.T + bias."""

    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    strength: float  # C, the inverse of the L2 penalty on the sum of losses


class Objective(ABC):
    """How targets of one form are learned and scored; what the logits mean, for ever, is in `addenda.registry`."""

    name: ClassVar[str]  # as tasks are registered under it
    learns_from_views: ClassVar[bool]  # whether its fits to layer features are tried on random views too
    routable: ClassVar[bool]  # whether a router can tell a task's images by their classes

    @abstractmethod
    def has_form(self, targets: Tensor) -> bool:
        """Whether targets are of this objective's form."""

    @abstractmethod
    def counts(self, targets: Targets, num_classes: int) -> Int[Tensor, " C"]:
        """How many images have each label."""

    @abstractmethod
    def answer(self, target: Any, labels: Sequence[str]) -> str:
        """What one image is labelled as, in one text, whatever the order of the classes."""

    @abstractmethod
    def reordered(self, targets: Targets, order: Int[Tensor, " c"], num_classes: int) -> Targets:
        """Targets among other classes: number i becomes order[i], of num_classes."""

    @abstractmethod
    def too_common(self, counts: Sequence[int], num_images: int) -> list[int]:
        """Classes on so many images that too few are left to tell them from."""

    @abstractmethod
    def is_settled(self, num_classes: int) -> bool:
        """Whether there is nothing to learn: every image has the one answer."""

    def split(
        self, targets: Targets, num_classes: int, fraction: float, seed: int, groups: Groups = None
    ) -> tuple[Int[Tensor, " T"], Int[Tensor, " V"]]:
        """Rows to learn from and rows to validate on, a fraction of each class; of one on two images, one at least.

        The images of a group stand on one side: of a class that is in one group alone, on the first.

        Raises:
            DataError: no group can be held out, since each has the last images of a class.
        """
        if groups is None:
            return self._split(targets, num_classes, fraction, seed)
        held_out = self.folds(targets, seed, groups, max(2, round(1 / fraction))) == 0
        there = self.counts(targets, num_classes) > 0
        while (lost := there & (self.counts(targets[~held_out], num_classes) == 0)).any():
            has = self.reads(targets, int(lost.nonzero()[0])) & held_out
            back = groups[int(has.nonzero()[0])]
            held_out &= torch.tensor([group != back for group in groups], dtype=torch.bool, device="cpu")
        if not held_out.any():
            raise DataError(
                f"The images form {len(set(groups))} group{'' if len(set(groups)) == 1 else 's'}, and none can be held "
                "out to validate on: each has the last images of a class. Make smaller groups, or none."
            )
        return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]

    @abstractmethod
    def _split(
        self, targets: Targets, num_classes: int, fraction: float, seed: int
    ) -> tuple[Int[Tensor, " T"], Int[Tensor, " V"]]:
        """As `split`, where each image is a group of its own."""

    @abstractmethod
    def reads(self, targets: Targets, label: int) -> Bool[Tensor, " N"]:
        """Which images have a label."""

    def folds(self, targets: Targets, seed: int, groups: Groups = None, count: int = NUM_FOLDS) -> Int[Tensor, " N"]:
        """The fold of each image: classes are dealt out evenly, and the images of a group stand in one fold.

        A group goes by the class of most of its images.
        """
        names = [str(row) for row in range(len(targets))] if groups is None else list(groups)
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        classes = self.strata(targets)
        of_group = torch.stack([classes[some].mode().values for some in rows.values()])
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(rows), generator=random, dtype=torch.int64, device="cpu")
        order = order[of_group[order].argsort(stable=True)]
        found = torch.empty(len(targets), dtype=torch.int64, device="cpu")
        members = list(rows.values())
        for place, group in enumerate(order.tolist()):
            found[members[group]] = place % min(count, len(rows))
        return found

    @abstractmethod
    def losses(
        self,
        logits: Float[Tensor, "*S N C"],
        targets: Targets,
        label_smoothing: float = 0.0,
        class_weights: ClassWeights | None = None,
    ) -> Float[Tensor, "*S N"]:
        """The loss of each of S candidates on each image.

        Weights do not change what is divided by in the mean, as they do in torch's: it is the number of images.
        """

    def loss(
        self,
        logits: Float[Tensor, "*S N C"],
        targets: Targets,
        label_smoothing: float = 0.0,
        class_weights: ClassWeights | None = None,
    ) -> Float[Tensor, "*S"]:
        """The mean over images of the loss of each candidate: see `losses`."""
        return self.losses(logits, targets, label_smoothing, class_weights).mean(-1)

    @abstractmethod
    def balanced_weights(self, targets: Targets, num_classes: int) -> ClassWeights:
        """Weights that are 1 on average over the images, and give each class's images the same sum."""

    @abstractmethod
    def accuracy(self, logits: Float[Tensor, "N C"], targets: Targets) -> float:
        """The share of answers that are right."""

    @abstractmethod
    def score(self, logits: Float[Tensor, "N C"], targets: Targets, labels: Sequence[str]) -> dict[str, Any]:
        """Figures in 0..1, by torchmetrics. A temperature moves only the calibration error: divide by it first."""

    def fit_temperature(self, logits: Float[Tensor, "N C"], targets: Targets) -> float:
        """The temperature of least negative log likelihood, to three decimals; 1.0 where none is better than that.

        Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2;
        there without bounds.
        """
        if not len(targets):
            return 1.0
        exact, answers = logits.double().cpu(), targets.cpu()
        temperature = round(self.least_loss_temperature(exact, answers, TEMPERATURES), 3)
        better = self.loss(exact / temperature, answers) < self.loss(exact, answers)
        return temperature if better else 1.0

    def least_loss_temperature(
        self, logits: Float[Tensor, "N C"], targets: Targets, bounds: tuple[float, float], label_smoothing: float = 0.0
    ) -> float:
        """What logits are divided by for the least loss, between two bounds."""

        def loss(log_temperature: float) -> float:  # convex in 1 / temperature: it has one valley
            return self.loss(logits / math.exp(log_temperature), targets, label_smoothing).item()

        within = tuple(map(math.log, bounds))
        return math.exp(minimize_scalar(loss, bounds=within, method="bounded", options={"xatol": 1e-6}).x)

    def choose_strength(
        self, features: Float[Tensor, "N D"], targets: Targets, seed: int, groups: Groups = None
    ) -> float:
        """The C of least cross-validated log loss."""
        fold, tried = self.folds(targets, seed, groups).numpy(), list[float]()
        splits = [(fold != number, fold == number) for number in range(fold.max() + 1)]
        # From the strongest penalty on; past the best, weaker ones only get slower and worse.
        for mean_loss in self._fold_losses(_centred(features)[0], targets.numpy(), splits):
            tried.append(mean_loss)
            if len(tried) > 2 and tried[-1] > tried[-2] > tried[-3]:
                break
        return STRENGTHS[int(np.argmin(tried))]

    def fit_linear_probe(
        self, features: Float[Tensor, "N D"], targets: Targets, strength: float, num_classes: int | None = None
    ) -> LinearProbe:
        """An L2 logistic regression, fitted to convergence by scikit-learn.

        Without `num_classes`, there are as many classes as the targets have.
        """
        x, mean = _centred(features)
        weight, bias = self._fit(x, targets.numpy(), strength, num_classes)
        return LinearProbe(torch.from_numpy(weight).float(), torch.from_numpy(bias - weight @ mean).float(), strength)

    @abstractmethod
    def strata(self, targets: Targets) -> Int[Tensor, " N"]:
        """What folds deal out evenly: the class of each image, or 0 where an image may have several."""

    @abstractmethod
    def fit_layers(
        self, z: Float64[Tensor, "N k"], targets: Targets, num_classes: int, num_features: int
    ) -> list[tuple[Float64[Tensor, "C k"], Float64[Tensor, " C"]]]:
        """Heads on layer features in coordinates, as weight and bias, from the least to the most cautious or back.

        Args:
            z: coordinates of standardised features, in which inner products are theirs.
            targets: of the images.
            num_classes: C.
            num_features: n, the features that the coordinates stand for.
        """

    @abstractmethod
    def _fold_losses(self, x: Array, y: NDArray[Any], splits: Splits) -> Iterator[float]:
        """Mean log loss on the images that a fit did not see, for one of STRENGTHS after another."""

    @abstractmethod
    def _fit(self, x: Array, y: NDArray[Any], strength: float, num_classes: int | None) -> tuple[Array, Array]:
        """Weight, one row for each class, and bias."""


def _centred(features: Float[Tensor, "N D"]) -> tuple[Array, Array]:
    """Features less their mean, and the mean. No bias is penalised, so the fit is the same, in a third of the steps."""
    x = features.double().numpy()
    mean = x.mean(0)
    return x - mean, mean


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def logistic(strength: float, warm_start: bool = False) -> LogisticRegression:
    """scikit-learn's regression, as it is fitted here."""
    return LogisticRegression(C=strength, max_iter=20_000, tol=1e-5, warm_start=warm_start)


def converged(model: LogisticRegression, x: Array, y: NDArray[Any]) -> LogisticRegression:
    """Fits, and refuses to stop before it has converged.

    On one thread: the products are small, and with two OpenBLAS takes ten to twenty times as long.
    """
    with warnings.catch_warnings(), _blas().limit(limits=1, user_api="blas"):
        warnings.simplefilter("error", ConvergenceWarning)
        return model.fit(x, y)
