"""Datasets as Python objects: torch Datasets, and Hugging Face datasets by structural typing, without its package."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from copy import copy
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from addenda.backbones import read_image
from addenda.exceptions import DataError, UnsteadyError
from addenda.learner.data.labelled import EncodedImage, ImageDataset, LabelledImages, class_name, encoded
from addenda.registry import LABELS

SPLITS = {"train", "test"}


@runtime_checkable
class HubDataset(Protocol):
    """A Hugging Face Dataset with one column of type Image and one of ClassLabel (or a list of them); or a DatasetDict.

    Its images are read like files: `set_format` and `set_transform` are ignored.
    """

    @property
    def column_names(self) -> Any:
        """The column names; of a DatasetDict, for each split."""

    def cast_column(self, column: str, feature: Any) -> Any:
        """The dataset with a column cast to another type."""

    def with_format(self, type: str | None = None) -> Any:
        """The dataset with items in another format; None gives plain Python values."""


def open_hub_dataset(data: HubDataset, split: str) -> LabelledImages:
    """Opens a whole Dataset, or a split of a DatasetDict of train and test, without decoding its images."""
    where = f"the given {type(data).__name__}"
    dataset: Any = data
    if isinstance(data, Mapping):
        if set(data) - SPLITS:
            raise DataError(
                f"{where} has the splits {_listed(data)}; Addenda takes train and test, and draws its own validation "
                'split from train. Pass DatasetDict({"train": data[...], "test": data[...]}) with the splits to use.'
            )
        if split not in data:
            raise DataError(f"{where} has no split {split!r}, only {_listed(data)}. Pass a DatasetDict that has it.")
        dataset, where = data[split], f"the split {split!r} of {where}"
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"{where} is a streaming dataset, whose images cannot be counted or shuffled. Load it without streaming."
        )
    if len(dataset) == 0:
        raise DataError(f"{where} is empty.")
    dataset = dataset.with_format(None)
    image = _only("image", [name for name, kind in dataset.features.items() if _is(kind, "Image")], dataset, where)
    labelled = [name for name, kind in dataset.features.items() if _is(_element(kind), "ClassLabel")]
    label = _only("label", labelled, dataset, where)
    feature = dataset.features[label]
    values, names = list(dataset[label]), tuple(map(class_name, _element(feature).names))
    single = _is(feature, "ClassLabel")
    numbers = [[value] if single else value or () for value in values]
    unknown = [i for i, classes in enumerate(numbers) if any(number not in range(len(names)) for number in classes)]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(values)} images in {where} have no class in column {label!r}: image {unknown[0]} "
            f"has {values[unknown[0]]!r}. Remove them: data.filter(lambda row: ...)."
        )
    undecoded = dataclasses.replace(dataset.features[image], decode=False)
    column = dataset.select_columns([image]).cast_column(image, undecoded)
    targets = encoded(numbers, len(names), not single)
    return LabelledImages(where, names, targets, EncodedColumn(column, image, where))


class EncodedColumn:
    """The image column of a dataset as undecoded files: bytes or a path for each."""

    def __init__(self, data: Any, column: str, where: str) -> None:
        self._data, self._column, self._where = data, column, where

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Path | EncodedImage:
        stored = self._data[index][self._column] or {"bytes": b"", "path": None}
        if stored["bytes"] is None and stored["path"] is not None:
            return Path(stored["path"])
        return EncodedImage(f"Image {index} of {self._where}", stored["bytes"] or b"")


def _is(kind: Any, name: str) -> bool:
    return type(kind).__name__ == name


def _element(kind: Any) -> Any:
    """The element type of a list column, in any of its notations; of another column, its own type."""
    if isinstance(kind, list):
        return kind[0]
    return getattr(kind, "feature", kind)


def _only(what: str, candidates: Sequence[str], data: Any, where: str) -> str:
    """The only column that can be the image or the label; DataError if there is none, or several."""
    if len(candidates) == 1:
        return candidates[0]
    kinds = "Image" if what == "image" else "ClassLabel, or a list of ClassLabel,"
    if candidates:
        raise DataError(
            f"{where} has several columns of type {kinds} that could be the {what}: {_listed(candidates)}. Keep one: "
            f"data.remove_columns([...])."
        )
    columns = ", ".join(f"{name!r}: {type(kind).__name__}" for name, kind in data.features.items())
    hint = "cast_column(NAME, datasets.Image())" if what == "image" else "class_encode_column(NAME)"
    raise DataError(f"{where} has no column of type {kinds} to be the {what}, only {columns}. Create one: data.{hint}.")


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))


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
        raw = []
        for row in range(len(items)):
            try:
                raw.append(items[row][1])
            except DataError as error:
                lost[row] = str(error)
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
        items.expected = dict(zip(rows, targets, strict=True))
        items = Subset(items, rows) if lost else items
    return LabelledImages(where, labels, targets, items, lost=tuple(lost.values()))


class Items:
    """The items of a dataset, checked against the targets `expected` of rows; `where` names it in messages."""

    def __init__(self, data: Any, where: str) -> None:
        self._data, self._where = data, where
        self.expected: dict[int, Tensor] = {}

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
        if index in self.expected:
            expected = self.expected[index]
            parsed = _class_numbers([target], called) if expected.ndim == 0 else _multi_hot([target], called)
            if not torch.equal(parsed[0], expected):
                raise UnsteadyError(
                    f"{called} has the target {target}, but the dataset's `targets` has {expected.tolist()}. Pass a "
                    "dataset whose `targets` and `classes` match its items, or one without them."
                )
        return image, target


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
        known = numbers if isinstance(numbers, Mapping) else {}
        if any(known.get(name, number) != number for number, name in enumerate(ordered) if isinstance(name, str)):
            raise DataError(
                f"The given {type(data).__name__} has its classes in one order in `classes` and in another in "
                "`class_to_idx`."
            )
        return [_name(value) for value in ordered] or None
    if isinstance(data, Subset):
        return _names(data.dataset)
    if isinstance(data, ConcatDataset):
        lists = [joined for dataset in data.datasets if (joined := _names(dataset)) is not None]
        for other in lists[1:]:
            for number, (name, another) in enumerate(zip_longest(lists[0], other, fillvalue="nothing")):
                if name != another:
                    raise DataError(
                        f"The concatenated datasets have different classes: number {number} is {name!r} in one and "
                        f"{another!r} in another. Give them the same `classes` in the same order."
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
