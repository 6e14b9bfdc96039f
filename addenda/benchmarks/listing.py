"""Some images of a folder as a listing, which anything that learns can open."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from addenda.files import written
from addenda.learner.data import LabelledImages


def write_listing(file: Path, images: LabelledImages, rows: Iterable[int]) -> Path:
    """Writes absolute paths and labels of some images of a folder, whole or not at all; returns the file."""
    with written(file) as unfinished, unfinished.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "label"))
        for row in rows:
            item = images.items[row]
            assert isinstance(item, Path)
            writer.writerow((item.resolve(), images.labels[images.targets[row]]))
    return file
