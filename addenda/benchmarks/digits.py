"""scikit-learn's handwritten digits as five tasks of two digits each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


@dataclass(frozen=True, eq=False)
class Digits:
    """Some digits as a torch Dataset of 8 x 8 px PIL images; `targets` count from 0 within `classes`."""

    images: tuple[Image.Image, ...]
    targets: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]

    def save(self, folder: Path) -> None:
        """Writes each image as a PNG file into the folder of its class."""
        for number, (image, target) in enumerate(zip(self.images, self.targets, strict=True)):
            place = folder / self.classes[target]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number}.png")


def digits(keep: tuple[int, ...], test: bool, seed: int = 0, limit: int | None = None) -> Digits:
    """The training or the test part (a fifth, stratified, seeded) of some digits; the first `limit` of them."""
    data = load_digits()
    parts = train_test_split(np.arange(len(data.target)), test_size=0.2, stratify=data.target, random_state=seed)
    rows = [int(i) for i in parts[1 if test else 0] if int(data.target[i]) in keep][:limit]
    images = tuple(Image.fromarray((data.images[i] * 255 / 16).astype(np.uint8)) for i in rows)
    targets = tuple(keep.index(int(data.target[i])) for i in rows)
    return Digits(images, targets, tuple(map(str, keep)))
