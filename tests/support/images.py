"""Small generated image folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210)}


def colour_folder(folder: Path, per_class: int = 8, classes: tuple[str, ...] = tuple(COLOURS), seed: int = 0) -> Path:
    """Creates a folder of class folders: noisy rectangles of one colour per class, PNG, 40 x 36 px."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.array(COLOURS.get(name, (128, 128, 128))) + random.normal(0, 60, (36, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder
