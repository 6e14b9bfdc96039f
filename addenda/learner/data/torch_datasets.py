"""Torch Datasets as labelled images: a label is what an item says, a class's name what the dataset says of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from copy import copy
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from addenda.backbones import read_image
from addenda.exceptions import DataError, UnsteadyError
from addenda.learner.data.folders import class_name
from addenda.learner.data.labelled import ImageDataset, LabelledImages
from addenda.registry import LABELS


def open_torch_dataset(data: ImageDataset) -> LabelledImages:
    """Opens a dataset; where it has no `targets`, every item is asked for its own."""
    where = f"the {type(data).__name__} given"
    if isinstance(data, type) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(f"{where} is no dataset: it takes a length and items, each an image and its target.")
    if len(data) == 0:
        raise DataError(f"{where} is empty.")
    lost: dict[int, str] = {}
    try:
        samples, said = _samples(data), _targets(data)
    except (IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{where} cannot be looked into: {error}. Indices of a Subset are whole numbers.") from error
    raw = said if samples is None else [target for _, target in samples]
    items: Any = Items(_by_our_reader(data), where) if samples is None else [path for path, _ in samples]
    if raw is None:
        raw, lost = items.ask()
    if len(raw) + len(lost) != len(data):
        raise DataError(f"{where} has {len(data)} items and {len(raw)} targets.")
    if not raw:
        raise DataError(f"{where} gives no item: {next(iter(lost.values()))}")
    targets = _multi_hot(raw, where) if _length(raw[0]) > 1 else _class_numbers(raw, where)
    count = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    names = _names(data)
    if names is None and count > LABELS:
        raise DataError(f"{where} has targets up to {count - 1:,}: they are numbers of classes, from 0 without gaps.")
    labels = tuple(class_name(str(name), where) for name in names) if names else tuple(map(str, range(count)))
    if targets.ndim == 2 and len(labels) != count:
        raise DataError(f"{where} has targets of {count} labels and {len(labels)} classes.")
    if targets.ndim == 1 and (int(targets.min()) < 0 or int(targets.max()) >= len(labels)):
        raise DataError(f"{where} has targets from {targets.min()} to {targets.max()} and {len(labels)} classes.")
    if samples is None:
        rows = [row for row in range(len(data)) if row not in lost]
        items.expect(targets, rows)
        items = Subset(items, rows) if lost else items
    return LabelledImages(where, labels, targets, items, lost=tuple(lost.values()))


class Items:
    """A dataset's items, each with the target that was read before, or a DataError; `where` is its name."""

    def __init__(self, data: Any, where: str) -> None:
        self._data, self._where = data, where
        self._expected: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        called = f"Item {index} of {self._where}"
        try:
            item = self._data[index]
        except MemoryError:
            raise
        except Exception as error:  # a file that is gone, a damaged archive, a network: it is the dataset's own code
            raise DataError(f"{called} cannot be had: {type(error).__name__}: {error}.") from error
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DataError(f"{called} is {type(item).__name__}, not an image and its target.")
        image, target = item[:2]
        if index in self._expected:
            expected = self._expected[index]
            found = _class_numbers([target], called) if expected.ndim == 0 else _multi_hot([target], called)
            if not torch.equal(found[0], expected):
                raise UnsteadyError(
                    f"{called} has the target {target}, where the dataset's `targets` say {expected.tolist()}. Give a "
                    "dataset whose `targets` and `classes` are those of its items, or one that has neither."
                )
        return image, target

    def ask(self) -> tuple[list[Any], dict[int, str]]:
        """The targets that the items say, and of the others by their rows what is wrong with them."""
        targets, lost = [], {}
        for row in range(len(self)):
            try:
                targets.append(self[row][1])
            except DataError as error:
                lost[row] = str(error)
        return targets, lost

    def expect(self, targets: Tensor, rows: list[int]) -> None:
        """Refuses items from now on whose targets are not these."""
        self._expected = dict(zip(rows, targets, strict=True))


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
    return _of_parts(data, _samples) if type(data) in (Subset, ConcatDataset) else None


def _of_parts(data: Any, said: Callable[[Any], list[Any] | None]) -> list[Any] | None:
    """What is said of each item of what a Subset or ConcatDataset is made of; None where of one nothing is said."""
    if isinstance(data, Subset):
        whole = said(data.dataset)
        return None if whole is None else [whole[index] for index in data.indices]
    if isinstance(data, ConcatDataset):
        parts = [said(part) for part in data.datasets]
        return None if None in parts else [one for part in parts if part is not None for one in part]
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


def _targets(data: Any) -> list[Any] | None:
    """What a dataset says in `targets` of its items, also through Subset and ConcatDataset; None if nothing."""
    given = getattr(data, "targets", None)
    if given is not None and not callable(given):
        if len(given) != len(data):
            raise DataError(f"the {type(data).__name__} given has {len(data)} items and {len(given)} targets.")
        return list(given)
    return _of_parts(data, _targets)


def _names(data: Any) -> list[str] | None:
    """The names of a dataset's classes, also through Subset and ConcatDataset; None where it has none."""
    given: Any = getattr(data, "classes", None)
    numbers: Any = getattr(data, "class_to_idx", None)
    if isinstance(given, Mapping):
        given, numbers = None, given
        if all(isinstance(key, int) for key in numbers):
            numbers = {name: number for number, name in numbers.items()}
    if isinstance(given, Set):
        raise DataError(f"The classes of the {type(data).__name__} given are a set, which has no order: give a list.")
    if given is None and isinstance(numbers, Mapping):
        given = sorted(numbers, key=numbers.__getitem__)
        if [numbers[name] for name in given] != list(range(len(given))):
            raise DataError(f"The classes of the {type(data).__name__} given are not numbered from 0 without a gap.")
    if isinstance(given, Sequence | np.ndarray | Tensor) or type(given).__name__ == "Index":
        ordered: list[Any] = list(given)
        names = [_name(one) for one in ordered]
        if isinstance(numbers, Mapping) and any(
            numbers.get(name, number) != number for number, name in enumerate(ordered) if isinstance(name, str)
        ):
            raise DataError(
                f"The {type(data).__name__} given names its classes in one order in `classes` and in another in "
                "`class_to_idx`."
            )
        return names or None
    if isinstance(data, Subset):
        return _names(data.dataset)
    if isinstance(data, ConcatDataset):
        parts = [found for part in data.datasets if (found := _names(part)) is not None]
        for other in parts[1:]:
            if other != parts[0]:
                number, pair = next(
                    (number, pair)
                    for number, pair in enumerate(zip_longest(parts[0], other, fillvalue="nothing"))
                    if pair[0] != pair[1]
                )
                raise DataError(
                    f"The datasets that are joined have other classes: number {number} is {pair[0]!r} in one and "
                    f"{pair[1]!r} in another. Give them the same `classes` in the same order."
                )
        return parts[0] if parts else None
    return None


def _name(given: Any) -> str:
    """A class's name as text; ImageNet's are several words for one class."""
    if isinstance(given, bytes):
        return given.decode("utf-8", "surrogateescape")
    if isinstance(given, tuple | list):
        return ", ".join(map(str, given))
    return str(given.item() if isinstance(given, Tensor | np.generic) else given)


def _length(target: Any) -> int:
    """How many numbers a target has."""
    if isinstance(target, Tensor):
        return target.numel()
    return len(target) if hasattr(target, "__len__") and not isinstance(target, str) else 1


def _class_numbers(raw: list[Any], where: str) -> Tensor:
    """Targets of one number each, as Int64[N]."""
    try:
        numbers = [np.asarray(target).item() for target in raw]
        wrong = [number for number in numbers if number != int(number)]
        if wrong:
            raise ValueError(repr(wrong[0]))
        return torch.tensor([int(number) for number in numbers], dtype=torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
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
