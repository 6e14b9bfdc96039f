"""Hugging Face datasets as labelled images, by structural typing: the package itself is not imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from addenda.exceptions import DataError
from addenda.learner.data.folders import class_name
from addenda.learner.data.labelled import EncodedImage, LabelledImages, encoded

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
                f"{where} has the splits {_names(data)}; Addenda takes train and test, and draws its own validation "
                'split from train. Pass DatasetDict({"train": data[...], "test": data[...]}) with the splits to use.'
            )
        if split not in data:
            raise DataError(f"{where} has no split {split!r}, only {_names(data)}. Pass a DatasetDict that has it.")
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
            f"{where} has several columns of type {kinds} that could be the {what}: {_names(candidates)}. Keep one: "
            f"data.remove_columns([...])."
        )
    columns = ", ".join(f"{name!r}: {type(kind).__name__}" for name, kind in data.features.items())
    hint = "cast_column(NAME, datasets.Image())" if what == "image" else "class_encode_column(NAME)"
    raise DataError(f"{where} has no column of type {kinds} to be the {what}, only {columns}. Create one: data.{hint}.")


def _names(names: Any) -> str:
    return ", ".join(map(repr, names))
