"""A set of images in its two parts, to learn from and to be tested on, from folders or from its authors' lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

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
