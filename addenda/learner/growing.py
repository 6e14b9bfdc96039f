"""Growing a task: its next version with further classes or images, from the statistics of those it was learned from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from addenda.backbones import FrozenBackbone
from addenda.combined import feature_statistics
from addenda.combined.model import check_fits
from addenda.combined.routing.statistics import can_be_grown, known_classes, unsampled_classes
from addenda.exceptions import DataError, RegistryError
from addenda.learner.activations import Activations
from addenda.learner.closed_form import closed_form
from addenda.learner.data import Data, LabelledImages, check_same_labels, open_images
from addenda.learner.data.labelled import class_name, ten_of
from addenda.learner.data.openers import open_test
from addenda.learner.objectives import OBJECTIVES
from addenda.learner.probes import as_tensors
from addenda.registry import FeatureStatistics, Registry, Task

AGAIN = "Learn it again from all its images, with --new-version."

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Growth:
    """A registered task, and the statistics from which its next version grows."""

    task: Task
    statistics: FeatureStatistics

    @classmethod
    def of(cls, registry: Registry, ref: str, backbone: FrozenBackbone) -> Growth:
        """The growth of a registered task; raises an error unless it can grow on this backbone."""
        task = registry.get(ref)
        check_fits(task, backbone)
        if not OBJECTIVES[task.objective].routable:
            raise RegistryError(f"Task {task.ref!r} is {task.objective}; only a single-label task can grow. {AGAIN}")
        statistics = registry.statistics(ref)
        if statistics is None:
            raise RegistryError(f"Task {task.ref!r} has no routing statistics, from which a task grows. {AGAIN}")
        if not can_be_grown(statistics, backbone.embed_dim, backbone.num_layer_features):
            raise RegistryError(f"The routing statistics of task {task.ref!r} are of other features. {AGAIN}")
        return cls(task, statistics)

    def open(self, data: Data, test: Data | None, skip_bad: bool) -> tuple[LabelledImages, LabelledImages | None]:
        """Opens the further images and test images; their labels are the task's, then new ones in sorted order."""
        images = open_images(data).check_whole(skip_bad)
        known = {class_name(label) for label in self.task.labels}
        labels = (*self.task.labels, *sorted(set(images.labels) - known))
        images = check_same_labels(labels, images, self.task.objective)
        return images, open_test(data, test, labels, self.task.objective, skip_bad)

    def new_images(self, images: LabelledImages) -> LabelledImages:
        """The hashed images that the task was not learned from.

        Raises:
            DataError: there are none, or the task was learned from one of them with another label.
        """
        assert images.digests is not None
        ref = self.task.ref
        if images.fingerprint() in _datasets(self.task):
            raise DataError(f"{images.where} has nothing new: task {ref!r} was learned from it. Give it other images.")
        if self.statistics.digests is None:
            log.warning(
                "It was not recorded which images %s was learned from: if one is given again, it counts twice.", ref
            )
            return images
        known, targets = known_classes(self.statistics, images.digests), images.targets.tolist()
        contradicted = [
            f"{images.item(row).called} ({self.task.labels[min(labels)]!r}, now {images.labels[targets[row]]!r})"
            for row, labels in enumerate(known)
            if labels and targets[row] not in labels
        ]
        if contradicted:
            raise DataError(
                f"Task {ref!r} was learned from {len(contradicted)} of the images with other labels:"
                f"{ten_of(contradicted)}\nRemove or move them, or learn it from all its images with --new-version."
            )
        rows = [row for row, labels in enumerate(known) if not labels]
        if not rows:
            raise DataError(f"{images.where} has nothing new: task {ref!r} was learned from all its images.")
        return images.select(rows)

    def version(self, activations: Activations, dataset: str, known: int) -> tuple[Task, FeatureStatistics]:
        """The next version of the task, not registered, and its statistics.

        Args:
            activations: those of the new images.
            dataset: fingerprint of the given dataset.
            known: number of its images that the task was learned from.
        """
        old, objective = self.task, activations.objective
        statistics = feature_statistics(
            activations.pooled, activations.targets, activations.num_classes, activations.layers[0],
            activations.digests, self.statistics,
        )  # fmt: skip
        if unread := [activations.labels[label] for label in (statistics.counts == 0).nonzero()[:, 0].tolist()]:
            raise DataError(f"No image of class {unread[0]!r} can be read. Fix its images, or remove the class.")
        fit = closed_form(statistics)
        if unsampled := [activations.labels[label] for label in unsampled_classes(statistics)]:
            log.warning(
                "The next version of %s has no validation score, a fixed shrinkage and temperature 1: its statistics "
                "have no sampled image of class %r%s, which takes three images.",
                old.name, unsampled[0], f" and {len(unsampled) - 1} others" if len(unsampled) > 1 else "",
            )  # fmt: skip
        if fit.head.layer_weight is None and old.num_layer_features:
            log.warning(
                "The statistics of %s lack layer features: its next version reads the pooled feature alone.", old.ref
            )
        if old.class_token is not None:
            log.warning(
                "The next version of %s has a head alone; the class token of %s is not continued.", old.name, old.ref
            )
        temperature = objective.fit_temperature(fit.sample_logits, fit.sample_targets)
        metrics: dict[str, Any] = {}
        if len(fit.sample_targets):
            scores = objective.score(fit.sample_logits / temperature, fit.sample_targets, activations.labels)
            metrics["validation"] = scores
        task = Task(
            name=old.name, backbone=old.backbone, labels=activations.labels, objective=objective.name,
            temperature=temperature, metrics=metrics, **as_tensors(fit.head),
            data={
                "num_images": int(statistics.counts.sum()),
                "counts": statistics.counts.tolist(),
                "grown_from": {"version": old.version, "sha256": old.sha256, "added": len(activations), "known": known},
                "datasets": [*_datasets(old), dataset],
            },
        )  # fmt: skip
        return task, statistics


def _datasets(task: Task) -> list[str]:
    """Fingerprints of the datasets that a task was learned from, and grown by."""
    return task.data.get("datasets") or [(task.data.get("run") or {}).get("data")]


def warn_of_repeats(ref: str, statistics: FeatureStatistics | None, test: LabelledImages) -> None:
    """Warns of test images that a task was learned from, by its statistics."""
    if statistics is not None and statistics.digests is not None and test.digests is not None:
        repeated = sum(map(bool, known_classes(statistics, test.digests)))
        if repeated:
            log.warning("%s was learned from %d of the test images: the score is inflated.", ref, repeated)
