"""Listings of labelled image files: CSV, and Parquet by pyarrow."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addenda.exceptions import DataError
from addenda.learner.data.folders import class_name, part_named
from addenda.learner.data.labelled import LabelledImages, encoded, ten_of

SUFFIXES = (".csv", ".parquet")
COLUMNS = ("path", "label", "labels", "split", "group")


@dataclass(frozen=True)
class _Row:
    path: Path
    labels: tuple[str, ...]
    split: str | None
    group: str
    place: str


def open_listing(file: Path, part: str) -> LabelledImages:
    """Opens a listing without reading its images.

    Its columns are `path`, relative to the listing's folder, and `label`; or `labels`, of which an image may have any
    number: in CSV with `|` between them, in Parquet so too or as a list. A column `split` says train or test; without
    one all rows are the part. Images of one `group` are held out together or not at all; where it is empty, an image is
    one of its own. Further columns are left alone. An image listed twice alike counts once. The classes are those of
    all rows, in the order of their names.
    """
    columns, lines = _read(file)
    multi = "labels" in columns
    rows = _check_rows(file, columns, lines, multi)
    labels = tuple(sorted({label for row in rows for label in row.labels}))
    if not labels:
        raise DataError(f"No image in the listing {str(file)!r} has a label.")
    listed = [row for row in rows if row.split in (None, part)]
    if not listed:
        raise DataError(f"The listing {str(file)!r} has a column 'split' and no row whose split is {part!r}.")
    chosen = [row for row in listed if os.path.isfile(row.path)]
    lost = tuple(f"{row.place}: there is no file {str(row.path)!r}" for row in listed if not os.path.isfile(row.path))
    if not chosen:
        raise DataError(f"The listing {str(file)!r} names no file that there is: {lost[0]}")
    number = {label: i for i, label in enumerate(labels)}
    targets = encoded([[number[label] for label in row.labels] for row in chosen], len(labels), multi)
    return LabelledImages(
        f"{str(file)!r}", labels, targets, [row.path for row in chosen], folder=file.parent,
        groups=tuple(row.group for row in chosen) if "group" in columns else None, lost=lost,
    )  # fmt: skip


def listing_has_test_part(file: Path) -> bool:
    """Whether the listing has a row whose split is test."""
    columns, lines = _read(file)
    return "split" in columns and any(
        part_named(_text(dict(zip(columns, line[1], strict=False)).get("split"))) == "test" for line in lines
    )


SHOWN_COLUMNS, SHOWN_LETTERS = 12, 40
"""Of a listing's columns, in messages: a file that is none at all may seem to have thousands."""

Lines = Sequence[tuple[str, list[Any]]]
"""Rows, each with the words for where it stands."""


def _read(file: Path) -> tuple[list[str], Lines]:
    """A listing's columns and rows."""
    if not file.is_file():
        raise DataError(f"There is no listing {str(file)!r}.")
    return _read_csv(file) if file.suffix.lower() == ".csv" else _read_parquet(file)


def _read_csv(file: Path) -> tuple[list[str], Lines]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, strict=True)
            lines = [(f"line {reader.line_num}", fields) for fields in reader if fields]
    except UnicodeDecodeError as error:
        raise DataError(f"The listing {str(file)!r} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"The listing {str(file)!r} cannot be read as CSV: {error}.") from error
    if not lines:
        raise DataError(f"The listing {str(file)!r} is empty. Its first line names its columns: path,label.")
    columns = [name.strip() for name in lines[0][1]]
    _check_columns(file, columns)
    return columns, lines[1:]


def _read_parquet(file: Path) -> tuple[list[str], Lines]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"Reading the listing {str(file)!r} takes pyarrow: pip install 'addenda[parquet]'. CSV needs nothing."
        ) from error
    try:
        opened = parquet.ParquetFile(file)
        _check_columns(file, opened.schema_arrow.names)
        columns = [name for name in COLUMNS if name in opened.schema_arrow.names]
        values = opened.read(columns).to_pydict()
    except (OSError, ArrowException) as error:
        raise DataError(f"The listing {str(file)!r} cannot be read as Parquet: {error}") from error
    rows = zip(*(values[name] for name in columns), strict=True)
    return columns, [(f"row {number}", list(row)) for number, row in enumerate(rows, start=1)]


def _check_columns(file: Path, columns: Sequence[str]) -> None:
    shown = [
        repr(name if len(name) <= SHOWN_LETTERS else f"{name[:SHOWN_LETTERS]}…") for name in columns[:SHOWN_COLUMNS]
    ]
    more = f" and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
    found = f"Found: {', '.join(shown)}{more}."
    if len(columns) == 1 and {";", "\t"} & set(columns[0]):
        found += " Its fields must be separated by commas: save it as CSV with commas."
    if "path" not in columns or not {"label", "labels"} & set(columns):
        raise DataError(
            f"The listing {str(file)!r} needs a column 'path', and 'label' (one for each image) or 'labels' (any "
            f"number, in CSV with '|' between them). {found}"
        )
    if {"label", "labels"} <= set(columns):
        raise DataError(
            f"The listing {str(file)!r} has both columns 'label' and 'labels'. Keep the one to learn. {found}"
        )
    twice = [name for name in COLUMNS if columns.count(name) > 1]
    if twice:
        raise DataError(f"The listing {str(file)!r} has several columns {twice[0]!r}. {found}")


def _check_rows(file: Path, columns: Sequence[str], lines: Lines, multi: bool) -> list[_Row]:
    """The rows, each image once. Raises DataError with what is wrong in them."""
    known: dict[Path, _Row] = {}
    problems = []
    for place, values in lines:
        try:
            row = _row(file.parent, columns, values, multi, place)
            first = known.setdefault(row.path, row)
            if first.labels != row.labels:
                raise DataError(f"{str(row.path)!r} is on {first.place} too, with other labels")
            if first.split != row.split:
                raise DataError(f"{str(row.path)!r} is on {first.place} too, for another part")
            if first.group != row.group:
                raise DataError(f"{str(row.path)!r} is on {first.place} too, in another group")
        except DataError as error:
            problems.append(f"{place}: {error}")
    if not lines:
        raise DataError(f"The listing {str(file)!r} names its columns and no image.")
    if problems:
        wrong = f"{len(problems)} of {len(lines)} rows of the listing {str(file)!r} are wrong"
        raise DataError(f"{wrong}:{ten_of(problems)}")
    return list(known.values())


def _row(folder: Path, columns: Sequence[str], values: Sequence[Any], multi: bool, place: str) -> _Row:
    """One row, or a DataError that says what is wrong with it."""
    if len(values) != len(columns):
        raise DataError(
            f"it has {len(values)} fields, and the listing {len(columns)} columns; quote a text with a comma"
        )
    fields = dict(zip(columns, values, strict=True))
    if not isinstance(fields["path"], str) or not fields["path"]:
        raise DataError("its path is empty" if fields["path"] in (None, "") else f"its path is {fields['path']!r}")
    path = Path(os.path.normpath(folder / fields["path"]))
    labels = _labels(fields["labels"]) if multi else (_text(fields["label"]),)
    if "" in labels:
        raise DataError("it has an empty label")
    split = _text(fields["split"]) if "split" in fields else None
    part = None if split is None else part_named(split)
    if part == "validation":
        raise DataError(
            f"its split is {split!r}: Addenda draws its own validation part from train. Call it train, or leave it out"
        )
    if split is not None and part is None:
        raise DataError(f"its split is {split!r}; it must be train or test")
    return _Row(path, labels, part, _text(fields.get("group")), place)


def _labels(value: Any) -> tuple[str, ...]:
    """The labels of an image that may have any number, in order: of a list, or of a text with | between them."""
    if isinstance(value, str):
        value = value.split("|") if value.strip() else []
    if value is not None and not isinstance(value, list):
        raise DataError(f"its labels are {value!r}, which is neither a text nor a list")
    return tuple(sorted({_text(label) for label in value or []}))


def _text(value: Any) -> str:
    """A label, split or group as text without spaces around it; nothing is an empty text."""
    if value is None:
        return ""
    if not isinstance(value, str | int):
        raise DataError(f"{value!r} in it is neither a text nor a whole number")
    return class_name(str(value).strip())
