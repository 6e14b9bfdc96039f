"""Files of a benchmark: JSON lines, from which an interrupted run resumes, and CSV listings of a folder's images."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from addenda.files import written
from addenda.learner.data import LabelledImages


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Reads all lines, without a line truncated by an interruption; a missing file has none."""
    values = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            values.append(json.loads(line))
    return values


def append_line(file: Path, value: Mapping[str, Any]) -> None:
    """Appends a line in a single write, because another process may append too; first ends a truncated line."""
    before = file.read_bytes() if file.exists() else b""
    truncated = bool(before) and not before.endswith(b"\n")
    with file.open("a") as stream:
        stream.write("\n" * truncated + json.dumps(value) + "\n")


def write_listing(file: Path, images: LabelledImages, rows: Iterable[int]) -> Path:
    """Atomically writes the absolute paths and the labels of the given rows of a folder dataset; returns the file."""
    with written(file) as unfinished, unfinished.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "label"))
        for row in rows:
            item = images.items[row]
            assert isinstance(item, Path)
            writer.writerow((item.resolve(), images.labels[images.targets[row]]))
    return file
