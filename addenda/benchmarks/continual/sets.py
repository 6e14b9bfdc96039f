"""Opening a set of images in its two parts: from folders, from its authors' lists, or through torchvision."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

from addenda.benchmarks.continual.stream import ImageSet
from addenda.exceptions import DataError
from addenda.learner.data import LabelledImages, open_parts

TEST_FRACTION = 0.2


def open_folder(name: str, folder: Path, seed: int, address: str | None = None) -> ImageSet:
    """Opens a folder of class folders; messages say that its images come from the address.

    It holds train/ and test/; or the class folders alone, of which a fifth, drawn class by class, is the test part; or
    they alone beside NAME_train.txt and NAME_test.txt, lists as DomainNet's authors publish them.
    """
    if not folder.is_dir():
        origin = f" The images come from {address}." if address else ""
        raise DataError(
            f"There is no folder {str(folder)!r}. Put the set {name!r} there: train/ and test/ with a folder of images "
            f"for each class, or such folders alone.{origin} If it lies elsewhere, say so with --data FOLDER or with "
            "`root` in the YAML file."
        )
    lists = [folder.with_name(f"{folder.name}_{part}.txt") for part in ("train", "test")]
    if all(file.is_file() for file in lists):
        train, test = (read_list(file, folder.parent) for file in lists)
        if untaught := sorted(set(test.labels) - set(train.labels)):
            raise DataError(f"{test.where} has the class {untaught[0]!r}, and {train.where} does not.")
        return ImageSet(name, train, test)
    whole, test_part = open_parts(folder)
    if test_part is not None:
        return ImageSet(name, whole, test_part)
    kept, held_out = whole.objective.split(whole.targets, len(whole.labels), TEST_FRACTION, seed)
    return ImageSet(name, *(whole.select(sorted(rows.tolist())) for rows in (kept, held_out)))


def read_list(file: Path, root: Path) -> LabelledImages:
    """The images that a list names, a path and a number in each line; the folder that holds one names its class.

    The numbers are left alone: in CORe50's lists they change with the order of the experiences.
    """
    from avalanche.benchmarks.utils.datasets_from_filelists import default_flist_reader

    try:
        paths = [root / path for path, _ in default_flist_reader(file)]
    except OSError as error:
        raise DataError(f"The list {str(file)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"The list {str(file)!r} is not lines of a path and a number: {error}.") from error
    if not paths:
        raise DataError(f"The list {str(file)!r} is empty.")
    if not paths[0].is_file():
        raise DataError(f"The list {str(file)!r} names {str(paths[0])!r}, and there is no such file.")
    labels = sorted({path.parent.name for path in paths})
    number = {label: i for i, label in enumerate(labels)}
    targets = torch.tensor([number[path.parent.name] for path in paths], dtype=torch.int64, device="cpu")
    return LabelledImages(f"{str(file)!r}", tuple(labels), targets, paths)


def _svhn(root: Path, train: bool, download: bool) -> Any:
    part = SVHN(root, split="train" if train else "test", download=download)
    part.targets = part.labels
    return part


_TORCHVISION: Mapping[str, tuple[Callable[..., Any], str, str]] = {
    "cifar10": (CIFAR10, "the unpacked cifar-10-batches-py/", CIFAR10.url),
    "cifar100": (CIFAR100, "the unpacked cifar-100-python/", CIFAR100.url),
    "svhn": (_svhn, "train_32x32.mat and test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"),
    "mnist": (MNIST, "MNIST/raw/ with its four unpacked files", MNIST.mirrors[0]),
    "fashion_mnist": (FashionMNIST, "FashionMNIST/raw/ with its four unpacked files", FashionMNIST.mirrors[0]),
}
"""What makes a part of a set, what its root must hold, and where that comes from."""


def open_torchvision(name: str, root: Path, download: bool) -> ImageSet:
    """Opens a set through torchvision, which may fetch it where it is missing."""
    read, files, address = _TORCHVISION[name]
    with asking_for(name, root, files, address, download):
        parts = [read(root=root, train=train, download=download) for train in (True, False)]
    labels = tuple(map(str, getattr(parts[0], "classes", range(10))))
    targets = [torch.as_tensor(part.targets, dtype=torch.int64, device="cpu") for part in parts]
    where = f"{name} in {str(root)!r}"
    return ImageSet(name, *(LabelledImages(where, labels, *each) for each in zip(targets, parts, strict=True)))


@contextmanager
def asking_for(name: str, root: Path, files: str, address: str, download: bool) -> Iterator[None]:
    """Says what to do where a library finds no images; what it prints does not mix with our own output."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (OSError, RuntimeError, ValueError) as error:
        tried = "it could not be downloaded" if download else "it is not there as published"
        more = "" if download else ", or download it with --download"
        raise DataError(
            f"{name} was looked for in {str(root)!r}, and {tried} ({error}). Put {files} there, from {address}; or say "
            f"where it lies with --data FOLDER or with `root` in the YAML file{more}."
        ) from error
