"""Sources of a stream's images: the `data` section of its configuration, one class per source, and how it is opened."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from torchvision.datasets.utils import download_and_extract_archive

from addenda.benchmarks.continual.stream import ImageSet, Stream, by_class, by_set, distinct
from addenda.benchmarks.demo import PAIRS, digits
from addenda.exceptions import DataError
from addenda.learner.data import LabelledImages, open_images, open_parts

TEST_FRACTION = 0.2
NOT_MNIST = "https://github.com/facebookresearch/Adversarial-Continual-Learning/raw/main/data/notMNIST.zip"
# Avalanche warns that its own address may be offline; this archive has the same checksum.
CUB200_ADDRESS = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CORE50_ADDRESS = "https://vlomonaco.github.io/core50/"
CORE50_EXPERIENCES = {"ni": 8, "nc": 9}


class SourceOptions(NamedTuple):
    """How to open a source."""

    base: Path  # folder against which a relative `root` is resolved
    seed: int  # draws the test split of a dataset that has none
    download: bool  # download missing images


def _one_message(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError as error:
        raise ValueError("give 'sorted', a seed, or a list of at least two class names") from error


ClassOrder = Annotated[
    Literal["sorted"] | Annotated[int, Field(ge=0, le=2**32 - 1)] | Annotated[tuple[str, ...], Field(min_length=2)],
    WrapValidator(_one_message),
]


class _Source(BaseModel):
    """A source of datasets, each of which becomes an experience."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    def stream(self, name: str, options: SourceOptions) -> Stream:
        """Build the stream, with all its images."""
        return by_set(name, self._sets(options))

    @abstractmethod
    def _sets(self, options: SourceOptions) -> list[ImageSet]: ...


class _Rooted(_Source):
    """A source whose images are in the folder `root`."""

    root: str = "."

    def _folder(self, options: SourceOptions) -> Path:
        return (options.base / self.root).absolute()


class _SplitByClass(_Rooted):
    """A dataset whose classes are split into experiences."""

    num_experiences: Annotated[int, Field(ge=2)] = 5
    class_order: ClassOrder = "sorted"  # the dataset's order; or a seed to draw one (usually 1993); or all class names
    first: Annotated[int, Field(ge=2)] | None = None  # classes of the first experience; None: as many as the others

    def stream(self, name: str, options: SourceOptions) -> Stream:
        """Build the stream, with all its images."""
        (images,) = self._sets(options)
        return by_class(name, images, self.num_experiences, self.class_order, self.first)


class Digits(_Source):
    """scikit-learn's handwritten digits, two per experience."""

    source: Literal["digits"]

    def _sets(self, options: SourceOptions) -> list[ImageSet]:
        return [
            ImageSet(f"digits-{a}{b}", *(open_images(digits((a, b), test, options.seed)) for test in (False, True)))
            for a, b in PAIRS
        ]


class Folders(_Rooted):
    """One dataset per experience, each a folder."""

    source: Literal["folders"]
    sets: Annotated[tuple[str, ...], Field(min_length=2)]  # folders of the datasets within `root`, in order
    shared_labels: bool = False  # equal class names are the same class; otherwise a class is named `dataset/class`
    address: str | None = None  # where the images can be obtained, for error messages

    def _sets(self, options: SourceOptions) -> list[ImageSet]:
        sets = [open_folder(self._folder(options) / folder, options.seed, self.address) for folder in self.sets]
        return sets if self.shared_labels else [distinct(images) for images in sets]


class Split(_SplitByClass):
    """A dataset in class folders, split by class."""

    source: Literal["split"]
    root: str
    address: str | None = None  # where the images can be obtained, for error messages

    def _sets(self, options: SourceOptions) -> list[ImageSet]:
        return [open_folder(self._folder(options), options.seed, self.address)]


class Torchvision(_SplitByClass):
    """A torchvision dataset, split by class; `root` is torchvision's `root`."""

    source: Literal["torchvision"]
    dataset: Literal["cifar10", "cifar100", "svhn", "mnist", "fashion_mnist"]

    def _sets(self, options: SourceOptions) -> list[ImageSet]:
        return [open_torchvision(self.dataset, self._folder(options), options.download)]


class FiveDatasets(_Rooted):
    """CIFAR-10, MNIST, Fashion-MNIST, SVHN and notMNIST; `root` is torchvision's, and contains the folder notMNIST."""

    source: Literal["five-datasets"]

    def _sets(self, options: SourceOptions) -> list[ImageSet]:
        root = self._folder(options)
        four = [open_torchvision(n, root, options.download) for n in ("cifar10", "mnist", "fashion_mnist", "svhn")]
        return [distinct(images) for images in (*four, open_folder(root / "notMNIST", options.seed, NOT_MNIST))]


class Core50(_Rooted):
    """CORe50 in its authors' experiences; `root` contains core50_128x128/ and batches_filelists/.

    With new instances (`ni`) all experiences share one test split.
    """

    source: Literal["core50"]
    scenario: Literal["ni", "nc"]  # new instances: eight sessions of all fifty objects; new classes: nine groups
    run: Annotated[int, Field(ge=0, le=9)] = 0  # one of the authors' ten orders
    root: str = "core50"

    def _sets(self, options: SourceOptions) -> list[ImageSet]:
        from avalanche.benchmarks.datasets.core50 import core50_data

        root = self._folder(options)
        images, files = root / "core50_128x128", "the unpacked core50_128x128/ and batches_filelists/"
        lists = root / "batches_filelists" / f"{self.scenario.upper()}_inc" / f"run{self.run}"
        with explaining_missing("core50", root, files, CORE50_ADDRESS, options.download):
            if options.download and not (images.is_dir() and lists.is_dir()):
                for file, url, md5 in core50_data.data:
                    if file in ("core50_128x128.zip", "batches_filelists.zip"):
                        download_and_extract_archive(url, root, filename=file, md5=md5)
            if not images.is_dir() or not lists.is_dir():
                raise FileNotFoundError(f"no folder {str(lists if images.is_dir() else images)!r}")
        test = read_list(lists / "test_filelist.txt", images)
        sets = []
        for number in range(CORE50_EXPERIENCES[self.scenario]):
            train = read_list(lists / f"train_batch_{number:02}_filelist.txt", images)
            known = [row for row, target in enumerate(test.targets.tolist()) if test.labels[target] in train.labels]
            sets.append(ImageSet(f"core50-{self.scenario}-{number + 1}", train, test.select(known)))
        return sets


class Cub200(_SplitByClass):
    """CUB-200-2011, split by class; full images, not Avalanche's crops; `root` contains CUB_200_2011/."""

    source: Literal["cub200"]

    def _sets(self, options: SourceOptions) -> list[ImageSet]:
        from avalanche.benchmarks.datasets import CUB200

        root = self._folder(options)
        folder = root / CUB200.images_folder
        with explaining_missing("cub200", root, "the unpacked CUB_200_2011/", CUB200_ADDRESS, options.download):
            if options.download and not folder.is_dir():
                download_and_extract_archive(CUB200_ADDRESS, root, md5=CUB200.tgz_md5)
            splits = [CUB200(root, train=train, download=False).imgs for train in (True, False)]
        files = ([folder / path for path, *_ in split] for split in splits)
        return [ImageSet("cub200", *(from_files(f"CUB-200 in {str(root)!r}", split) for split in files))]


Data = Annotated[Digits | Folders | Split | Torchvision | FiveDatasets | Core50 | Cub200, Field(discriminator="source")]


def open_folder(folder: Path, seed: int, address: str | None) -> ImageSet:
    """Open a dataset in class folders; error messages mention the address of its images.

    The folder contains train/ and test/; or class folders only, of which a stratified fifth becomes the test split; or
    class folders only, next to the file lists NAME_train.txt and NAME_test.txt, as published for DomainNet.
    """
    if not folder.is_dir():
        origin = f" The images are available from {address}." if address else ""
        raise DataError(
            f"There is no folder {str(folder)!r}. Put dataset {folder.name!r} there, with class folders or with train/ "
            f"and test/ of class folders.{origin} For another location, pass --data FOLDER or set `root` in the YAML "
            "file."
        )
    lists = [folder.with_name(f"{folder.name}_{split}.txt") for split in ("train", "test")]
    if all(file.is_file() for file in lists):
        train, test = (read_list(file, folder.parent) for file in lists)
        if unknown := sorted(set(test.labels) - set(train.labels)):
            raise DataError(
                f"{test.where} has class {unknown[0]!r}, which {train.where} lacks; remove it, or add it for training."
            )
        return ImageSet(folder.name, train, test)
    images, test_split = open_parts(folder)
    if test_split is not None:
        return ImageSet(folder.name, images, test_split)
    train_rows, test_rows = images.objective.split(images.targets, len(images.labels), TEST_FRACTION, seed)
    return ImageSet(folder.name, *(images.select(sorted(rows.tolist())) for rows in (train_rows, test_rows)))


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
    return from_files(f"{str(file)!r}", paths)


def from_files(where: str, files: Sequence[Path]) -> LabelledImages:
    """Image files, each with the name of its folder as its class."""
    labels = sorted({file.parent.name for file in files})
    targets = [labels.index(file.parent.name) for file in files]
    return LabelledImages(where, tuple(labels), torch.tensor(targets, dtype=torch.int64, device="cpu"), list(files))


_TORCHVISION: Mapping[str, tuple[Callable[..., Any], str, str]] = {
    "cifar10": (CIFAR10, "the unpacked cifar-10-batches-py/", CIFAR10.url),
    "cifar100": (CIFAR100, "the unpacked cifar-100-python/", CIFAR100.url),
    "svhn": (SVHN, "train_32x32.mat and test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"),
    "mnist": (MNIST, "MNIST/raw/ with its four unpacked files", MNIST.mirrors[0]),
    "fashion_mnist": (FashionMNIST, "FashionMNIST/raw/ with its four unpacked files", FashionMNIST.mirrors[0]),
}
"""Constructor of each torchvision dataset, the files expected in its root, and where to obtain them."""


def open_torchvision(name: str, root: Path, download: bool) -> ImageSet:
    """Open a torchvision dataset, and download it if asked and missing."""
    read, files, address = _TORCHVISION[name]
    is_train, attribute = (("train", "test"), "labels") if name == "svhn" else ((True, False), "targets")
    with explaining_missing(name, root, files, address, download):
        splits = [read(root, value, download=download) for value in is_train]
    labels = tuple(map(str, getattr(splits[0], "classes", range(10))))
    targets = [torch.as_tensor(getattr(split, attribute), dtype=torch.int64, device="cpu") for split in splits]
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
