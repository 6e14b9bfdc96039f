"""Sources of a stream's images: the `data` section of its configuration, one class per source."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from torchvision.datasets.utils import download_and_extract_archive

from addenda.benchmarks.continual.sets import explaining_missing, open_folder, open_torchvision, read_list
from addenda.benchmarks.continual.stream import ImageSet, Stream, by_class, by_set
from addenda.benchmarks.demo import PAIRS, digits
from addenda.learner.data import LabelledImages, open_images

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
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    @abstractmethod
    def stream(self, name: str, options: SourceOptions) -> Stream:
        """Build the stream, with all its images."""


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

    @abstractmethod
    def _images(self, options: SourceOptions) -> ImageSet: ...

    def stream(self, name: str, options: SourceOptions) -> Stream:
        """Build the stream, with all its images."""
        return by_class(name, self._images(options), self.num_experiences, self.class_order, self.first)


class Digits(_Source):
    """scikit-learn's handwritten digits, two per experience."""

    source: Literal["digits"]

    def stream(self, name: str, options: SourceOptions) -> Stream:
        """Build the stream, with all its images."""
        sets = [
            ImageSet(f"digits-{a}{b}", *(open_images(digits((a, b), test, options.seed)) for test in (False, True)))
            for a, b in PAIRS
        ]
        return by_set(name, sets, shared_labels=True)


class Folders(_Rooted):
    """One dataset per experience, each a folder."""

    source: Literal["folders"]
    sets: Annotated[tuple[str, ...], Field(min_length=2)]  # folders of the datasets within `root`, in order
    shared_labels: bool = False  # equal class names are the same class; otherwise a class is named `dataset/class`
    address: str | None = None  # where the images can be obtained, for error messages

    def stream(self, name: str, options: SourceOptions) -> Stream:
        """Build the stream, with all its images."""
        root = self._folder(options)
        sets = [open_folder(Path(folder).name, root / folder, options.seed, self.address) for folder in self.sets]
        return by_set(name, sets, self.shared_labels)


class Split(_SplitByClass):
    """A dataset in class folders, split by class."""

    source: Literal["split"]
    root: str
    address: str | None = None  # where the images can be obtained, for error messages

    def _images(self, options: SourceOptions) -> ImageSet:
        root = self._folder(options)
        return open_folder(root.name, root, options.seed, self.address)


class Torchvision(_SplitByClass):
    """A torchvision dataset, split by class; `root` is torchvision's `root`."""

    source: Literal["torchvision"]
    dataset: Literal["cifar10", "cifar100", "svhn", "mnist", "fashion_mnist"]

    def _images(self, options: SourceOptions) -> ImageSet:
        return open_torchvision(self.dataset, self._folder(options), options.download)


class FiveDatasets(_Rooted):
    """CIFAR-10, MNIST, Fashion-MNIST, SVHN and notMNIST; `root` is torchvision's, and contains the folder notMNIST."""

    source: Literal["five-datasets"]

    def stream(self, name: str, options: SourceOptions) -> Stream:
        """Build the stream, with all its images."""
        root = self._folder(options)
        four = [open_torchvision(n, root, options.download) for n in ("cifar10", "mnist", "fashion_mnist", "svhn")]
        fifth = open_folder("notMNIST", root / "notMNIST", options.seed, NOT_MNIST)
        return by_set(name, [*four, fifth], shared_labels=False)


class Core50(_Rooted):
    """CORe50 in its authors' experiences; `root` contains core50_128x128/ and batches_filelists/."""

    source: Literal["core50"]
    scenario: Literal["ni", "nc"]  # new instances: eight sessions of all fifty objects; new classes: nine groups
    run: Annotated[int, Field(ge=0, le=9)] = 0  # one of the authors' ten orders
    root: str = "core50"

    def stream(self, name: str, options: SourceOptions) -> Stream:
        """Build the stream, with all its images; with new instances (`ni`) all experiences share one test split."""
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
            is_known = torch.tensor([label in train.labels for label in test.labels], dtype=torch.bool, device="cpu")
            known = test.select(is_known[test.targets].nonzero().flatten().tolist())
            sets.append(ImageSet(f"core50-{self.scenario}-{number + 1}", train, known))
        return by_set(name, sets, shared_labels=True)


class Cub200(_SplitByClass):
    """CUB-200-2011, split by class; full images, not Avalanche's crops; `root` contains CUB_200_2011/."""

    source: Literal["cub200"]

    def _images(self, options: SourceOptions) -> ImageSet:
        from avalanche.benchmarks.datasets import CUB200

        root = self._folder(options)
        with explaining_missing("cub200", root, "the unpacked CUB_200_2011/", CUB200_ADDRESS, options.download):
            if options.download and not (root / CUB200.images_folder).is_dir():
                download_and_extract_archive(CUB200_ADDRESS, root, md5=CUB200.tgz_md5)
            splits = [CUB200(root, train=train, download=False).imgs for train in (True, False)]
        folders = {number: Path(path).parent.name for split in splits for path, number, _ in split}
        where, labels = f"CUB-200 in {str(root)!r}", tuple(folders[number] for number in sorted(folders))
        targets = [torch.tensor([n for _, n, _ in split], dtype=torch.int64, device="cpu") for split in splits]
        files = [[root / CUB200.images_folder / path for path, _, _ in split] for split in splits]
        images = (LabelledImages(where, labels, *split) for split in zip(targets, files, strict=True))
        return ImageSet("cub200", *images)


Data = Annotated[Digits | Folders | Split | Torchvision | FiveDatasets | Core50 | Cub200, Field(discriminator="source")]
