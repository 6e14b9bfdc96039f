"""What can be learned from: a folder of class folders, a listing, a torch Dataset, or a Hugging Face one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from addenda.exceptions import DataError
from addenda.learner.data.folders import Part, class_name, open_folder, parts_of
from addenda.learner.data.hub import HubDataset, open_hub_dataset
from addenda.learner.data.labelled import UNREADABLE, ImageDataset, LabelledImages
from addenda.learner.data.listings import SUFFIXES, listing_has_test_part, open_listing
from addenda.learner.data.torch_datasets import open_torch_dataset
from addenda.registry import check_labels

Data = str | Path | ImageDataset | HubDataset


def open_parts(
    train: Data, test: Data | None = None, skip_bad: bool = False
) -> tuple[LabelledImages, LabelledImages | None]:
    """Opens what to learn from and what to score on, and checks both without reading an image.

    Args:
        train: what to learn from.
        test: what to score on; None takes the test part of `train` where there is one.
        skip_bad: whether images that cannot be had are to be left out.

    Raises:
        DataError: either cannot be opened, or cannot be learned from, or they have other classes.
    """
    images = open_images(train).check_whole(skip_bad)
    check_learnable(images)
    test = train if test is None and has_test_part(train) else test
    if test is None:
        return images, None
    scored_on = open_images(test, "test").check_whole(skip_bad)
    return images, check_same_labels(images.labels, scored_on, images.objective.name)


def open_images(data: Data, part: Part = "train") -> LabelledImages:
    """Opens a data set, or the part of data that has its own, without reading its images.

    Parts are train/ and test/ in a folder, a column `split` of a listing, those of a DatasetDict.
    """
    if isinstance(data, HubDataset):
        return open_hub_dataset(data, part)
    if not isinstance(data, str | Path):
        return open_torch_dataset(data)
    place = Path(data)
    if _is_listing(place):
        return open_listing(place, part)
    if os.path.isfile(place):
        raise DataError(
            f"{str(place)!r} is a file. Give a folder with one folder of images for each class, or a listing that ends "
            f"in {' or '.join(SUFFIXES)}."
        )
    return open_folder(place, part)


def has_test_part(data: Data) -> bool:
    """Whether data has a test part of its own beside the part to learn from."""
    if isinstance(data, HubDataset):
        return isinstance(data, Mapping) and "test" in data
    if not isinstance(data, str | Path):
        return False
    place = Path(data)
    if _is_listing(place):
        return listing_has_test_part(place)
    return place.is_dir() and {"train", "test"} <= parts_of(place).keys()


def _is_listing(place: Path) -> bool:
    return place.suffix.lower() in SUFFIXES and not os.path.isdir(place)


def check_learnable(images: LabelledImages) -> None:
    """Raises DataError where there are too few classes or images to learn and validate from."""
    check_labels(images.labels)
    repeated = sorted(label for label, count in Counter(images.labels).items() if count > 1)
    if repeated:
        raise DataError(f"{images.where} has several classes named {repeated[0]!r}; each needs a name of its own.")
    counts = images.counts
    short = [(label, count) for label, count in zip(images.labels, counts, strict=True) if count < 2]
    if short:
        label, count = short[0]
        more = f", and {len(short) - 1} more classes like it" if len(short) > 1 else ""
        raise DataError(
            f"Class {label!r} in {images.where} has {count} image{'' if count == 1 else 's'}{more}: each class needs "
            "two at least, one to learn from and one to validate on."
        )
    common = [images.labels[label] for label in images.objective.too_common(counts, len(images))]
    if common:
        more = f", and so are {len(common) - 1} more labels" if len(common) > 1 else ""
        raise DataError(
            f"Label {common[0]!r} in {images.where} is on every image, or on all but one{more}: two at least must be "
            "without it, one to learn from and one to validate on."
        )


def check_same_labels(labels: Sequence[str], images: LabelledImages, objective: str) -> LabelledImages:
    """The images with targets in the order of a task's labels; they may lack some, which no image has."""
    if images.objective.name != objective:
        raise DataError(f"{images.where} is {images.objective.name}; the task is {objective}.")
    wanted = [class_name(label) for label in labels]
    missing, extra = sorted(set(wanted) - set(images.labels)), sorted(set(images.labels) - set(wanted))
    if extra:
        parts = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"it has {', '.join(map(repr, extra))} besides"]
        raise DataError(f"{images.where} does not have the task's classes: {' and '.join(parts)}.")
    order = torch.tensor([wanted.index(label) for label in images.labels], dtype=torch.long, device="cpu")
    targets = images.objective.reordered(images.targets, order, len(labels))
    return replace(images, labels=tuple(labels), targets=targets)


def repeats(train: LabelledImages, test: LabelledImages | None) -> dict[str, int]:
    """Counts hashed images that are byte for byte the same and should not be.

    `classes`: images to learn from that have other labels too; `test`: images to score on that are learned from.
    """
    assert train.digests is not None
    answers: dict[str, set[str]] = {}
    for digest, target in zip(train.digests, train.targets.tolist(), strict=True):
        if digest != UNREADABLE:
            answers.setdefault(digest, set()).add(train.answer(target))
    return {
        "classes": sum(len(answers.get(digest, ())) > 1 for digest in train.digests),
        "test": 0 if test is None else sum(test.digest(index) in answers for index in range(len(test))),
    }
