"""Small datasets of two colours, with splits or with an item that cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from addenda import LearnConfig
from tests.support.images import colour_folder

HEAD_ONLY = LearnConfig(head_only=True)
LEARN = ("--backbone", "glyphs", "--head-only")
TWO = ("red", "blue")


def with_splits(folder: Path, *splits: str, classes: tuple[str, ...] = TWO) -> Path:
    for seed, split in enumerate(splits):
        colour_folder(folder / split, per_class=4, classes=classes, seed=seed)
    return folder


class Pictures:
    """A dataset whose third item cannot be loaded."""

    def __init__(self, error: Exception, targets: bool) -> None:
        self.error = error
        if targets:
            self.targets = [number % 2 for number in range(12)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == 2:
            raise self.error
        return Image.new("RGB", (40, 40), (index % 2 * 200, 17 * index, 0)), index % 2
