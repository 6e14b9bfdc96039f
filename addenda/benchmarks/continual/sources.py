"""Where a stream's images come from: what `data` may say of them, and how each source makes a stream."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from torchvision.datasets.utils import download_and_extract_archive

from addenda.benchmarks.continual.sets import asking_for, open_folder, open_torchvision, read_list
from addenda.benchmarks.continual.stream import ImageSet, Stream, by_class, by_set
from addenda.benchmarks.demo import PAIRS, digits
from addenda.learner.data import LabelledImages, open_images

NOT_MNIST = "https://github.com/facebookresearch/Adversarial-Continual-Learning/raw/main/data/notMNIST.zip"
# Avalanche says of its own address that it may no longer answer; the archive and its checksum are the same.
CUB200_ADDRESS = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CORE50_ADDRESS = "https://vlomonaco.github.io/core50/"
CORE50_EXPERIENCES = {"ni": 8, "nc": 9}


class Place(NamedTuple):
    """What a source is told when it is opened."""

    base: Path  # where a relative `root` is looked for
    seed: int  # of the test part where a set has none
    download: bool  # whether missing images may be fetched


def _one_message(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError as error:
        raise ValueError("give 'sorted', a seed, or a list of two class names or more") from error


ClassOrder = Annotated[
    Literal["sorted"] | Annotated[int, Field(ge=0, le=2**32 - 1)] | Annotated[tuple[str, ...], Field(min_length=2)],
    WrapValidator(_one_message),
]


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    @abstractmethod
    def stream(self, name: str, place: Place) -> Stream:
        """The whole stream."""


class _Rooted(_Source):
    """A source whose images lie in a folder, its `root`."""

    root: str = "."

    def _folder(self, place: Place) -> Path:
        return (place.base / self.root).absolute()


class _InClasses(_Rooted):
    """A set whose classes are dealt out to experiences."""

    num_experiences: Annotated[int, Field(ge=2)] = 5
    class_order: ClassOrder = "sorted"  # the set's own order; a seed draws one as the field does; or the names in order
    first: Annotated[int, Field(ge=2)] | None = None  # classes of the first experience; None: as many as the others

    @abstractmethod
    def _images(self, place: Place) -> ImageSet: ...

    def stream(self, name: str, place: Place) -> Stream:
        """The whole stream."""
        return by_class(name, self._images(place), self.num_experiences, self.class_order, self.first)


class Digits(_Source):
    """scikit-learn's handwritten digits, two in each experience."""

    source: Literal["digits"]

    def stream(self, name: str, place: Place) -> Stream:
        """The whole stream."""
        sets = [
            ImageSet(f"digits-{a}{b}", *(open_images(digits((a, b), test, place.seed)) for test in (False, True)))
            for a, b in PAIRS
        ]
        return by_set(name, sets, shared_labels=True)


class Folders(_Rooted):
    """Each set one experience."""

    source: Literal["folders"]
    sets: Annotated[tuple[str, ...], Field(min_length=2)]  # their folders in the root, in order
    shared_labels: bool = False  # whether equal class names mean the same class; else a class is called `set/class`
    address: str | None = None  # where the images come from, for messages

    def stream(self, name: str, place: Place) -> Stream:
        """The whole stream."""
        root = self._folder(place)
        sets = [open_folder(Path(one).name, root / one, place.seed, self.address) for one in self.sets]
        return by_set(name, sets, self.shared_labels)


class Split(_InClasses):
    """One set of folders; `address` is where the images come from, for messages."""

    source: Literal["split"]
    root: str
    address: str | None = None

    def _images(self, place: Place) -> ImageSet:
        root = self._folder(place)
        return open_folder(root.name, root, place.seed, self.address)


class Torchvision(_InClasses):
    """One set that torchvision reads; `root` is the folder that torchvision calls so."""

    source: Literal["torchvision"]
    dataset: Literal["cifar10", "cifar100", "svhn", "mnist", "fashion_mnist"]

    def _images(self, place: Place) -> ImageSet:
        return open_torchvision(self.dataset, self._folder(place), place.download)


class FiveDatasets(_Rooted):
    """CIFAR-10, MNIST, Fashion-MNIST, SVHN and notMNIST; `root` is torchvision's, and holds the folder notMNIST too."""

    source: Literal["five-datasets"]

    def stream(self, name: str, place: Place) -> Stream:
        """The whole stream."""
        root = self._folder(place)
        four = [open_torchvision(n, root, place.download) for n in ("cifar10", "mnist", "fashion_mnist", "svhn")]
        fifth = open_folder("notMNIST", root / "notMNIST", place.seed, NOT_MNIST)
        return by_set(name, [*four, fifth], shared_labels=False)


class Core50(_Rooted):
    """CORe50's own experiences; `root` holds core50_128x128/ and batches_filelists/."""

    source: Literal["core50"]
    scenario: Literal["ni", "nc"]  # eight sessions of all fifty objects, or nine groups of new objects
    run: Annotated[int, Field(ge=0, le=9)] = 0  # which of its authors' ten orders
    root: str = "core50"

    def stream(self, name: str, place: Place) -> Stream:
        """The whole stream; of new instances (`ni`) all experiences share one test part."""
        from avalanche.benchmarks.datasets.core50 import core50_data

        root = self._folder(place)
        images, files = root / "core50_128x128", "the unpacked core50_128x128/ and batches_filelists/"
        lists = root / "batches_filelists" / f"{self.scenario.upper()}_inc" / f"run{self.run}"
        with asking_for("core50", root, files, CORE50_ADDRESS, place.download):
            if place.download and not (images.is_dir() and lists.is_dir()):
                for file, url, md5 in core50_data.data:
                    if file in ("core50_128x128.zip", "batches_filelists.zip"):
                        download_and_extract_archive(url, root, filename=file, md5=md5)
            if not images.is_dir() or not lists.is_dir():
                raise FileNotFoundError(f"no folder {str(lists if images.is_dir() else images)!r}")
        test = read_list(lists / "test_filelist.txt", images)
        sets = []
        for number in range(CORE50_EXPERIENCES[self.scenario]):
            train = read_list(lists / f"train_batch_{number:02}_filelist.txt", images)
            taught = torch.tensor([label in train.labels for label in test.labels], dtype=torch.bool, device="cpu")
            known = test.select(taught[test.targets].nonzero().flatten().tolist())
            sets.append(ImageSet(f"core50-{self.scenario}-{number + 1}", train, known))
        return by_set(name, sets, shared_labels=True)


class Cub200(_InClasses):
    """CUB-200-2011, whole pictures, not the bounding boxes that Avalanche cuts out; `root` holds CUB_200_2011/."""

    source: Literal["cub200"]

    def _images(self, place: Place) -> ImageSet:
        from avalanche.benchmarks.datasets import CUB200

        root = self._folder(place)
        with asking_for("cub200", root, "the unpacked CUB_200_2011/", CUB200_ADDRESS, place.download):
            if place.download and not (root / CUB200.images_folder).is_dir():
                download_and_extract_archive(CUB200_ADDRESS, root, md5=CUB200.tgz_md5)
            parts = [CUB200(root, train=train, download=False).imgs for train in (True, False)]
        folders = {number: Path(path).parent.name for part in parts for path, number, _ in part}
        where, labels = f"CUB-200 in {str(root)!r}", tuple(folders[number] for number in sorted(folders))
        targets = [torch.tensor([n for _, n, _ in part], dtype=torch.int64, device="cpu") for part in parts]
        files = [[root / CUB200.images_folder / path for path, _, _ in part] for part in parts]
        return ImageSet("cub200", *(LabelledImages(where, labels, *each) for each in zip(targets, files, strict=True)))


Data = Annotated[Digits | Folders | Split | Torchvision | FiveDatasets | Core50 | Cub200, Field(discriminator="source")]
