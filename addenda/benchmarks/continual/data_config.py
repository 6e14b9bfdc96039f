"""Where a stream's images come from: what a configuration's `data` may say, source by source."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator


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


class _InClasses(_Source):
    """A set whose classes are dealt out to experiences.

    Attributes:
        num_experiences: how many.
        class_order: `"sorted"` is the set's own order; a seed draws one as the field does; or the names in order.
        first: classes of the first experience; None gives each the same number.
    """

    num_experiences: Annotated[int, Field(ge=2)] = 5
    class_order: ClassOrder = "sorted"
    first: Annotated[int, Field(ge=2)] | None = None


class Digits(_Source):
    """scikit-learn's handwritten digits, two in each experience."""

    source: Literal["digits"]


class Folders(_Source):
    """Each set one experience.

    Attributes:
        root: the folder that holds the sets.
        sets: their folders in it, in order.
        shared_labels: whether equal class names mean the same class; else a class is called `set/class`.
        address: where the images come from, for messages.
    """

    source: Literal["folders"]
    root: str = "."
    sets: Annotated[tuple[str, ...], Field(min_length=2)]
    shared_labels: bool = False
    address: str | None = None


class Split(_InClasses):
    """One set of folders.

    Attributes:
        root: the set's folder.
        address: where the images come from, for messages.
    """

    source: Literal["split"]
    root: str
    address: str | None = None


class Torchvision(_InClasses):
    """One set that torchvision reads.

    Attributes:
        dataset: which.
        root: the folder that torchvision calls its root.
    """

    source: Literal["torchvision"]
    dataset: Literal["cifar10", "cifar100", "svhn", "mnist", "fashion_mnist"]
    root: str = "."


class FiveDatasets(_Source):
    """CIFAR-10, MNIST, Fashion-MNIST, SVHN and notMNIST, one after another.

    Attributes:
        root: torchvision's root for the first four; it holds the folder notMNIST too.
    """

    source: Literal["five-datasets"]
    root: str = "."


class Core50(_Source):
    """CORe50's own experiences.

    Attributes:
        scenario: `"ni"`: eight sessions of all fifty objects; `"nc"`: nine groups of new objects.
        run: which of its authors' ten orders.
        root: the folder that holds core50_128x128/ and batches_filelists/.
    """

    source: Literal["core50"]
    scenario: Literal["ni", "nc"]
    run: Annotated[int, Field(ge=0, le=9)] = 0
    root: str = "core50"


class Cub200(_InClasses):
    """CUB-200-2011.

    Attributes:
        root: the folder that holds CUB_200_2011/.
    """

    source: Literal["cub200"]
    root: str = "."


Data = Annotated[Digits | Folders | Split | Torchvision | FiveDatasets | Core50 | Cub200, Field(discriminator="source")]
