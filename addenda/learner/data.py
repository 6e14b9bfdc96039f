"""What can be learned from: a folder of class folders, or a torch Dataset."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from addenda.backbones import SUFFIXES, FrozenBackbone, read_image
from addenda.exceptions import DataError


@runtime_checkable
class ImageDataset(Protocol):
    """A torch Dataset of (image, target): PIL images or normalised tensors, targets from 0. `classes` names them."""

    def __len__(self) -> int:
        """How many items there are."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One image and its target."""


Data = str | Path | ImageDataset


@dataclass(frozen=True)
class LabelledImages:
    """Images and targets, read one at a time.

    Attributes:
        where: what it is called in messages.
        labels: class names.
        targets: class of each image, [N].
        items: file paths, or the dataset that holds the images.
    """

    where: str
    labels: tuple[str, ...]
    targets: Tensor
    items: Sequence[Path] | ImageDataset

    def __len__(self) -> int:
        return len(self.targets)

    def digest(self, index: int) -> str:
        """sha256 over an image's content, whatever its name."""
        return _digest(self.items[index])

    def read(
        self,
        index: int,
        backbone: FrozenBackbone,
        digest: str | None = None,
        transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> Tensor:
        """One image as the backbone takes it, Float[3, H, W].

        Args:
            index: which.
            backbone: says how it is transformed, and which shape a tensor must have.
            digest: what its content must hash to.
            transform: instead of the backbone's own.

        Raises:
            DataError: the image cannot be read, has the wrong shape, or is no longer the same.
        """
        item = self.items[index]
        if digest is not None and _digest(item) != digest:
            raise DataError(
                f"{item if isinstance(item, Path) else f'Item {index} of {self.where}'} changed while it was being "
                "learned from. Files must stay as they are until a run ends, and a Dataset must give the same image "
                "each time: random views are `augmentation`'s to make."
            )
        image = read_image(item) if isinstance(item, Path) else item[0]
        if isinstance(image, Image.Image):
            return (transform or backbone.transform)(image.convert("RGB"))
        expected = backbone.preprocessing["input_size"]
        if not isinstance(image, Tensor) or list(image.shape) != expected or not image.is_floating_point():
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise DataError(
                f"Item {index} of {self.where} is {found}; it must be a PIL image or a normalised floating-point "
                f"tensor {expected}."
            )
        if transform is not None:
            raise DataError(f"Item {index} of {self.where} is a tensor; random views are made of PIL images only.")
        return image

    def read_all(self, backbone: FrozenBackbone) -> Tensor:
        """Every image, Float[N, 3, H, W]: for sets that fit into memory."""
        return torch.stack([self.read(index, backbone) for index in range(len(self))])

    def fingerprint(self, digests: Sequence[str] | None = None) -> str:
        """sha256 over the contents and labels of all images, whatever their order and names.

        Args:
            digests: of every image, where they are known.
        """
        digests = digests or [self.digest(index) for index in range(len(self))]
        lines = [
            f"{digest} {self.labels[target]}" for digest, target in zip(digests, self.targets.tolist(), strict=True)
        ]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _digest(item: Any) -> str:
    """sha256 over a file's bytes, or over the image of a dataset's item."""
    if isinstance(item, Path):
        content = item.read_bytes()
    elif isinstance(item[0], Tensor):
        content = item[0].detach().cpu().contiguous().numpy().tobytes()
    elif isinstance(item[0], Image.Image):
        content = f"{item[0].mode}{item[0].size}".encode() + item[0].tobytes()
    else:
        content = repr(type(item[0])).encode()
    return hashlib.sha256(content).hexdigest()


def split_folders(data: Data, test: Data | None) -> tuple[Data, Data | None]:
    """Takes a folder that holds train/ and test/ apart."""
    if isinstance(data, str | Path) and (Path(data) / "train").is_dir():
        inner = Path(data) / "test"
        return Path(data) / "train", test if test is not None or not inner.is_dir() else inner
    return data, test


def open_images(data: Data) -> LabelledImages:
    """Opens a data set without reading its images.

    Args:
        data: a folder with one folder of images for each class, or a torch Dataset.

    Raises:
        DataError: it is missing or empty.
    """
    return _from_folder(Path(data)) if isinstance(data, str | Path) else _from_dataset(data)


def check_learnable(images: LabelledImages) -> None:
    """Raises DataError where there are too few classes or images to learn and validate from."""
    if len(images.labels) < 2:
        raise DataError(
            f"{images.where} has one class ({images.labels[0]!r}); a classification task needs two or more."
        )
    counts = Counter(images.targets.tolist())
    short = [(label, counts[i]) for i, label in enumerate(images.labels) if counts[i] < 2]
    if short:
        label, count = short[0]
        more = f", and {len(short) - 1} more classes like it" if len(short) > 1 else ""
        raise DataError(
            f"Class {label!r} in {images.where} has {count} image{'' if count == 1 else 's'}{more}: each class needs "
            "two at least, one to learn from and one to validate on."
        )


def check_same_labels(train_labels: Sequence[str], images: LabelledImages) -> LabelledImages:
    """Returns the images with targets in the order of `train_labels`.

    Raises:
        DataError: the classes are not the same.
    """
    missing, extra = sorted(set(train_labels) - set(images.labels)), sorted(set(images.labels) - set(train_labels))
    if extra or missing:
        parts = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"it has {', '.join(map(repr, extra))} besides"] if extra else []
        raise DataError(f"{images.where} does not have the task's classes: {' and '.join(parts)}.")
    order = torch.tensor([list(train_labels).index(label) for label in images.labels])
    return LabelledImages(images.where, tuple(train_labels), order[images.targets], images.items)


def _from_folder(folder: Path) -> LabelledImages:
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}.")
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = {c.name: sorted(p for p in c.rglob("*") if p.suffix.lower() in SUFFIXES) for c in classes}
    if not any(files.values()):
        loose = any(p.suffix.lower() in SUFFIXES for p in folder.iterdir())
        hint = "its images lie side by side" if loose else "no image was found in it"
        raise DataError(
            f"{str(folder)!r} has no class folders with images ({hint}). Put each class's images into a folder named "
            f"after the class: {folder.name}/cat/1.jpg, {folder.name}/dog/1.jpg."
        )
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise DataError(f"Class folder {empty[0]!r} in {str(folder)!r} has no images. Fill it or remove it.")
    paths = [path for paths in files.values() for path in paths]
    targets = [i for i, paths in enumerate(files.values()) for _ in paths]
    return LabelledImages(f"{str(folder)!r}", tuple(files), torch.tensor(targets), paths)


def _from_dataset(data: ImageDataset) -> LabelledImages:
    where = f"the {type(data).__name__} given"
    if len(data) == 0:
        raise DataError(f"{where} is empty.")
    given = getattr(data, "targets", None)
    raw = list(given) if given is not None else [data[i][1] for i in range(len(data))]
    try:
        targets = torch.tensor([int(t) for t in raw])
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} has a target that is not a whole number: {error}.") from error
    names = getattr(data, "classes", None)
    labels = tuple(map(str, names)) if names else tuple(str(i) for i in range(int(targets.max()) + 1))
    if int(targets.min()) < 0 or int(targets.max()) >= len(labels):
        raise DataError(f"{where} has targets from {targets.min()} to {targets.max()} and {len(labels)} classes.")
    return LabelledImages(where, labels, targets, data)
