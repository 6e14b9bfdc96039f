"""A stream: experiences that come one after another, each with images to learn from and images to be tested on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from addenda.learner.data.labelled import LabelledImages


@dataclass(frozen=True)
class Experience:
    """One experience.

    Attributes:
        name: what it is called; a valid name of a task.
        classes: the classes that occur, as numbers among the stream's labels, rising.
        train: images to learn from; `labels` are the stream's, and `targets` count among them.
        test: images to be tested on, likewise.
    """

    name: str
    classes: tuple[int, ...]
    train: LabelledImages
    test: LabelledImages

    def own(self, images: LabelledImages) -> LabelledImages:
        """Images of this experience among its own classes alone: `targets` are places in `classes`."""
        place = {number: i for i, number in enumerate(self.classes)}
        targets = torch.tensor([place[number] for number in images.targets.tolist()], dtype=torch.long, device="cpu")
        return replace(images, labels=tuple(images.labels[number] for number in self.classes), targets=targets)


@dataclass(frozen=True)
class Stream:
    """A stream.

    Attributes:
        experiences: in the order in which they come.
    """

    name: str
    labels: tuple[str, ...]
    experiences: tuple[Experience, ...]

    @property
    def shares_classes(self) -> bool:
        """Whether a class occurs in several experiences: the stream is domain-incremental, not class-incremental."""
        occurring = [number for one in self.experiences for number in one.classes]
        return len(set(occurring)) < len(occurring)

    def benchmark(
        self,
        train_transform: Callable[[Any], Any] | None,
        eval_transform: Callable[[Any], Tensor],
        task_labels: bool = True,
    ) -> Any:
        """The stream as an Avalanche benchmark.

        Args:
            train_transform: what becomes of an image to learn from; None leaves it as it is, a PIL image in most cases.
            eval_transform: what becomes of an image to be tested on, and of one to learn from when it is evaluated.
            task_labels: whether experience i carries the task label i.
        """
        from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
        from avalanche.benchmarks.utils.classification_dataset import (
            ClassificationDataset,
            TaskAwareSupervisedClassificationDataset,
        )
        from avalanche.benchmarks.utils.data_attribute import DataAttribute
        from avalanche.benchmarks.utils.flat_data import ConstantSequence
        from avalanche.benchmarks.utils.transform_groups import TransformGroups

        def dataset(images: LabelledImages, number: int, transform: Callable[[Any], Any] | None, group: str) -> Any:
            groups = {"train": (transform, None), "eval": (eval_transform, None)}
            attributes = [DataAttribute(images.targets.tolist(), "targets")]
            if task_labels:
                labels = ConstantSequence(number, len(images))
                attributes.append(DataAttribute(labels, "targets_task_labels", use_in_getitem=True))
            made = TaskAwareSupervisedClassificationDataset if task_labels else ClassificationDataset
            return made(
                [_Pictures(images)],
                transform_groups=TransformGroups(groups, current_group=group),
                data_attributes=attributes,
            )

        benchmark = benchmark_from_datasets(
            train=[dataset(one.train, i, train_transform, "train") for i, one in enumerate(self.experiences)],
            test=[dataset(one.test, i, eval_transform, "eval") for i, one in enumerate(self.experiences)],
        )
        known = with_classes_timeline(benchmark)
        return with_task_labels(known) if task_labels else known


def slug(name: str) -> str:
    """A folder's name as a valid name of a task."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_") or "stream"


class _Pictures(Dataset[tuple[Any, int]]):
    """Labelled images as they are held, each with the number of its class."""

    def __init__(self, images: LabelledImages) -> None:
        self._images = images
        self.targets = images.targets.tolist()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._images.item(index).picture(), self.targets[index]
