"""Small folders laid out as the public datasets of the streams are."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


def put(folder: Path, classes: int | list[str], per_class: int = 5) -> Path:
    """Create class folders with empty image files, which are never opened."""
    names = [f"c{i:03}" for i in range(classes)] if isinstance(classes, int) else classes
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            (folder / name / f"{number}.jpg").touch()
    return folder


def put_splits(folder: Path, classes: int | list[str], per_class: int = 4) -> Path:
    put(folder / "train", classes, per_class)
    put(folder / "test", classes, 2)
    return folder


def put_domainnet(root: Path) -> None:
    for domain in DOMAINS:
        put(root / "domainnet" / domain, 4)
        for split, numbers in (("train", (0, 1, 2)), ("test", (3,))):
            lines = [f"{domain}/c{c:03}/{i}.jpg {c}\n" for c in range(4) for i in numbers]
            (root / "domainnet" / f"{domain}_{split}.txt").write_text("".join(lines))


def put_core50(root: Path) -> None:
    """Create CORe50 with four objects, two per group, all in every session; numbers follow the order of groups."""
    numbers = {"o3": 0, "o1": 1, "o2": 2, "o4": 3}

    def write(folder: str, file: str, session: int, objects: list[str]) -> None:
        run = root / "core50" / "batches_filelists" / folder / "run0"
        run.mkdir(parents=True, exist_ok=True)
        lines = [f"s{session}/{o}/C_{i}.png {numbers[o]}\n" for o in objects for i in range(3)]
        (run / file).write_text("".join(lines))

    for session in range(1, 12):
        put(root / "core50" / "core50_128x128" / f"s{session}", list(numbers), 0)
        for o, i in itertools.product(numbers, range(3)):
            (root / "core50" / "core50_128x128" / f"s{session}" / o / f"C_{i}.png").touch()
    for number in range(8):
        write("NI_inc", f"train_batch_{number:02}_filelist.txt", number + 1, list(numbers))
    for number in range(9):
        write("NC_inc", f"train_batch_{number:02}_filelist.txt", number + 1, [["o3", "o1"], ["o2", "o4"]][number % 2])
    for folder in ("NI_inc", "NC_inc"):
        write(folder, "test_filelist.txt", 11, list(numbers))


def put_cub200(root: Path) -> None:
    folder, numbers = root / "CUB_200_2011", range(800)
    names = [f"{n // 4 + 1:03}.Bird/{n}.jpg" for n in numbers]
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).touch()
    columns: dict[str, list[Any]] = {
        "images.txt": names,
        "train_test_split.txt": [int(n % 4 < 3) for n in numbers],
        "image_class_labels.txt": [n // 4 + 1 for n in numbers],
        "bounding_boxes.txt": ["1.0 2.0 3.0 4.0" for _ in numbers],
    }
    for file, column in columns.items():
        (folder / file).write_text("".join(f"{n + 1} {value}\n" for n, value in zip(numbers, column, strict=True)))


def put_mnist(root: Path) -> None:
    """Create MNIST files in which all pixels of image i are i."""
    (root / "MNIST" / "raw").mkdir(parents=True)
    for split, count in (("train", 60), ("t10k", 20)):
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).tobytes()
        labels = bytes(i % 10 for i in range(count))
        (root / "MNIST" / "raw" / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, count, 28, 28) + pixels
        )
        (root / "MNIST" / "raw" / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)


def put_mixed(root: Path) -> None:
    for number, name in enumerate(("textures", "trash", "pacs_sketch", "cifar10", "mnist")):
        put_splits(root / name, number + 2)


def put_pacs(root: Path) -> None:
    for name in ("photo", "art_painting", "cartoon", "sketch"):
        put_splits(root / f"pacs_{name}", 7)


PUT = {
    "digits": (lambda root: None, [2] * 5),
    "split-cifar10": (lambda root: put_splits(root / "cifar10", 10), [2] * 5),
    "pacs": (put_pacs, [7] * 4),
    "mixed": (put_mixed, [2, 3, 4, 5, 6]),
    "imagenet-r-10": (lambda root: put(root / "imagenet-r", 200), [20] * 10),
    "imagenet-a-10": (lambda root: put(root / "imagenet-a", 200), [20] * 10),
    "cub200-10": (put_cub200, [20] * 10),
    "core50": (put_core50, [4] * 8),
    "domainnet": (put_domainnet, [4] * 6),
}


# torchvision checks the md5 of the published files, so no small copies of these can be made.
MISSING = ("split-cifar100-5", "split-cifar100-10", "split-cifar100-20", "five-datasets")
