"""Hugging Face datasets as labelled images, known by what they can do: the package itself is not imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from addenda.exceptions import DataError
from addenda.learner.data.folders import class_name
from addenda.learner.data.labelled import EncodedImage, LabelledImages, encoded

PARTS = {"train", "test"}


@runtime_checkable
class HubDataset(Protocol):
    """A Hugging Face Dataset with one column of type Image and one of ClassLabel (or a list of them); or a DatasetDict.

    Its images are read as files are: what `set_format` and `set_transform` would make of them is not asked for.
    """

    @property
    def column_names(self) -> Any:
        """Names of the columns; of a DatasetDict, for each part."""

    def cast_column(self, column: str, feature: Any) -> Any:
        """The same data, a column read as another type."""

    def with_format(self, type: str | None = None) -> Any:
        """The same data, given as tensors or, without a type, as plain Python values."""


def open_hub_dataset(data: HubDataset, part: str) -> LabelledImages:
    """Opens a Dataset, taken whole, or a part of a DatasetDict of train and test, without decoding its images."""
    where = f"the {type(data).__name__} given"
    chosen: Any = data
    if isinstance(data, Mapping):
        others = sorted(set(data) - PARTS)
        if others:
            raise DataError(
                f"{where} has the parts {_names(data)}; Addenda takes train and test, and draws its own validation "
                'part from train. Give DatasetDict({"train": data[...], "test": data[...]}) with the parts to use.'
            )
        if part not in data:
            raise DataError(f"{where} has no part {part!r}, only {_names(data)}.")
        chosen, where = data[part], f"the part {part!r} of {where}"
    if not hasattr(chosen, "__len__"):
        raise DataError(f"{where} is a stream, whose images cannot be counted or shuffled. Load it without streaming.")
    if len(chosen) == 0:
        raise DataError(f"{where} is empty.")
    chosen = chosen.with_format(None)
    image = _only("image", [name for name, kind in chosen.features.items() if _is(kind, "Image")], chosen, where)
    labelled = [name for name, kind in chosen.features.items() if _is(_element(kind), "ClassLabel")]
    label = _only("label", labelled, chosen, where)
    feature = chosen.features[label]
    values, names = list(chosen[label]), tuple(map(class_name, _element(feature).names))
    single = _is(feature, "ClassLabel")
    numbers = [[value] if single else value or () for value in values]
    unknown = [i for i, several in enumerate(numbers) if any(number not in range(len(names)) for number in several)]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(values)} images in {where} have no class in column {label!r}: image {unknown[0]} "
            f"has {values[unknown[0]]!r}. Leave them out: data.filter(lambda row: ...)."
        )
    undecoded = dataclasses.replace(chosen.features[image], decode=False)
    column = chosen.select_columns([image]).cast_column(image, undecoded)
    targets = encoded(numbers, len(names), not single)
    return LabelledImages(where, names, targets, EncodedColumn(column, image, where))


class EncodedColumn:
    """The image files in a column of a dataset, bytes or a path for each, not decoded."""

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
    """What a column's lists hold, in any of the ways to say it; of a column without lists, its own type."""
    if isinstance(kind, list):
        return kind[0]
    return getattr(kind, "feature", kind)


def _only(what: str, candidates: Sequence[str], data: Any, where: str) -> str:
    """The one column that can be the image or the label."""
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
    raise DataError(f"{where} has no column of type {kinds} to be the {what}, only {columns}. Make one: data.{hint}.")


def _names(names: Any) -> str:
    return ", ".join(map(repr, names))
