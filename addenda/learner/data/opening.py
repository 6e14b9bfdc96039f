"""What can be learned from: a folder of class folders, a listing, a torch Dataset, or a Hugging Face one."""

from __future__ import annotations

import os
from pathlib import Path

from addenda.exceptions import DataError
from addenda.learner.data.folders import Part, open_folder, parts_of
from addenda.learner.data.hub import HubDataset, hub_has_test_part, open_hub_dataset
from addenda.learner.data.labelled import ImageDataset, LabelledImages
from addenda.learner.data.learnable import check_learnable, check_same_labels
from addenda.learner.data.listings import SUFFIXES, listing_has_test_part, open_listing
from addenda.learner.data.torch_datasets import open_torch_dataset

Data = str | Path | ImageDataset | HubDataset


def open_images(data: Data, part: Part = "train") -> LabelledImages:
    """Opens a data set without reading its images.

    Args:
        data: a folder with one folder of images for each class; a CSV or Parquet listing; a torch Dataset; or a Hugging
            Face Dataset or DatasetDict.
        part: which part, of data that has its own: a folder with train/ and test/ in it, a listing with a column
            `split`, a DatasetDict. Of other data, all.

    Raises:
        DataError: it is missing or empty, lacks that part, or does not say what each image is.
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
        return hub_has_test_part(data)
    if not isinstance(data, str | Path):
        return False
    place = Path(data)
    if _is_listing(place):
        return listing_has_test_part(place)
    return place.is_dir() and {"train", "test"} <= parts_of(place).keys()


def _is_listing(place: Path) -> bool:
    return place.suffix.lower() in SUFFIXES and not os.path.isdir(place)


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
    return images, check_same_labels(
        images.labels, open_images(test, "test").check_whole(skip_bad), images.objective.name
    )
