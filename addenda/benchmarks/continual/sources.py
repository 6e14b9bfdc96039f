"""Where a stream's images come from: what `data` may say of them, and how each source makes a stream."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from addenda.benchmarks.continual.experiences import by_class, by_set
from addenda.benchmarks.continual.sets import ImageSet, open_core50, open_cub200, open_folder, open_torchvision
from addenda.benchmarks.continual.stream import Stream
from addenda.benchmarks.demo import PAIRS, digits
from addenda.learner.data import open_images

NOT_MNIST = "https://github.com/facebookresearch/Adversarial-Continual-Learning/raw/main/data/notMNIST.zip"


class Place(NamedTuple):
    """What a source is told when it is opened.

    Attributes:
        base: where a relative `root` is looked for.
        seed: of the test part where a set has none.
        download: whether missing images may be fetched.
    """

    base: Path
    seed: int
    download: bool


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
    """A set whose classes are dealt out to experiences.

    Attributes:
        num_experiences: how many.
        class_order: `"sorted"` is the set's own order; a seed draws one as the field does; or the names in order.
        first: classes of the first experience; None gives each the same number.
    """

    num_experiences: Annotated[int, Field(ge=2)] = 5
    class_order: ClassOrder = "sorted"
    first: Annotated[int, Field(ge=2)] | None = None

    @abstractmethod
    def images(self, place: Place) -> ImageSet:
        """The set."""

    def stream(self, name: str, place: Place) -> Stream:
        """The whole stream."""
        return by_class(name, self.images(place), self.num_experiences, self.class_order, self.first)


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
    """Each set one experience.

    Attributes:
        sets: their folders in the root, in order.
        shared_labels: whether equal class names mean the same class; else a class is called `set/class`.
        address: where the images come from, for messages.
    """

    source: Literal["folders"]
    sets: Annotated[tuple[str, ...], Field(min_length=2)]
    shared_labels: bool = False
    address: str | None = None

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

    def images(self, place: Place) -> ImageSet:
        """The set."""
        root = self._folder(place)
        return open_folder(root.name, root, place.seed, self.address)


class Torchvision(_InClasses):
    """One set that torchvision reads; `root` is the folder that torchvision calls so."""

    source: Literal["torchvision"]
    dataset: Literal["cifar10", "cifar100", "svhn", "mnist", "fashion_mnist"]

    def images(self, place: Place) -> ImageSet:
        """The set."""
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
    """CORe50's own experiences; `root` holds core50_128x128/ and batches_filelists/.

    Attributes:
        scenario: `"ni"`: eight sessions of all fifty objects; `"nc"`: nine groups of new objects.
        run: which of its authors' ten orders.
    """

    source: Literal["core50"]
    scenario: Literal["ni", "nc"]
    run: Annotated[int, Field(ge=0, le=9)] = 0
    root: str = "core50"

    def stream(self, name: str, place: Place) -> Stream:
        """The whole stream."""
        sets = open_core50(self._folder(place), self.scenario, self.run, place.download)
        return by_set(name, sets, shared_labels=True)


class Cub200(_InClasses):
    """CUB-200-2011; `root` holds CUB_200_2011/."""

    source: Literal["cub200"]

    def images(self, place: Place) -> ImageSet:
        """The set."""
        return open_cub200(self._folder(place), place.download)


Data = Annotated[Digits | Folders | Split | Torchvision | FiveDatasets | Core50 | Cub200, Field(discriminator="source")]
