"""A set of images in its two parts, to learn from and to be tested on, from folders or from its authors' lists."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from torchvision.datasets.utils import download_and_extract_archive

from addenda.exceptions import DataError
from addenda.learner.data import LabelledImages, open_parts

TEST_FRACTION = 0.2


@dataclass(frozen=True)
class ImageSet:
    """A set of images.

    Attributes:
        train: images to learn from.
        test: images to be tested on, of the same classes or of fewer.
    """

    name: str
    train: LabelledImages
    test: LabelledImages


def open_folder(name: str, folder: Path, seed: int, address: str | None = None) -> ImageSet:
    """Opens a folder of class folders.

    It holds train/ and test/; or the class folders alone, of which a fifth, drawn class by class, is the test part; or
    they alone beside NAME_train.txt and NAME_test.txt, lists as DomainNet's authors publish them.

    Args:
        name: what the set is called.
        folder: where it lies.
        seed: of the draw.
        address: where the images come from, for messages.

    Raises:
        DataError: it is missing, or cannot be learned from.
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
        listed = ImageSet(name, *(read_list(file, folder.parent) for file in lists))
        untaught = sorted(set(listed.test.labels) - set(listed.train.labels))
        if untaught:
            raise DataError(f"{listed.test.where} has the class {untaught[0]!r}, and {listed.train.where} does not.")
        return listed
    train, test = open_parts(folder)
    if test is not None:
        return ImageSet(name, train, test)
    kept, held_out = train.objective.split(train.targets, len(train.labels), TEST_FRACTION, seed)
    return ImageSet(name, train.select(sorted(kept.tolist())), train.select(sorted(held_out.tolist())))


def read_list(file: Path, root: Path) -> LabelledImages:
    """The images that a list names, a path and a number in each line; the folder that holds one names its class.

    The numbers are left alone: in CORe50's lists they change with the order of the experiences.

    Raises:
        DataError: the list cannot be read or is empty, or its first image is not there.
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


# Avalanche says of its own address that it may no longer answer; the archive and its checksum are the same.
CUB200_ADDRESS = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CORE50_ADDRESS = "https://vlomonaco.github.io/core50/"
CORE50_EXPERIENCES = {"ni": 8, "nc": 9}


class _Known(NamedTuple):
    """How torchvision reads a set.

    Attributes:
        read: makes the training or the test part.
        files: what its root must hold.
        address: where that comes from.
    """

    read: Callable[..., Any]
    files: str
    address: str


def _svhn(root: Path, train: bool, download: bool) -> Any:
    return SVHN(root, split="train" if train else "test", download=download)


_TORCHVISION = {
    "cifar10": _Known(CIFAR10, "the unpacked cifar-10-batches-py/", CIFAR10.url),
    "cifar100": _Known(CIFAR100, "the unpacked cifar-100-python/", CIFAR100.url),
    "svhn": _Known(_svhn, "train_32x32.mat and test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"),
    "mnist": _Known(MNIST, "MNIST/raw/ with its four unpacked files", MNIST.mirrors[0]),
    "fashion_mnist": _Known(FashionMNIST, "FashionMNIST/raw/ with its four unpacked files", FashionMNIST.mirrors[0]),
}


def open_torchvision(name: str, root: Path, download: bool) -> ImageSet:
    """Opens a set through torchvision.

    Args:
        name: `"cifar10"`, `"cifar100"`, `"svhn"`, `"mnist"` or `"fashion_mnist"`.
        root: torchvision's root.
        download: whether it may be fetched where it is missing.

    Raises:
        DataError: it is not there, or not as its authors published it.
    """
    known = _TORCHVISION[name]
    with _asking_for(name, root, known.files, known.address, download):
        parts = [known.read(root=root, train=train, download=download) for train in (True, False)]
    labels = tuple(map(str, getattr(parts[0], "classes", range(10))))
    train, test = (
        LabelledImages(
            f"{name} in {str(root)!r}",
            labels,
            torch.as_tensor(p.labels if name == "svhn" else p.targets, dtype=torch.int64, device="cpu"),
            p,
        )
        for p in parts
    )
    return ImageSet(name, train, test)


def open_cub200(root: Path, download: bool) -> ImageSet:
    """Opens CUB-200-2011 through Avalanche: whole pictures, not the bounding boxes that Avalanche cuts out.

    Raises:
        DataError: it is not there.
    """
    from avalanche.benchmarks.datasets import CUB200

    with _asking_for("cub200", root, "the unpacked CUB_200_2011/", CUB200_ADDRESS, download):
        if download and not (root / CUB200.images_folder).is_dir():
            download_and_extract_archive(CUB200_ADDRESS, root, md5=CUB200.tgz_md5)
        parts = [CUB200(root, train=train, download=False) for train in (True, False)]
    folders = {number: Path(path).parent.name for part in parts for path, number, _ in part.imgs}
    labels = tuple(folders[number] for number in sorted(folders))
    train, test = (
        LabelledImages(
            f"CUB-200 in {str(root)!r}",
            labels,
            torch.tensor([number for _, number, _ in part.imgs], dtype=torch.int64, device="cpu"),
            [root / CUB200.images_folder / path for path, _, _ in part.imgs],
        )
        for part in parts
    )
    return ImageSet("cub200", train, test)


def open_core50(root: Path, scenario: str, run: int, download: bool) -> list[ImageSet]:
    """Opens CORe50, one set for each of its experiences; of new instances (`"ni"`) all share one test part.

    Args:
        root: holds core50_128x128/ and batches_filelists/.
        scenario: `"ni"` or `"nc"`.
        run: which of its authors' orders.
        download: whether it may be fetched where it is missing.

    Raises:
        DataError: it is not there.
    """
    images, lists = root / "core50_128x128", root / "batches_filelists" / f"{scenario.upper()}_inc" / f"run{run}"
    with _asking_for("core50", root, "the unpacked core50_128x128/ and batches_filelists/", CORE50_ADDRESS, download):
        if download and not (images.is_dir() and lists.is_dir()):
            for file, url, md5 in _core50_archives():
                download_and_extract_archive(url, root, filename=file, md5=md5)
        if not images.is_dir() or not lists.is_dir():
            raise FileNotFoundError(f"no folder {str(lists if images.is_dir() else images)!r}")
    test = read_list(lists / "test_filelist.txt", images)
    sets = []
    for number in range(CORE50_EXPERIENCES[scenario]):
        train = read_list(lists / f"train_batch_{number:02}_filelist.txt", images)
        taught = torch.tensor([label in train.labels for label in test.labels], dtype=torch.bool, device="cpu")
        known = test.select(taught[test.targets].nonzero().flatten().tolist())
        sets.append(ImageSet(f"core50-{scenario}-{number + 1}", train, known))
    return sets


def _core50_archives() -> list[tuple[str, str, str]]:
    """Name, address and md5 of the pictures and of the lists."""
    from avalanche.benchmarks.datasets.core50 import core50_data

    wanted = ("core50_128x128.zip", "batches_filelists.zip")
    return [entry for entry in core50_data.data if entry[0] in wanted]


@contextmanager
def _asking_for(name: str, root: Path, files: str, address: str, download: bool) -> Iterator[None]:
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
