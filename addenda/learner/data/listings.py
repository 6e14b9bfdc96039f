"""Listings of labelled image files: CSV, and Parquet by pyarrow."""

from __future__ import annotations

import csv
import os
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

from addenda.exceptions import DataError
from addenda.learner.data.labelled import LabelledImages, class_name, encoded, ten_of

SUFFIXES = (".csv", ".parquet")
COLUMNS = ("path", "label", "labels", "split", "group")
DIFFERENCES = {"labels": "with other labels", "split": "in another split", "group": "in another group"}
"""What two rows of one image may not differ in."""
_SPLIT_WORDS = {
    "train": r"(train|training|trn)(set|data|images|imgs)?|训练集?",
    "test": r"(test|testing|tst)(set|data|images|imgs)?|测试集?",
    "validation": r"(val|valid|validation|dev|eval|evaluation)(set|data|images|imgs)?|验证集?",
}
"""Words in the name of a folder that holds a split: seg_train, test2017, Training Set, valImages."""


@dataclass(frozen=True)
class _Row:
    path: Path
    labels: tuple[str, ...]
    split: str | None
    group: str
    position: str  # in messages: "line 3" or "row 2"


def split_named(name: str) -> str | None:
    """The split that a name stands for: "train", "test" or "validation"; None for any other name."""
    words = re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])", name)
    splits = {
        split for split, form in _SPLIT_WORDS.items() if any(re.fullmatch(form, word.casefold()) for word in words)
    }
    return splits.pop() if len(splits) == 1 else None


def open_listing(file: Path, split: str) -> LabelledImages:
    """Opens a split of a listing without reading its images.

    The columns are `path`, relative to the listing's folder, and `label`; or `labels`, any number per image, separated
    by `|`, in Parquet also as a list. A column `split` says train or test; without it, every split has all rows.
    Images of one `group` are held out together or not at all; an empty group makes an image a group of its own. Other
    columns are ignored, and identical rows count once. The classes are those of all rows, sorted by name.
    """
    columns, rows = _read(file)
    labels = tuple(sorted({label for row in rows for label in row.labels}))
    if not labels:
        raise DataError(f"No image in the listing {str(file)!r} has a label; fill its column 'label' or 'labels'.")
    listed = [row for row in rows if row.split in (None, split)]
    if not listed:
        raise DataError(
            f"The listing {str(file)!r} has a column 'split' but no row with split {split!r}; add such rows."
        )
    existing = [row for row in listed if os.path.isfile(row.path)]
    lost = tuple(
        f"{row.position}: there is no file {str(row.path)!r}" for row in listed if not os.path.isfile(row.path)
    )
    if not existing:
        hint = ". Separate folders by /, not by \\" if "\\" in lost[0] and os.sep == "/" else ""
        raise DataError(
            f"None of the files in the listing {str(file)!r} exists, relative to its folder: {lost[0]}{hint}."
        )
    number = {label: i for i, label in enumerate(labels)}
    targets = encoded([[number[label] for label in row.labels] for row in existing], len(labels), "labels" in columns)
    return LabelledImages(
        f"{str(file)!r}", labels, targets, [row.path for row in existing], folder=file.parent,
        groups=tuple(row.group for row in existing) if "group" in columns else None, lost=lost,
    )  # fmt: skip


def listing_has_test_split(file: Path) -> bool:
    """Whether a listing has a row with split test."""
    return any(row.split == "test" for row in _read(file)[1])


SHOWN_COLUMNS, SHOWN_LETTERS = 12, 40
"""Limits for a listing's columns in messages: a file that is not a listing may seem to have thousands."""

Lines = Sequence[tuple[str, list[Any]]]
"""Rows, each with its position in messages."""


def _read(file: Path) -> tuple[list[str], list[_Row]]:
    """Reads a listing's columns, and its rows, one per image. Raises DataError that lists the invalid rows."""
    if not file.is_file():
        raise DataError(f"There is no listing {str(file)!r}.")
    columns, lines = _read_csv(file) if file.suffix.lower() == ".csv" else _read_parquet(file)
    if not lines:
        raise DataError(f"The listing {str(file)!r} has column names but no rows.")
    known: dict[Path, _Row] = {}
    problems = []
    for position, values in lines:
        try:
            row = _row(file.parent, columns, values, position)
            first = known.setdefault(row.path, row)
            for column, difference in DIFFERENCES.items():
                if getattr(first, column) != getattr(row, column):
                    raise DataError(f"{str(row.path)!r} is also on {first.position}, {difference}")
        except DataError as error:
            problems.append(f"{position}: {error}")
    if problems:
        summary = f"{len(problems)} of {len(lines)} rows of the listing {str(file)!r} are invalid"
        raise DataError(f"{summary}:{ten_of(problems)}")
    return columns, list(known.values())


def _read_csv(file: Path) -> tuple[list[str], Lines]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, strict=True, skipinitialspace=True)
            lines = [(f"line {reader.line_num}", fields) for fields in reader if any(map(str.strip, fields))]
    except UnicodeDecodeError as error:
        kind = "UTF-16 text" if file.read_bytes()[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else f"not UTF-8 ({error.reason})"
        raise DataError(f"The listing {str(file)!r} is {kind}. Save it as CSV in UTF-8, with commas.") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"The listing {str(file)!r} cannot be read as CSV: {error}.") from error
    if not lines:
        raise DataError(f"The listing {str(file)!r} is empty. Its first line must name the columns: path,label.")
    columns = [name.strip() for name in lines[0][1]]
    _check_columns(file, columns)
    return columns, lines[1:]


def _read_parquet(file: Path) -> tuple[list[str], Lines]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"Reading the listing {str(file)!r} requires pyarrow: pip install 'addenda[parquet]'. CSV needs no extra."
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
    listed = [
        repr(name if len(name) <= SHOWN_LETTERS else f"{name[:SHOWN_LETTERS]}…") for name in columns[:SHOWN_COLUMNS]
    ]
    more = f" and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
    found = f"Found: {', '.join(listed)}{more}."
    if len(columns) == 1 and {";", "\t"} & set(columns[0]):
        found += " Fields must be separated by commas: save it as CSV with commas."
    elif {"path", "label", "labels"} & {name.lower() for name in columns} - {*columns}:
        found += " Column names are in lower case."
    if "path" not in columns or not {"label", "labels"} & set(columns):
        raise DataError(
            f"The listing {str(file)!r} requires a column 'path', and 'label' (one per image) or 'labels' (any number, "
            f"in CSV separated by '|'). {found}"
        )
    if {"label", "labels"} <= set(columns):
        raise DataError(
            f"The listing {str(file)!r} has both columns 'label' and 'labels'. Keep the one to learn. {found}"
        )
    repeated = [name for name in COLUMNS if columns.count(name) > 1]
    if repeated:
        raise DataError(f"The listing {str(file)!r} has several columns {repeated[0]!r}. {found}")


def _row(folder: Path, columns: Sequence[str], values: Sequence[Any], position: str) -> _Row:
    """Parses one row; DataError says what is wrong with it."""
    if len(values) != len(columns):
        raise DataError(
            f"it has {len(values)} fields, but the listing has {len(columns)} columns; quote text that contains a comma"
        )
    fields = dict(zip(columns, values, strict=True))
    if not isinstance(fields["path"], str) or not fields["path"]:
        raise DataError("its path is empty" if fields["path"] in (None, "") else f"its path is {fields['path']!r}")
    if "://" in fields["path"]:
        raise DataError(f"its path is {fields['path']!r}; give the path of a file, since URLs are not read")
    path = _path(folder / fields["path"])
    labels = _labels(fields["labels"]) if "labels" in fields else (_text(fields["label"]),)
    if "" in labels:
        raise DataError("it has an empty label")
    text = _text(fields["split"]) if "split" in fields else None
    split = None if text is None else split_named(text)
    if split == "validation":
        raise DataError(
            f"its split is {text!r}: Addenda draws its own validation split from train; change it to train, or remove "
            "the row"
        )
    if text is not None and split is None:
        raise DataError(f"its split is {text!r}; it must be train or test")
    return _Row(path, labels, split, _text(fields.get("group")), position)


def _path(given: Path) -> Path:
    """The path of an image in its shortest form, and in the Unicode form that its file has."""
    path = Path(os.path.normpath(given))
    if ".." in given.parts and os.path.realpath(path) != os.path.realpath(given):
        path = given  # through a linked folder, `..` is the parent of the folder that the link names
    if not str(path).isascii() and not os.path.lexists(path):
        forms = (path.with_name(normalize(form, path.name)) for form in ("NFC", "NFD"))
        path = next((form for form in forms if os.path.lexists(form)), path)
    return path


def _labels(value: Any) -> tuple[str, ...]:
    """The sorted labels of a multi-label image, from a list or from text with | between them."""
    if isinstance(value, str):
        value = value.split("|") if value.strip() else []
    if value is not None and not isinstance(value, list):
        raise DataError(f"its labels are {value!r}, which is neither text nor a list")
    return tuple(sorted({_text(label) for label in value or []}))


def _text(value: Any) -> str:
    """A label, split or group as stripped text; None becomes empty text."""
    if value is None:
        return ""
    if not isinstance(value, str | int):
        raise DataError(f"its value {value!r} is neither text nor a whole number")
    return class_name(str(value))
