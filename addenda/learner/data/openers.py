"""Opens and checks training and test data: folders of class folders, listings, torch and Hugging Face datasets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from addenda.exceptions import DataError
from addenda.learner.data.folders import Split, class_name, open_folder, split_folders
from addenda.learner.data.hub import HubDataset, open_hub_dataset
from addenda.learner.data.labelled import UNREADABLE, ImageDataset, LabelledImages
from addenda.learner.data.listings import SUFFIXES, listing_has_test_split, open_listing
from addenda.learner.data.torch_datasets import open_torch_dataset
from addenda.registry import check_labels

Data = str | Path | ImageDataset | HubDataset


def open_parts(
    train: Data, test: Data | None = None, skip_bad: bool = False
) -> tuple[LabelledImages, LabelledImages | None]:
    """Opens training and test data, and checks both without reading an image.

    Args:
        train: the training data.
        test: the test data; None takes the test split of `train`, if it has one.
        skip_bad: skip images that cannot be loaded.

    Raises:
        DataError: the data cannot be opened or learned from, or training and test classes differ.
    """
    images = open_images(train).check_whole(skip_bad)
    check_learnable(images)
    test = train if test is None and has_test_part(train) else test
    if test is None:
        return images, None
    test_images = open_images(test, "test").check_whole(skip_bad)
    return images, check_same_labels(images.labels, test_images, images.objective.name)


def open_images(data: Data, split: Split = "train") -> LabelledImages:
    """Opens a dataset, or the given split of data that has splits, without reading its images.

    Splits are train/ and test/ in a folder, a column `split` of a listing, or the keys of a DatasetDict.
    """
    if isinstance(data, HubDataset):
        return open_hub_dataset(data, split)
    if not isinstance(data, str | Path):
        return open_torch_dataset(data)
    path = Path(data)
    if _is_listing(path):
        return open_listing(path, split)
    if os.path.isfile(path):
        raise DataError(
            f"{str(path)!r} is not a folder or listing. Pass a folder with one folder of images per class, or a "
            f"listing that ends in {' or '.join(SUFFIXES)}."
        )
    return open_folder(path, split)


def has_test_part(data: Data) -> bool:
    """Whether data has a test split beside the training split."""
    if isinstance(data, HubDataset):
        return isinstance(data, Mapping) and "test" in data
    if not isinstance(data, str | Path):
        return False
    path = Path(data)
    if _is_listing(path):
        return listing_has_test_split(path)
    return path.is_dir() and {"train", "test"} <= split_folders(path).keys()


def _is_listing(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not os.path.isdir(path)


def check_learnable(images: LabelledImages) -> None:
    """Raises DataError if there are too few classes, or too few images of a class for training and validation."""
    check_labels(images.labels)
    repeated = sorted(label for label, count in Counter(images.labels).items() if count > 1)
    if repeated:
        raise DataError(f"{images.where} has several classes named {repeated[0]!r}; class names must be unique.")
    counts = images.counts
    short = [(label, count) for label, count in zip(images.labels, counts, strict=True) if count < 2]
    if short:
        label, count = short[0]
        more = f", and {len(short) - 1} more classes have fewer than two" if len(short) > 1 else ""
        raise DataError(
            f"Class {label!r} in {images.where} has {count} image{'' if count == 1 else 's'}{more}: each class needs "
            "at least two, one for training and one for validation."
        )
    common = [images.labels[label] for label in images.objective.too_common(counts, len(images))]
    if common:
        more = f", and so are {len(common) - 1} more labels" if len(common) > 1 else ""
        raise DataError(
            f"Label {common[0]!r} in {images.where} is on every image, or on all but one{more}: at least two images "
            "must lack it, one for training and one for validation."
        )


def check_same_labels(labels: Sequence[str], images: LabelledImages, objective: str) -> LabelledImages:
    """The images with their targets in the order of a task's labels. Not every label needs an image."""
    if images.objective.name != objective:
        raise DataError(
            f"{images.where} is {images.objective.name}; the task is {objective}. Give it {objective} data."
        )
    expected = [class_name(label) for label in labels]
    missing, extra = sorted(set(expected) - set(images.labels)), sorted(set(images.labels) - set(expected))
    if extra:
        differences = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
        differences += [f"it also has {', '.join(map(repr, extra))}"]
        raise DataError(
            f"{images.where} does not have the classes of the task: {' and '.join(differences)}. Rename or remove the "
            "classes that the task lacks."
        )
    order = torch.tensor([expected.index(label) for label in images.labels], dtype=torch.long, device="cpu")
    targets = images.objective.reordered(images.targets, order, len(labels))
    return replace(images, labels=tuple(labels), targets=targets)


def repeats(train: LabelledImages, test: LabelledImages | None) -> dict[str, int]:
    """Counts identical images, byte for byte, among hashed images.

    `classes`: training images that also occur with other labels; `test`: test images that are training images too.
    """
    assert train.digests is not None
    labels: dict[str, set[str]] = {}
    for digest, target in zip(train.digests, train.targets.tolist(), strict=True):
        if digest != UNREADABLE:
            labels.setdefault(digest, set()).add(train.label_text(target))
    return {
        "classes": sum(len(labels.get(digest, ())) > 1 for digest in train.digests),
        "test": 0 if test is None else sum(test.digest(index) in labels for index in range(len(test))),
    }
