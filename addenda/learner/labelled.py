"""Labelled images, wherever they came from: what they are, and whether a task can be learned from them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from addenda.backbones import FrozenBackbone, read_image
from addenda.exceptions import DataError

Targets = Int[Tensor, " N"] | Bool[Tensor, "N C"]
"""The class of each image; or, of a multi-label task, whether each image has each label."""


@runtime_checkable
class ImageDataset(Protocol):
    """A torch Dataset of (image, target): PIL images or normalised tensors. `classes` names the classes.

    A target is a class, from 0, or a vector of 0 and 1, one for each of two labels or more.
    """

    def __len__(self) -> int:
        """How many items there are."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One image and its target."""


@dataclass(frozen=True)
class EncodedImage:
    """An image file's bytes that lie in no file of their own.

    Attributes:
        name: what it is called in messages.
        content: as they would stand in a file.
    """

    name: str
    content: bytes


@dataclass(frozen=True)
class LabelledImages:
    """Images and targets, read one at a time.

    Attributes:
        where: what it is called in messages.
        labels: names of the C classes.
        targets: the class of each image, or its labels.
        items: the image files, or the dataset that holds the images.
    """

    where: str
    labels: tuple[str, ...]
    targets: Targets
    items: Sequence[Path | EncodedImage] | ImageDataset

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def objective(self) -> str:
        """`"single-label"`, or `"multi-label"` where an image may have any number of labels."""
        return "single-label" if self.targets.ndim == 1 else "multi-label"

    @property
    def can_vary(self) -> bool:
        """Whether random views can be made: of image files and PIL images, not of ready tensors."""
        item = self.items[0]
        return isinstance(item, Path | EncodedImage) or isinstance(item[0], Image.Image)

    @property
    def counts(self) -> list[int]:
        """How many images have each label."""
        counts: list[int] = label_counts(self.targets, len(self.labels)).tolist()
        return counts

    def digest(self, index: int) -> str:
        """sha256 over an image's content, whatever its name.

        Raises:
            DataError: a file cannot be opened.
        """
        return _digest(self.items[index])

    def read(
        self,
        index: int,
        backbone: FrozenBackbone,
        digest: str | None = None,
        transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> Float[Tensor, "3 H W"]:
        """One image as the backbone takes it.

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
        image = _picture(item)
        if isinstance(image, Image.Image):
            return backbone.transform(image) if transform is None else transform(image.convert("RGB"))
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

    def picture(self, index: int) -> Any:
        """One image as it is held: a PIL image in most cases, or what a dataset gives.

        Raises:
            DataError: a file is not a readable image.
        """
        return _picture(self.items[index])

    def read_all(self, backbone: FrozenBackbone) -> Float[Tensor, "N 3 H W"]:
        """Every image: for sets that fit into memory."""
        return torch.stack([self.read(index, backbone) for index in range(len(self))])

    def fingerprint(self, digests: Sequence[str] | None = None) -> str:
        """sha256 over the contents and labels of all images, whatever their order and names.

        Args:
            digests: of every image, where they are known.

        Raises:
            DataError: a file cannot be opened.
        """
        digests = digests or [self.digest(index) for index in range(len(self))]
        lines = [
            f"{digest} {self._answer(target)}" for digest, target in zip(digests, self.targets.tolist(), strict=True)
        ]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

    def _answer(self, target: int | list[bool]) -> str:
        """What one image is labelled as, whatever the order of the classes: a label, or all of them in their order."""
        if isinstance(target, int):
            return self.labels[target]
        return json.dumps(sorted(label for label, has in zip(self.labels, target, strict=True) if has))


def _picture(item: Any) -> Any:
    """The image of an item: read from its file, or what a dataset's item begins with."""
    if isinstance(item, Path):
        return read_image(item)
    if isinstance(item, EncodedImage):
        return read_image(io.BytesIO(item.content), item.name)
    return item[0]


def _digest(item: Any) -> str:
    """sha256 over a file's bytes, or over the image of a dataset's item."""
    if isinstance(item, Path):
        try:
            content = item.read_bytes()
        except OSError as error:
            raise DataError(f"Image {str(item)!r} cannot be read: {error.strerror}.") from error
    elif isinstance(item, EncodedImage):
        content = item.content
    elif isinstance(item[0], Tensor):
        content = item[0].detach().cpu().contiguous().numpy().tobytes()
    elif isinstance(item[0], Image.Image):
        content = f"{item[0].mode}{item[0].size}".encode() + item[0].tobytes()
    else:
        content = repr(type(item[0])).encode()
    return hashlib.sha256(content).hexdigest()


def label_counts(targets: Targets, num_classes: int) -> Int[Tensor, " C"]:
    """How many images have each label."""
    return targets.bincount(minlength=num_classes) if targets.ndim == 1 else targets.sum(0)


def check_learnable(images: LabelledImages) -> None:
    """Raises DataError where there are too few classes or images to learn and validate from."""
    repeated = sorted({label for label in images.labels if images.labels.count(label) > 1})
    if repeated:
        raise DataError(f"{images.where} has several classes named {repeated[0]!r}; each needs a name of its own.")
    single = images.objective == "single-label"
    if single and len(images.labels) < 2:
        raise DataError(
            f"{images.where} has one class ({images.labels[0]!r}); a classification task needs two or more."
        )
    short = [(label, count) for label, count in zip(images.labels, images.counts, strict=True) if count < 2]
    if short:
        label, count = short[0]
        more = f", and {len(short) - 1} more classes like it" if len(short) > 1 else ""
        raise DataError(
            f"Class {label!r} in {images.where} has {count} image{'' if count == 1 else 's'}{more}: each class needs "
            "two at least, one to learn from and one to validate on."
        )
    common = [label for label, count in zip(images.labels, images.counts, strict=True) if count > len(images) - 2]
    if not single and common:
        more = f", and so are {len(common) - 1} more labels" if len(common) > 1 else ""
        raise DataError(
            f"Label {common[0]!r} in {images.where} is on every image, or on all but one{more}: two at least must be "
            "without it, one to learn from and one to validate on."
        )


def check_same_labels(labels: Sequence[str], images: LabelledImages, objective: str) -> LabelledImages:
    """Returns the images with targets in the order of a task's labels.

    Args:
        labels: the task's.
        images: to learn from or to score. Of a multi-label task they may lack labels: no image has those.
        objective: the task's.

    Raises:
        DataError: the classes or the objective are not the same.
    """
    if images.objective != objective:
        raise DataError(f"{images.where} is {images.objective}; the task is {objective}.")
    missing, extra = sorted(set(labels) - set(images.labels)), sorted(set(images.labels) - set(labels))
    if extra or (missing and objective == "single-label"):
        parts = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"it has {', '.join(map(repr, extra))} besides"] if extra else []
        raise DataError(f"{images.where} does not have the task's classes: {' and '.join(parts)}.")
    order = torch.tensor([list(labels).index(label) for label in images.labels], dtype=torch.long)
    if objective == "single-label":
        targets = order[images.targets]
    else:
        targets = torch.zeros(len(images), len(labels), dtype=torch.bool)
        targets[:, order] = images.targets
    return LabelledImages(images.where, tuple(labels), targets, images.items)
