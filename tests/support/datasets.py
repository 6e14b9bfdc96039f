"""A dataset of PIL images, and the files of a folder of class folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


class Pictures:
    """A torch Dataset of PIL images."""

    def __init__(self, items: Sequence[tuple[Image.Image, int]], classes: Sequence[str]) -> None:
        self._items, self.targets, self.classes = items, [target for _, target in items], list(classes)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._items[index]


def files(folder: Path) -> list[tuple[Path, str]]:
    return [(path, path.parent.name) for path in sorted(folder.glob("*/*"))]
