"""Open the training and test splits of a dataset: from folders, from its authors' file lists, or with torchvision."""

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
    """Open a dataset in class folders; error messages mention the address of its images.

    The folder contains train/ and test/; or class folders only, of which a stratified fifth becomes the test split; or
    class folders only, next to the file lists NAME_train.txt and NAME_test.txt, as published for DomainNet.
    """
    if not folder.is_dir():
        origin = f" The images are available from {address}." if address else ""
        raise DataError(
            f"There is no folder {str(folder)!r}. Put dataset {name!r} there, with class folders or with train/ and "
            f"test/ of class folders.{origin} For another location, pass --data FOLDER or set `root` in the YAML file."
        )
    lists = [folder.with_name(f"{folder.name}_{split}.txt") for split in ("train", "test")]
    if all(file.is_file() for file in lists):
        train, test = (read_list(file, folder.parent) for file in lists)
        if unknown := sorted(set(test.labels) - set(train.labels)):
            raise DataError(
                f"{test.where} has class {unknown[0]!r}, which {train.where} lacks; remove it, or add it for training."
            )
        return ImageSet(name, train, test)
    images, test_split = open_parts(folder)
    if test_split is not None:
        return ImageSet(name, images, test_split)
    train_rows, test_rows = images.objective.split(images.targets, len(images.labels), TEST_FRACTION, seed)
    return ImageSet(name, *(images.select(sorted(rows.tolist())) for rows in (train_rows, test_rows)))


def read_list(file: Path, root: Path) -> LabelledImages:
    """Read a file list with a path and a number per line; an image's class is the folder that contains it.

    The numbers are ignored: in CORe50's lists they depend on the order of the experiences.
    """
    from avalanche.benchmarks.utils.datasets_from_filelists import default_flist_reader

    try:
        paths = [root / path for path, _ in default_flist_reader(file)]
    except OSError as error:
        raise DataError(f"File list {str(file)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"File list {str(file)!r} must have a path and a number per line: {error}.") from error
    if not paths:
        raise DataError(f"File list {str(file)!r} is empty; it must have a path and a number per line.")
    if not paths[0].is_file():
        raise DataError(
            f"File list {str(file)!r} names {str(paths[0])!r}, which does not exist. Add the file, or remove the line."
        )
    labels = sorted({path.parent.name for path in paths})
    index = {label: i for i, label in enumerate(labels)}
    targets = torch.tensor([index[path.parent.name] for path in paths], dtype=torch.int64, device="cpu")
    return LabelledImages(f"{str(file)!r}", tuple(labels), targets, paths)


def _svhn(root: Path, train: bool, download: bool) -> Any:
    dataset = SVHN(root, split="train" if train else "test", download=download)
    dataset.targets = dataset.labels
    return dataset


_TORCHVISION: Mapping[str, tuple[Callable[..., Any], str, str]] = {
    "cifar10": (CIFAR10, "the unpacked cifar-10-batches-py/", CIFAR10.url),
    "cifar100": (CIFAR100, "the unpacked cifar-100-python/", CIFAR100.url),
    "svhn": (_svhn, "train_32x32.mat and test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"),
    "mnist": (MNIST, "MNIST/raw/ with its four unpacked files", MNIST.mirrors[0]),
    "fashion_mnist": (FashionMNIST, "FashionMNIST/raw/ with its four unpacked files", FashionMNIST.mirrors[0]),
}
"""Constructor of each torchvision dataset, the files expected in its root, and where to obtain them."""


def open_torchvision(name: str, root: Path, download: bool) -> ImageSet:
    """Open a torchvision dataset, and download it if asked and missing."""
    read, files, address = _TORCHVISION[name]
    with explaining_missing(name, root, files, address, download):
        splits = [read(root=root, train=train, download=download) for train in (True, False)]
    labels = tuple(map(str, getattr(splits[0], "classes", range(10))))
    targets = [torch.as_tensor(split.targets, dtype=torch.int64, device="cpu") for split in splits]
    where = f"{name} in {str(root)!r}"
    return ImageSet(name, *(LabelledImages(where, labels, *split) for split in zip(targets, splits, strict=True)))


@contextmanager
def explaining_missing(name: str, root: Path, files: str, address: str, download: bool) -> Iterator[None]:
    """Turn a library's error about missing images into instructions, and send its output to standard error."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (OSError, RuntimeError, ValueError) as error:
        problem = "could not be downloaded to" if download else "was not found in"
        hint = "" if download else ", or pass --download"
        raise DataError(
            f"{name} {problem} {str(root)!r} ({error}). Put {files} there, from {address}. For another location, pass "
            f"--data FOLDER or set `root` in the YAML file{hint}."
        ) from error
