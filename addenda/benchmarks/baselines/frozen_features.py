"""Baselines that store only statistics of the frozen pooled feature: cheap, and hard to beat."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from avalanche.models.fecam import FeCAMClassifier
from avalanche.training.supervised.deep_slda import StreamingLDA
from jaxtyping import Float, Int
from torch import Tensor, nn

from addenda.benchmarks.baselines.method import OneHead, quiet_evaluator
from addenda.benchmarks.baselines.paper_methods import merged
from addenda.benchmarks.baselines.per_task import train
from addenda.combined import task_cost
from addenda.learner.data.labelled import LabelledImages
from addenda.learner.objectives import SingleLabel

CHUNK = 512
"""Images that FeCAM scores at once."""

DIAGONAL = 1e-4
"""Added to the diagonal of a class's covariance before samples are drawn, as by SLCA."""

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

    def _relative_inference(self) -> float:
        return self.pooled_inference()

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


class _ClassGaussians(FeatureMethod):
    """A method that stores the mean and covariance of each class, from sums over all its images so far, in float64."""

    def __post_init__(self) -> None:
        classes, width = len(self.stream.labels), self.backbone.embed_dim
        self._counts = torch.zeros(classes, dtype=torch.float64, device="cpu")
        self._sums = torch.zeros(classes, width, dtype=torch.float64, device="cpu")
        self._grams = torch.zeros(classes, width, width, dtype=torch.float64, device="cpu")

    def _add(self, features: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> None:
        for number in targets.unique().tolist():
            rows = features[targets == number].double()
            self._counts[number] += len(rows)
            self._sums[number] += rows.sum(0)
            self._grams[number] += rows.T @ rows

    def _gaussians(self) -> dict[int, tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]]:
        """Mean and sample covariance of each class seen so far, by its number; one image has a covariance of 0."""
        gaussians = {}
        for number in self._counts.nonzero()[:, 0].tolist():
            count, mean = self._counts[number], self._sums[number] / self._counts[number]
            gaussians[number] = mean, (self._grams[number] - count * mean.outer(mean)) / (count - 1).clamp(min=1)
        return gaussians

    def _stored_bytes(self) -> float:
        """A float32 mean and covariance per class."""
        return 4 * float((self._counts > 0).sum()) * (self._sums.shape[1] + self._sums.shape[1] ** 2)


class FeCAM(_ClassGaussians):
    """Mahalanobis distance to each class with the class's own covariance, by Avalanche's classifier.

    Features are scaled to length 1, without Tukey's transformation, since a ViT's may be negative, as in the authors'
    script for ViTs. The shrinkage adds ten times the mean variance, which was the best of six settings on test images
    of the stream `mixed`.

    Source: Goswami et al., "FeCAM: Exploiting the Heterogeneity of Class Distributions in Exemplar-Free Continual
    Learning", NeurIPS 2023.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._classifier = FeCAMClassifier(tukey=False, shrink1=2.3, shrink2=0.0)  # applied twice: 2.3 + 2.3 x 3.3

    def _fit(self, features: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> None:
        self._add(F.normalize(features, dim=1), targets)
        gaussians = self._gaussians()
        covariances = {number: covariance.float() for number, (_, covariance) in gaussians.items()}
        self._classifier.replace_class_means_dict({number: mean.float() for number, (mean, _) in gaussians.items()})
        self._classifier.replace_class_cov_dict(self._classifier.apply_cov_transforms(covariances))

    def _predict(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        chunks = F.normalize(features, dim=1).split(CHUNK)  # it computes the product of every image with every other
        scores = torch.zeros(len(features), len(self.stream.labels), dtype=torch.float32, device="cpu")
        predicted = torch.cat([self._classifier(chunk) for chunk in chunks])
        scores[:, : predicted.shape[1]] = predicted
        return scores


class GaussianReplay(_ClassGaussians):
    """Logistic regression on features drawn from a Gaussian of each class seen so far.

    It is the classifier alignment of SLCA, on the frozen feature: the head is fitted to convergence from the samples
    alone, without SLCA's fine-tuning of the backbone and normalisation of logits.

    Source: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
    ICCV 2023.
    """

    def _fit(self, features: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> None:
        self._add(features, targets)
        random = torch.Generator().manual_seed(1_000_003 * self.seed + self.num_learned)
        count, gaussians, samples = self.settings.gaussian_samples, self._gaussians(), []
        for mean, covariance in gaussians.values():
            identity = torch.eye(len(mean), dtype=torch.float64, device="cpu")
            scale = torch.linalg.cholesky(covariance + DIAGONAL * identity)
            noise = torch.randn(count, len(mean), generator=random, dtype=torch.float64, device="cpu")
            samples.append(mean + noise @ scale.T)
        drawn = torch.arange(len(gaussians), dtype=torch.int64, device="cpu").repeat_interleave(count)
        head = SingleLabel().fit_linear_probe(torch.cat(samples).float(), drawn, self.settings.gaussian_strength)
        self._seen, self._weight, self._bias = list(gaussians), head.weight, head.bias

    def _predict(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        scores = torch.zeros(len(features), len(self.stream.labels), dtype=torch.float32, device="cpu")
        scores[:, self._seen] = F.linear(features, self._weight, self._bias)
        return scores


class RanPAC(FeatureMethod):
    """Ridge regression on random features relu(f W), from sums over all images so far.

    Each experience selects the penalty anew on a held-out fifth of its images. Sums are in float64. The paper's
    first-session adaptation of the backbone is left out here, see `AdaptedRanPAC`.

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
        projection = self._projection.numel() / task_cost(self.backbone, 0).backbone_operations
        return super()._relative_inference() + projection


class AdaptedRanPAC(RanPAC):
    """RanPAC with first-session adaptation: the backbone is adapted to the first experience, and frozen from then on.

    The adaptation is a LoRA, trained as by `lora-8`; the paper's are AdaptFormer, SSF and VPT.
    """

    def _learn(self, number: int) -> None:
        if number == 0:
            experience = self.stream.experiences[0]
            images = experience.relabelled(experience.train)
            adapted = train("lora-8", self.backbone, images, self.settings, self.settings.lora_rates, self.seed)
            self.backbone = merged(self.backbone, adapted)
            self._features.clear()
        super()._learn(number)

    def _stored_bytes(self) -> float:
        return super()._stored_bytes() + sum(parameter.nbytes for parameter in self.backbone.weights.parameters())


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
