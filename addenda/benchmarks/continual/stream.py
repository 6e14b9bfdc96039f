"""Streams of experiences, each with training and test images, and how datasets become experiences."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from addenda.exceptions import DataError
from addenda.learner.data.labelled import LabelledImages


@dataclass(frozen=True)
class ImageSet:
    """A dataset with a training and a test split; the test split may lack classes."""

    name: str
    train: LabelledImages
    test: LabelledImages


@dataclass(frozen=True)
class Experience(ImageSet):
    """An experience of a stream: its name is a valid task name, and its labels are those of the whole stream."""

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """Classes of the training images, as sorted indices into the stream's labels."""
        return tuple(sorted(set(self.train.targets.tolist())))

    def relabelled(self, images: LabelledImages) -> LabelledImages:
        """Images of this experience with only its own labels; targets are indices into `classes`."""
        index = {number: i for i, number in enumerate(self.classes)}
        targets = torch.tensor([index[number] for number in images.targets.tolist()], dtype=torch.long, device="cpu")
        return replace(images, labels=tuple(images.labels[number] for number in self.classes), targets=targets)


@dataclass(frozen=True)
class Stream:
    """A stream of experiences, in order."""

    name: str
    labels: tuple[str, ...]
    experiences: tuple[Experience, ...]

    @cached_property
    def fingerprints(self) -> list[list[str]]:
        """Fingerprints of the training and test images of each experience."""
        return [[experience.train.fingerprint(), experience.test.fingerprint()] for experience in self.experiences]

    def benchmark(
        self,
        train_transform: Callable[[Any], Any] | None,
        eval_transform: Callable[[Any], Tensor],
        task_labels: bool = True,
    ) -> Any:
        """The training images as an Avalanche benchmark; without `train_transform` they stay as stored, mostly PIL."""
        from avalanche.benchmarks import benchmark_from_datasets, utils, with_classes_timeline, with_task_labels
        from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset

        kind = utils.TaskAwareSupervisedClassificationDataset if task_labels else ClassificationDataset
        groups = {"train": (train_transform, None), "eval": (eval_transform, None)}
        datasets = []
        for number, images in enumerate(experience.train for experience in self.experiences):
            attributes = [utils.DataAttribute(images.targets.tolist(), "targets")]
            if task_labels:
                attributes.append(utils.TaskLabels(utils.ConstantSequence(number, len(images))))
            transforms = utils.TransformGroups(groups, current_group="train")
            datasets.append(kind([_Pictures(images)], transform_groups=transforms, data_attributes=attributes))
        benchmark = with_classes_timeline(benchmark_from_datasets(train=datasets))
        return with_task_labels(benchmark) if task_labels else benchmark


class _Pictures(Dataset[tuple[Any, int]]):
    """Labelled images without a transform, each with its class index."""

    def __init__(self, images: LabelledImages) -> None:
        self._images, self._targets = images, images.targets.tolist()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._images.item(index).picture(), self._targets[index]


def slug(name: str) -> str:
    """Turn a folder's name into a valid task name."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_") or "stream"


def by_class(
    name: str, images: ImageSet, num_experiences: int, class_order: str | int | Sequence[str], first: int | None = None
) -> Stream:
    """Split the classes of a dataset into disjoint experiences; the stream's labels follow the class order."""
    sizes = _num_classes(images.name, len(images.train.labels), num_experiences, first)
    labels = _ordered_labels(images.name, images.train.labels, class_order)
    experience_of = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device="cpu"))
    splits = [(split, experience_of[split.targets]) for split in _relabelled(images, labels)]
    experiences = []
    for number in range(num_experiences):
        train, test = (split.select((of == number).nonzero().flatten().tolist()) for split, of in splits)
        experiences.append(Experience(f"{name}-{number + 1:0{len(str(num_experiences))}}", train, test))
    return Stream(name, labels, tuple(experiences))


def by_set(name: str, sets: Sequence[ImageSet]) -> Stream:
    """Make each dataset an experience; equal class names are one class."""
    names = [slug(dataset.name) for dataset in sets]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(f"Stream {name!r} has two datasets named {repeated[0]!r}. Rename one of the folders.")
    labels = tuple(dict.fromkeys(label for dataset in sets for label in dataset.train.labels))
    experiences = zip(names, sets, strict=True)
    return Stream(name, labels, tuple(Experience(name, *_relabelled(dataset, labels)) for name, dataset in experiences))


def distinct(images: ImageSet) -> ImageSet:
    """Rename each class to `dataset/class`, so that it differs from those of other datasets."""
    splits = (images.train, images.test)
    renamed = (replace(split, labels=tuple(f"{images.name}/{label}" for label in split.labels)) for split in splits)
    return ImageSet(images.name, *renamed)


def limited(stream: Stream, limit: int | None, test_limit: int | None, seed: int) -> Stream:
    """Limit the images of each experience, drawn by the seed and balanced over classes as far as they go."""

    def subset(experience: Experience, split: str, setting: str, limit: int | None, per_class: int) -> LabelledImages:
        images: LabelledImages = getattr(experience, split)
        if limit is None or limit >= len(images):
            return images
        if limit < (minimum := per_class * len(experience.classes)):
            raise DataError(
                f"`{setting}` of {limit} images is too small for experience {experience.name!r}; its classes need at "
                f"least {minimum}."
            )
        order = np.random.default_rng(seed).permutation(len(images)).tolist()
        return images.select(round_robin(order, images.targets.tolist(), limit))

    experiences = []
    for experience in stream.experiences:
        train = subset(experience, "train", "limit", limit, 2)  # one for training and one for validation
        test = subset(experience, "test", "test_limit", test_limit, 1)
        experiences.append(replace(experience, train=train, test=test))
    return replace(stream, experiences=tuple(experiences))


def round_robin(order: Sequence[int], targets: Sequence[int], limit: int) -> list[int]:
    """Take `limit` rows: the first of each class in the order, then the second of each, and so on; sorted."""
    turns = defaultdict[int, Iterator[int]](count)
    turn = {row: next(turns[targets[row]]) for row in order}
    return sorted(sorted(order, key=turn.__getitem__)[:limit])


def _relabelled(images: ImageSet, labels: tuple[str, ...]) -> list[LabelledImages]:
    """Both splits with targets as indices into the stream's labels."""
    splits = []
    for split in (images.train, images.test):
        numbers = torch.tensor([labels.index(label) for label in split.labels], dtype=torch.int64, device="cpu")
        splits.append(replace(split, labels=labels, targets=numbers[split.targets]))
    return splits


def _num_classes(name: str, num_classes: int, num_experiences: int, first: int | None) -> list[int]:
    """Number of classes of each experience; raises DataError with suggestions if they do not divide evenly."""
    others = num_experiences - 1
    per_experience = num_classes // num_experiences if first is None else (num_classes - first) // others
    sizes = [first or per_experience, *[per_experience] * others]
    if sum(sizes) == num_classes and min(sizes) >= 2:
        return sizes
    divisors = [n for n in range(2, num_classes // 2 + 1) if num_classes % n == 0]
    firsts = [n for n in range(2, num_classes - 2 * others + 1) if (num_classes - n) % others == 0]
    hints = [f"{', '.join(map(str, divisors))} equal experiences (--split)"] if divisors else []
    if firsts:
        hints.append(f"`first: {min(firsts, key=lambda n: abs(n - num_classes / num_experiences))}`")
    elif num_classes >= 4:
        hints.append(f"up to {num_classes // 2} experiences with `first`, the size of the first one, in a YAML file")
    with_first = f", {first} in the first," if first else ""
    raise DataError(
        f"The {num_classes} classes of {name!r}{with_first} do not divide evenly into {num_experiences} experiences of "
        f"at least two classes. Use {', or '.join(hints) or 'a dataset with at least four classes'}."
    )


def _ordered_labels(name: str, labels: tuple[str, ...], class_order: str | int | Sequence[str]) -> tuple[str, ...]:
    """The labels in the order in which their classes are learned."""
    if class_order == "sorted":
        return labels
    if isinstance(class_order, int):  # drawn as in PyCIL and LAMDA-PILOT, usually with seed 1993
        return tuple(labels[i] for i in np.random.RandomState(class_order).permutation(len(labels)))
    missing, unknown = sorted(set(labels) - set(class_order)), sorted(set(class_order) - set(labels))
    if missing or unknown or len(class_order) != len(labels):
        problems = [f"lacks {', '.join(map(repr, missing))}"] if missing else []
        problems += [f"has unknown {', '.join(map(repr, unknown))}"] if unknown else []
        raise DataError(
            f"`class_order` must list each class of {name!r} once; it {' and '.join(problems) or 'repeats a class'}."
        )
    return tuple(class_order)
