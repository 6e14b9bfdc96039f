"""Baselines that store only statistics of the frozen pooled feature: cheap, and hard to beat."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from avalanche.training.supervised.deep_slda import StreamingLDA
from jaxtyping import Float, Int
from torch import Tensor, nn

from addenda.benchmarks.baselines.method import OneHead, quiet_evaluator
from addenda.combined import task_cost
from addenda.learner.data.labelled import LabelledImages

RIDGES = tuple(10.0**exponent for exponent in range(-8, 9))
"""RanPAC's candidate penalties, as in its authors' code."""


class FeatureMethod(OneHead):
    """A method that works on the frozen pooled feature of each image."""

    def _learn(self, number: int) -> None:
        images = self.stream.experiences[number].train
        random = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        order = torch.randperm(len(images), generator=random, dtype=torch.int64, device="cpu")
        self._fit(self.pooled(images)[order], images.targets[order])

    def _logits(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        return self._predict(self.pooled(images)).float()

    @abstractmethod
    def _fit(self, features: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> None:
        """Learn from the features of one experience, in random order."""

    @abstractmethod
    def _predict(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]: ...


class NearestMean(FeatureMethod):
    """Predict the class whose mean feature is most similar to the image's by cosine.

    Source: SimpleCIL in Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", IJCV 2024.
    """

    def __post_init__(self) -> None:
        shape = len(self.stream.labels), self.backbone.embed_dim
        self._sums = torch.zeros(shape, dtype=torch.float32, device="cpu")  # the cosine needs only a mean's direction

    def _fit(self, features: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> None:
        self._sums.index_add_(0, targets, features)

    def _predict(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        return F.normalize(features, dim=1) @ F.normalize(self._sums, dim=1).T

    def _stored_bytes(self) -> float:
        return self._sums.nbytes


class StreamingDiscriminant(FeatureMethod):
    """Avalanche's streaming linear discriminant analysis, one image at a time.

    Scores are multiplied by the shrinkage: they grow with an inverse covariance of up to 1 / shrinkage and could
    otherwise fall below NEVER.

    Source: Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR-W 2020.
    """

    def __post_init__(self) -> None:
        self._slda = StreamingLDA(
            slda_model=nn.Identity(), criterion=None, input_size=self.backbone.embed_dim,
            num_classes=len(self.stream.labels), evaluator=quiet_evaluator(),
        )  # fmt: skip

    def _fit(self, features: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> None:
        for feature, target in zip(features.split(1), targets.split(1), strict=True):
            self._slda.fit(feature, target)

    def _predict(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        scores: Tensor = self._slda.predict(features) * self._slda.shrinkage_param
        return scores

    def _stored_bytes(self) -> float:
        return float(self._slda.muK.nbytes + self._slda.cK.nbytes + self._slda.Sigma.nbytes)


class RanPAC(FeatureMethod):
    """Ridge regression on random features relu(f W), from sums over all images so far.

    Each experience selects the penalty anew on a held-out fifth of its images. Sums are in float64. The paper's
    first-session adaptation of the backbone is left out.

    Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023.
    """

    def __post_init__(self) -> None:
        width, random = self.settings.ranpac_width, torch.Generator().manual_seed(self.seed)
        shape = self.backbone.embed_dim, width
        self._projection = torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")
        self._gram = torch.zeros(width, width, dtype=torch.float64, device="cpu")
        self._sums = torch.zeros(width, len(self.stream.labels), dtype=torch.float64, device="cpu")
        self._weight = torch.zeros_like(self._sums)

    def _fit(self, features: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> None:
        hidden = self._hidden(features)
        one_hot = F.one_hot(targets, len(self.stream.labels)).double()
        ridge = choose_ridge(hidden, one_hot)
        self._gram += hidden.T @ hidden
        self._sums += hidden.T @ one_hot
        identity = torch.eye(len(self._gram), dtype=torch.float32, device="cpu")
        self._weight = torch.linalg.solve(self._gram + ridge * identity, self._sums)

    def _predict(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        return self._hidden(features) @ self._weight

    def _hidden(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N M"]:
        return F.relu(features @ self._projection).double()

    def _stored_bytes(self) -> float:
        return sum(tensor.nbytes for tensor in (self._projection, self._gram, self._sums, self._weight))

    def _relative_inference(self) -> float:
        return 1 + self._projection.numel() / task_cost(self.backbone, 0).backbone_operations


def choose_ridge(hidden: Float[Tensor, "N M"], one_hot: Float[Tensor, "N C"]) -> float:
    """Select the penalty of RIDGES with the lowest squared error on the last fifth of the images.

    Solved in the dual, H'(HH' + rI)^-1 Y = (H'H + rI)^-1 H'Y, so that one eigendecomposition serves every r.
    """
    count = int(0.8 * len(hidden))
    train, held_out = hidden[:count], hidden[count:]
    values, vectors = torch.linalg.eigh(train @ train.T)
    values = values.clamp(min=0)
    left, right = held_out @ train.T @ vectors, vectors.T @ one_hot[:count]
    errors = [((left / (values + ridge)) @ right - one_hot[count:]).square().mean().item() for ridge in RIDGES]
    return RIDGES[errors.index(min(errors))]
