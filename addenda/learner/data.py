"""What can be learned from: a folder of class folders, a listing, a torch Dataset, or a Hugging Face one."""

from __future__ import annotations

import sys
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from addenda.backbones import SUFFIXES, read_image
from addenda.exceptions import DataError
from addenda.learner import hub_datasets, listings
from addenda.learner.hub_datasets import HubDataset
from addenda.learner.labelled import ImageDataset, LabelledImages, class_name
from addenda.learner.learnable import check_learnable, check_same_labels

__all__ = [
    "Data",
    "LabelledImages",
    "check_learnable",
    "check_same_labels",
    "has_test_part",
    "open_images",
    "open_parts",
]

Data = str | Path | ImageDataset | HubDataset
Part = Literal["train", "test"]


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
        return hub_datasets.open_dataset(data, part)
    if not isinstance(data, str | Path):
        return _from_dataset(data)
    place = Path(data)
    if place.suffix.lower() in listings.SUFFIXES and not place.is_dir():
        return listings.open_listing(place, part)
    if place.is_file():
        raise DataError(
            f"{str(place)!r} is a file. Give a folder with one folder of images for each class, or a listing that ends "
            f"in {' or '.join(listings.SUFFIXES)}."
        )
    if not _is_divided(place):
        return _from_folder(place)
    if not (place / part).is_dir():
        raise DataError(f"{str(place)!r} has train/ in it and no {part}/.")
    return _from_folder(place / part)


def has_test_part(data: Data) -> bool:
    """Whether data has a test part of its own beside the part to learn from."""
    if isinstance(data, HubDataset):
        return hub_datasets.has_test_part(data)
    if not isinstance(data, str | Path):
        return False
    if Path(data).suffix.lower() in listings.SUFFIXES and not Path(data).is_dir():
        return listings.has_test_part(Path(data))
    return _is_divided(Path(data)) and (Path(data) / "test").is_dir()


def open_parts(train: Data, test: Data | None = None) -> tuple[LabelledImages, LabelledImages | None]:
    """Opens what to learn from and what to score on, and checks both without reading an image.

    Args:
        train: what to learn from.
        test: what to score on; None takes the test part of `train` where there is one.

    Raises:
        DataError: either cannot be opened, or cannot be learned from, or they have other classes.
    """
    images = open_images(train)
    check_learnable(images)
    test = train if test is None and has_test_part(train) else test
    if test is None:
        return images, None
    return images, check_same_labels(images.labels, open_images(test, "test"), images.objective)


def _is_divided(folder: Path) -> bool:
    return (folder / "train").is_dir()


def _from_folder(folder: Path) -> LabelledImages:
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}.")
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if tasks := [p.name for p in classes if _is_divided(p)]:
        raise DataError(
            f"{str(folder)!r} holds data sets, not classes: {tasks[0]!r} in it has train/ of its own. Give "
            f"{str(folder / tasks[0])!r}, or name them all in a file for `addenda learn-many`."
        )
    files: dict[str, list[Path]] = {}
    for place in classes:  # two folders may have one name in Unicode's two forms
        files.setdefault(class_name(place.name), []).extend(
            sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
        )
    files = dict(sorted(files.items()))
    if not any(files.values()):
        loose = any(p.suffix.lower() in SUFFIXES for p in folder.iterdir())
        hint = "its images lie side by side" if loose else "no image was found in it"
        raise DataError(
            f"{str(folder)!r} has no class folders with images ({hint}). Put each class's images into a folder named "
            f"after the class: {folder.name}/cat/1.jpg, {folder.name}/dog/1.jpg."
        )
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise DataError(f"Class folder {empty[0]!r} in {str(folder)!r} has no images. Fill it or remove it.")
    paths = [path for paths in files.values() for path in paths]
    targets = [i for i, paths in enumerate(files.values()) for _ in paths]
    return LabelledImages(
        f"{str(folder)!r}", tuple(files), torch.tensor(targets, dtype=torch.int64, device="cpu"), paths
    )


def _from_dataset(data: ImageDataset) -> LabelledImages:
    where = f"the {type(data).__name__} given"
    if len(data) == 0:
        raise DataError(f"{where} is empty.")
    samples = _samples(data)
    given = getattr(data, "targets", None) if samples is None else [target for _, target in samples]
    raw = list(given) if given is not None else [data[i][1] for i in range(len(data))]
    targets = _multi_hot(raw, where) if _length(raw[0]) > 1 else _class_numbers(raw, where)
    count = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    names = getattr(data, "classes", None)
    labels = tuple(class_name(str(name)) for name in names) if names else tuple(map(str, range(count)))
    if targets.ndim == 2 and len(labels) != count:
        raise DataError(f"{where} has targets of {count} labels and {len(labels)} classes.")
    if targets.ndim == 1 and (int(targets.min()) < 0 or int(targets.max()) >= len(labels)):
        raise DataError(f"{where} has targets from {targets.min()} to {targets.max()} and {len(labels)} classes.")
    items = _by_our_reader(data) if samples is None else [path for path, _ in samples]
    return LabelledImages(where, labels, targets, items)


def _samples(data: Any) -> list[tuple[Path, int]] | None:
    """The files and classes of a dataset that only reads files, also through Subset and ConcatDataset; else None.

    They are then read as those of a folder are. A dataset with a loader or transform of its own is asked for its items.
    """
    of_folders = sys.modules.get("torchvision.datasets.folder")  # imported wherever there is such a dataset
    if of_folders is not None and type(data) in (of_folders.ImageFolder, of_folders.DatasetFolder):
        own = data.transform is not None or data.target_transform is not None
        if own or data.loader is not of_folders.default_loader:
            return None
        return [(Path(path), target) for path, target in data.samples]
    if type(data) is Subset:
        whole = _samples(data.dataset)
        return None if whole is None else [whole[index] for index in data.indices]
    if type(data) is ConcatDataset:
        parts = [_samples(part) for part in data.datasets]
        return None if None in parts else [sample for part in parts if part is not None for sample in part]
    return None


def _by_our_reader(data: Any) -> Any:
    """The same dataset; where torchvision's loader would read its files, `read_image` does, as `predict` does too.

    torchvision's drops transparency and clips 16-bit grey.
    """
    of_folders = sys.modules.get("torchvision.datasets.folder")
    if of_folders is not None and isinstance(data, of_folders.DatasetFolder):
        if data.loader is of_folders.default_loader:
            data = copy(data)
            data.loader = read_image
    elif isinstance(data, Subset):
        data = copy(data)
        data.dataset = _by_our_reader(data.dataset)
    elif isinstance(data, ConcatDataset):
        data = copy(data)
        data.datasets = [_by_our_reader(part) for part in data.datasets]
    return data


def _length(target: Any) -> int:
    """How many numbers a target has."""
    if isinstance(target, Tensor):
        return target.numel()
    return len(target) if hasattr(target, "__len__") and not isinstance(target, str) else 1


def _class_numbers(raw: list[Any], where: str) -> Tensor:
    try:
        return torch.tensor(
            [int(np.asarray(t).item() if isinstance(t, list | tuple | np.ndarray) else t) for t in raw],
            dtype=torch.int64,
            device="cpu",
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} has a target that is not a whole number: {error}.") from error


def _multi_hot(raw: list[Any], where: str) -> Tensor:
    """Targets of several numbers each, as Bool[N, C]."""
    try:
        targets = torch.stack([torch.as_tensor(target, device="cpu") for target in raw])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} has targets that are not vectors of one length: {error}.") from error
    if targets.ndim != 2 or not ((targets == 0) | (targets == 1)).all():
        raise DataError(
            f"{where} has targets of several numbers that are not 0 or 1. A target is the number of a class, or 0 or 1 "
            "for each label."
        )
    return targets.bool()
