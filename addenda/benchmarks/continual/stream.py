"""A stream: experiences that come one after another, made of sets of images, each with some to be tested on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from addenda.exceptions import DataError
from addenda.learner.data.labelled import LabelledImages


@dataclass(frozen=True)
class ImageSet:
    """A set of images, to learn from and to be tested on; these are of the same classes or of fewer."""

    name: str
    train: LabelledImages
    test: LabelledImages


@dataclass(frozen=True)
class Experience(ImageSet):
    """A set as an experience of a stream: its name is valid for a task, the labels of its images are the stream's."""

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """Those that occur, as numbers among the stream's labels, rising."""
        return tuple(sorted(set(self.train.targets.tolist())))

    def own(self, images: LabelledImages) -> LabelledImages:
        """Images of this experience among its own classes alone: `targets` are places in `classes`."""
        place = {number: i for i, number in enumerate(self.classes)}
        targets = torch.tensor([place[number] for number in images.targets.tolist()], dtype=torch.long, device="cpu")
        return replace(images, labels=tuple(images.labels[number] for number in self.classes), targets=targets)


@dataclass(frozen=True)
class Stream:
    """A stream, its experiences in the order in which they come."""

    name: str
    labels: tuple[str, ...]
    experiences: tuple[Experience, ...]

    @property
    def shares_classes(self) -> bool:
        """Whether a class occurs in several experiences: the stream is domain-incremental, not class-incremental."""
        occurring = [number for one in self.experiences for number in one.classes]
        return len(set(occurring)) < len(occurring)

    @cached_property
    def fingerprints(self) -> list[list[str]]:
        """Of the training and test images of each experience."""
        return [[one.train.fingerprint(), one.test.fingerprint()] for one in self.experiences]

    def benchmark(
        self,
        train_transform: Callable[[Any], Any] | None,
        eval_transform: Callable[[Any], Tensor],
        task_labels: bool = True,
    ) -> Any:
        """The images to learn from as an Avalanche benchmark; without a transform they stay as they are, mostly PIL."""
        from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
        from avalanche.benchmarks.utils.classification_dataset import (
            ClassificationDataset,
            TaskAwareSupervisedClassificationDataset,
        )
        from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
        from avalanche.benchmarks.utils.flat_data import ConstantSequence
        from avalanche.benchmarks.utils.transform_groups import TransformGroups

        made = TaskAwareSupervisedClassificationDataset if task_labels else ClassificationDataset
        groups = {"train": (train_transform, None), "eval": (eval_transform, None)}
        datasets = []
        for number, one in enumerate(self.experiences):
            attributes = [DataAttribute(one.train.targets.tolist(), "targets")]
            if task_labels:
                attributes.append(TaskLabels(ConstantSequence(number, len(one.train))))
            transforms = TransformGroups(groups, current_group="train")
            datasets.append(made([_Pictures(one.train)], transform_groups=transforms, data_attributes=attributes))
        known = with_classes_timeline(benchmark_from_datasets(train=datasets))
        return with_task_labels(known) if task_labels else known


class _Pictures(Dataset[tuple[Any, int]]):
    """Labelled images as they are held, each with the number of its class."""

    def __init__(self, images: LabelledImages) -> None:
        self._images, self._targets = images, images.targets.tolist()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._images.item(index).picture(), self._targets[index]


def slug(name: str) -> str:
    """A folder's name as a valid name of a task."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_") or "stream"


def by_class(
    name: str,
    images: ImageSet,
    num_experiences: int,
    class_order: str | int | Sequence[str] = "sorted",
    first: int | None = None,
) -> Stream:
    """A stream whose experiences have classes of their own; its labels stand in the order in which they come."""
    sizes = _sizes(images.name, len(images.train.labels), num_experiences, first)
    labels = _in_order(images.name, images.train.labels, class_order)
    parts = [_labelled(part, labels, part.labels) for part in (images.train, images.test)]
    of_class = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device="cpu"))
    experiences = []
    for number in range(num_experiences):
        train, test = (part.select((of_class[part.targets] == number).nonzero().flatten().tolist()) for part in parts)
        experiences.append(Experience(f"{name}-{number + 1:0{len(str(num_experiences))}}", train, test))
    return Stream(name, labels, tuple(experiences))


def by_set(name: str, sets: Sequence[ImageSet], shared_labels: bool) -> Stream:
    """A stream of which each set is one experience; equal class names mean one class, else it is `set/class`."""
    names = [slug(one.name) for one in sets]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(
            f"Two sets of the stream {name!r} are called {repeated[0]!r}. Give each folder a name of its own."
        )

    def called(one: ImageSet, part: LabelledImages) -> list[str]:
        return [label if shared_labels else f"{one.name}/{label}" for label in part.labels]

    labels = tuple(dict.fromkeys(label for one in sets for label in called(one, one.train)))
    experiences = []
    for experience, one in zip(names, sets, strict=True):
        train, test = (_labelled(part, labels, called(one, part)) for part in (one.train, one.test))
        experiences.append(Experience(experience, train, test))
    return Stream(name, labels, tuple(experiences))


def limited(stream: Stream, limit: int | None, test_limit: int | None, seed: int) -> Stream:
    """The stream with fewer images: each class of an experience gives as many as the others, or all it has."""

    def drawn(one: Experience, images: LabelledImages, what: str, limit: int | None, each: int) -> LabelledImages:
        if limit is None or limit >= len(images):
            return images
        if limit < (least := each * len(one.classes)):
            raise DataError(
                f"The `{what}` of {limit} images is too small for experience {one.name!r}: its classes need {least}."
            )
        order = np.random.default_rng(seed).permutation(len(images)).tolist()
        return images.select(in_turn(order, images.targets.tolist(), limit))

    experiences = []
    for one in stream.experiences:
        train = drawn(one, one.train, "limit", limit, 2)  # one of the two to validate by
        experiences.append(replace(one, train=train, test=drawn(one, one.test, "test_limit", test_limit, 1)))
    return replace(stream, experiences=tuple(experiences))


def in_turn(order: Sequence[int], targets: Sequence[int], limit: int) -> list[int]:
    """So many rows: of each class the first in the order, then of each the second, and so on; sorted."""
    seen: Counter[int] = Counter()
    turn = {}
    for row in order:
        turn[row] = seen[targets[row]]
        seen[targets[row]] += 1
    return sorted(sorted(order, key=turn.__getitem__)[:limit])


def _labelled(images: LabelledImages, labels: tuple[str, ...], called: Sequence[str]) -> LabelledImages:
    """The images with targets among the stream's labels, where their own classes are called so."""
    numbers = torch.tensor([labels.index(label) for label in called], dtype=torch.int64, device="cpu")
    return replace(images, labels=labels, targets=numbers[images.targets])


def _sizes(name: str, num_classes: int, num_experiences: int, first: int | None) -> list[int]:
    """Classes of each experience."""
    others = num_experiences - 1
    each = num_classes // num_experiences if first is None else (num_classes - first) // others
    sizes = [first or each, *[each] * others]
    if sum(sizes) == num_classes and min(sizes) >= 2:
        return sizes
    fits = [n for n in range(2, num_classes // 2 + 1) if num_classes % n == 0]
    firsts = [n for n in range(2, num_classes - 2 * others + 1) if (num_classes - n) % others == 0]
    hints = [f"{', '.join(map(str, fits))} experiences"] if fits else []
    if firsts:
        hints.append(f"a `first` of {min(firsts, key=lambda n: abs(n - num_classes / num_experiences))} classes")
    elif num_classes >= 4:
        hints.append(f"up to {num_classes // 2} with `first`, the classes of the first one, in a YAML file")
    asked = f", {first} in the first," if first else ""
    raise DataError(
        f"The {num_classes} classes of {name!r}{asked} do not divide evenly into {num_experiences} experiences of two "
        f"classes or more. What fits: {', or '.join(hints) or 'nothing; it has too few classes'}."
    )


def _in_order(name: str, labels: tuple[str, ...], class_order: str | int | Sequence[str]) -> tuple[str, ...]:
    """The classes in the order in which they come."""
    if class_order == "sorted":
        return labels
    if isinstance(class_order, int):  # as PyCIL and LAMDA-PILOT draw it, most often with 1993
        return tuple(labels[i] for i in np.random.RandomState(class_order).permutation(len(labels)))
    missing, unknown = sorted(set(labels) - set(class_order)), sorted(set(class_order) - set(labels))
    if missing or unknown or len(class_order) != len(labels):
        wrong = [f"lacks {', '.join(map(repr, missing))}"] if missing else []
        wrong += [f"has {', '.join(map(repr, unknown))}, which it does not know"] if unknown else []
        raise DataError(
            f"`class_order` must name each class of {name!r} once: it {' and '.join(wrong) or 'names one twice'}."
        )
    return tuple(class_order)
