"""Torch Datasets as labelled images: targets and class names from the dataset's attributes, else from its items."""

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
    """Opens a dataset; without `targets`, every item is loaded once for its target."""
    where = f"the given {type(data).__name__}"
    if isinstance(data, type) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(f"{where} is not a dataset: it must have a length and items, each a pair of image and target.")
    if len(data) == 0:
        raise DataError(f"{where} is empty.")
    lost: dict[int, str] = {}
    try:
        samples, stored_targets = _samples(data), _targets(data)
    except (IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is not valid: {error}. The indices of a Subset must be whole numbers.") from error
    raw = stored_targets if samples is None else [target for _, target in samples]
    items: Any = Items(_by_our_reader(data), where) if samples is None else [path for path, _ in samples]
    if raw is None:
        raw, lost = items.load_targets()
    if len(raw) + len(lost) != len(data):
        raise DataError(f"{where} has {len(data)} items and {len(raw)} targets.")
    if not raw:
        raise DataError(f"{where} has no readable item: {next(iter(lost.values()))}")
    targets = _multi_hot(raw, where) if _length(raw[0]) > 1 else _class_numbers(raw, where)
    count = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    names = _names(data)
    if names is None and count > LABELS:
        raise DataError(f"{where} has targets up to {count - 1:,}; targets must be class indices, from 0 without gaps.")
    labels = tuple(class_name(str(name), where) for name in names) if names else tuple(map(str, range(count)))
    if targets.ndim == 2 and len(labels) != count:
        raise DataError(f"{where} has targets for {count} labels but {len(labels)} classes.")
    if targets.ndim == 1 and (int(targets.min()) < 0 or int(targets.max()) >= len(labels)):
        raise DataError(f"{where} has targets from {targets.min()} to {targets.max()} but {len(labels)} classes.")
    if samples is None:
        rows = [row for row in range(len(data)) if row not in lost]
        items.expect(targets, rows)
        items = Subset(items, rows) if lost else items
    return LabelledImages(where, labels, targets, items, lost=tuple(lost.values()))


class Items:
    """The items of a dataset, checked against the expected targets; `where` names it in messages."""

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
        except Exception as error:  # the dataset's own code may fail in any way
            raise DataError(f"{called} cannot be loaded: {type(error).__name__}: {error}.") from error
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DataError(f"{called} is a {type(item).__name__}, not a pair of image and target.")
        image, target = item[:2]
        if index in self._expected:
            expected = self._expected[index]
            parsed = _class_numbers([target], called) if expected.ndim == 0 else _multi_hot([target], called)
            if not torch.equal(parsed[0], expected):
                raise UnsteadyError(
                    f"{called} has the target {target}, but the dataset's `targets` has {expected.tolist()}. Pass a "
                    "dataset whose `targets` and `classes` match its items, or one without them."
                )
        return image, target

    def load_targets(self) -> tuple[list[Any], dict[int, str]]:
        """Loads all items: the targets of the readable ones, and the errors of the others by row."""
        targets, lost = [], {}
        for row in range(len(self)):
            try:
                targets.append(self[row][1])
            except DataError as error:
                lost[row] = str(error)
        return targets, lost

    def expect(self, targets: Tensor, rows: list[int]) -> None:
        """Sets the targets that items must have from now on."""
        self._expected = dict(zip(rows, targets, strict=True))


def _samples(data: Any) -> list[tuple[Path, int]] | None:
    """Paths and targets of a dataset that only reads files, also through Subset and ConcatDataset; else None.

    They are then read like those of a folder. None for a dataset with its own loader or transform: its items are used.
    """
    torchvision = sys.modules.get("torchvision.datasets.folder")  # imported wherever there is such a dataset
    if torchvision is not None and type(data) in (torchvision.ImageFolder, torchvision.DatasetFolder):
        transformed = data.transform is not None or data.target_transform is not None
        if transformed or data.loader is not torchvision.default_loader:
            return None
        return [(Path(path), target) for path, target in data.samples]
    return _through_wrappers(data, _samples) if type(data) in (Subset, ConcatDataset) else None


def _through_wrappers(data: Any, values_of: Callable[[Any], list[Any] | None]) -> list[Any] | None:
    """The values of each item of a Subset or ConcatDataset, from the wrapped datasets; None if one of them has none."""
    if isinstance(data, Subset):
        values = values_of(data.dataset)
        return None if values is None else [values[index] for index in data.indices]
    if isinstance(data, ConcatDataset):
        lists = [values_of(dataset) for dataset in data.datasets]
        return None if None in lists else [value for values in lists if values is not None for value in values]
    return None


def _by_our_reader(data: Any) -> Any:
    """The same dataset with torchvision's default loader replaced by `read_image`, which `predict` uses too.

    torchvision's loader drops transparency and clips 16-bit greyscale.
    """
    torchvision = sys.modules.get("torchvision.datasets.folder")
    if torchvision is not None and isinstance(data, torchvision.DatasetFolder):
        if data.loader is torchvision.default_loader:
            data = copy(data)
            data.loader = read_image
    elif isinstance(data, Subset):
        data = copy(data)
        data.dataset = _by_our_reader(data.dataset)
    elif isinstance(data, ConcatDataset):
        data = copy(data)
        data.datasets = [_by_our_reader(dataset) for dataset in data.datasets]
    return data


def _targets(data: Any) -> list[Any] | None:
    """The `targets` of a dataset, also through Subset and ConcatDataset; None if it has none."""
    targets = getattr(data, "targets", None)
    if targets is not None and not callable(targets):
        if len(targets) != len(data):
            raise DataError(f"the given {type(data).__name__} has {len(data)} items and {len(targets)} targets.")
        return list(targets)
    return _through_wrappers(data, _targets)


def _names(data: Any) -> list[str] | None:
    """The class names of a dataset, also through Subset and ConcatDataset; None if it has none."""
    classes: Any = getattr(data, "classes", None)
    numbers: Any = getattr(data, "class_to_idx", None)
    if isinstance(classes, Mapping):
        classes, numbers = None, classes
        if all(isinstance(key, int) for key in numbers):
            numbers = {name: number for number, name in numbers.items()}
    if isinstance(classes, Set):
        raise DataError(f"The `classes` of the given {type(data).__name__} are a set, which has no order; use a list.")
    if classes is None and isinstance(numbers, Mapping):
        classes = sorted(numbers, key=numbers.__getitem__)
        if [numbers[name] for name in classes] != list(range(len(classes))):
            raise DataError(f"The classes of the given {type(data).__name__} are not numbered from 0 without gaps.")
    if isinstance(classes, Sequence | np.ndarray | Tensor) or type(classes).__name__ == "Index":
        ordered: list[Any] = list(classes)
        names = [_name(value) for value in ordered]
        if isinstance(numbers, Mapping) and any(
            numbers.get(name, number) != number for number, name in enumerate(ordered) if isinstance(name, str)
        ):
            raise DataError(
                f"The given {type(data).__name__} has its classes in one order in `classes` and in another in "
                "`class_to_idx`."
            )
        return names or None
    if isinstance(data, Subset):
        return _names(data.dataset)
    if isinstance(data, ConcatDataset):
        lists = [joined for dataset in data.datasets if (joined := _names(dataset)) is not None]
        for other in lists[1:]:
            if other != lists[0]:
                number, pair = next(
                    (number, pair)
                    for number, pair in enumerate(zip_longest(lists[0], other, fillvalue="nothing"))
                    if pair[0] != pair[1]
                )
                raise DataError(
                    f"The concatenated datasets have different classes: number {number} is {pair[0]!r} in one and "
                    f"{pair[1]!r} in another. Give them the same `classes` in the same order."
                )
        return lists[0] if lists else None
    return None


def _name(value: Any) -> str:
    """A class name as text; torchvision's ImageNet has a tuple of synonyms for each class."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return str(value.item() if isinstance(value, Tensor | np.generic) else value)


def _length(target: Any) -> int:
    """The number of values in a target."""
    if isinstance(target, Tensor):
        return target.numel()
    return len(target) if hasattr(target, "__len__") and not isinstance(target, str) else 1


def _class_numbers(raw: list[Any], where: str) -> Tensor:
    """Single-label targets as Int64[N]."""
    try:
        numbers = [np.asarray(target).item() for target in raw]
        wrong = [number for number in numbers if number != int(number)]
        if wrong:
            raise ValueError(repr(wrong[0]))
        return torch.tensor([int(number) for number in numbers], dtype=torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"{where} has a target that is not a whole number: {error}.") from error


def _multi_hot(raw: list[Any], where: str) -> Tensor:
    """Multi-label targets as Bool[N, C]."""
    try:
        targets = torch.stack([torch.as_tensor(target, device="cpu") for target in raw])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} has targets that are not vectors of equal length: {error}.") from error
    if targets.ndim != 2 or not ((targets == 0) | (targets == 1)).all():
        raise DataError(
            f"{where} has vector targets with values other than 0 and 1. A target is a class index, or a vector with 0 "
            "or 1 for each label."
        )
    return targets.bool()
