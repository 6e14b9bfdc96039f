"""CSV listings of a subset of a folder's images."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from addenda.files import written
from addenda.learner.data import LabelledImages


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
