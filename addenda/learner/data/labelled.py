"""Labelled images, wherever they came from: what they are, and whether a task can be learned from them."""

from __future__ import annotations

import hashlib
import io
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from addenda.backbones import FrozenBackbone, LeftOut, in_words, joined, prepared, read_image
from addenda.exceptions import DataError

UNREADABLE = "0" * 64
"""In the place of the digest of an image that cannot be read."""

STEADY = (
    "Files must stay as they are until a run ends, and a Dataset must give the same image each time: random views are "
    "`augmentation`'s to make."
)


class UnsteadyError(DataError):
    """Data that is not what it was, or not what it says: all of it is in doubt, so that nothing is left out."""


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
        places: where each image stood before some were selected, for messages; None where all are there.
        digests: sha256 of each image's content, once `hashed`.
        folder: where the class folders are, of images that lie in such.
        left_out: what else is in that folder and was left out.
        deeper: folders inside class folders that hold images.
        lost: what is wrong with items that are not among these, since not even their targets could be had.
    """

    where: str
    labels: tuple[str, ...]
    targets: Targets
    items: Sequence[Path | EncodedImage] | ImageDataset
    places: tuple[int, ...] | None = None
    digests: tuple[str, ...] | None = None
    folder: Path | None = None
    left_out: LeftOut = field(default_factory=dict)
    deeper: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def objective(self) -> str:
        """`"single-label"`, or `"multi-label"` where an image may have any number of labels."""
        return "single-label" if self.targets.ndim == 1 else "multi-label"

    @property
    def can_vary(self) -> bool:
        """Whether random views can be made: of image files and PIL images, not of ready tensors."""
        for index in range(len(self)):
            try:
                item = self.items[index]
            except DataError:  # whether it may be left out is for the reading to say
                continue
            return isinstance(item, Path | EncodedImage) or isinstance(item[0], Image.Image)
        return False

    @property
    def counts(self) -> list[int]:
        """How many images have each label."""
        counts: list[int] = label_counts(self.targets, len(self.labels)).tolist()
        return counts

    @property
    def remarks(self) -> str:
        """What there is to say of the folder that they come from, in one line; empty where nothing is."""
        if self.folder is None:
            return ""
        said = [f"left out: {found}"] if (found := in_words(self.left_out, self.folder)) else []
        if self.deeper:
            listed = ", ".join(self.deeper[:3]) + (", …" if len(self.deeper) > 3 else "")
            said.append(f"images in folders inside class folders count as their class's ({listed})")
        return f"{self.where}: {'; '.join(said)}." if said else ""

    def leaving(self, left_out: LeftOut) -> LabelledImages:
        """The same images; so much was left out too."""
        return replace(self, left_out=joined([self.left_out, left_out]))

    def check_whole(self, skip_bad: bool) -> LabelledImages:
        """The same images; DataError where some cannot be had and are not to be left out."""
        if self.lost and not skip_bad:
            raise unreadable(self.lost, len(self) + len(self.lost), self.where)
        return self

    def hashed(self) -> LabelledImages:
        """The same images with the sha256 of each, in an order that labels and contents decide, and nothing else.

        So neither a file's name nor its place in a listing reaches a split, a shuffle, a sum or a digest.

        What cannot be read has the digest UNREADABLE: whether it is refused or left out is for the reading to say.
        """
        digests = [self._now(index) for index in range(len(self))]
        answers = [self.answer(target) for target in self.targets.tolist()]
        order = sorted(range(len(self)), key=lambda index: (answers[index], digests[index]))
        return replace(self.select(order), digests=tuple(digests[index] for index in order))

    def select(self, rows: Sequence[int]) -> LabelledImages:
        """Some of the images in the order of their rows, without a copy of their pixels."""
        items: Any = self.items
        return replace(
            self,
            targets=self.targets[torch.tensor(rows, dtype=torch.int64, device="cpu")],
            items=[items[row] for row in rows] if isinstance(items, list) else Subset(items, rows),
            places=tuple(rows if self.places is None else (self.places[row] for row in rows)),
            digests=None if self.digests is None else tuple(self.digests[row] for row in rows),
        )

    def _now(self, index: int) -> str:
        """The digest of an image as it is now; UNREADABLE where it cannot be read."""
        try:
            item = self.items[index]
            return _digest(item, self._called(index, item))
        except UnsteadyError:
            raise
        except DataError:
            return UNREADABLE

    def digest(self, index: int) -> str:
        """sha256 over an image's content, whatever its name.

        Raises:
            DataError: it cannot be read.
        """
        if self.digests is not None:
            return self.digests[index]
        item = self.items[index]
        return _digest(item, self._called(index, item))

    def called(self, index: int) -> str:
        """What an image is called in messages."""
        return self._called(index, self.items[index])

    def _called(self, index: int, item: Any) -> str:
        place = index if self.places is None else self.places[index]
        return str(item) if isinstance(item, Path) else f"Item {place} of {self.where}"

    def read(
        self, index: int, backbone: FrozenBackbone, transform: Callable[[Image.Image], Tensor] | None = None
    ) -> Float[Tensor, "3 H W"]:
        """One image as the backbone takes it.

        Args:
            index: which.
            backbone: says how it is transformed, and which shape a tensor must have.
            transform: instead of the backbone's own.

        Raises:
            DataError: the image cannot be read, has the wrong shape, or is no longer what was `hashed`.
        """
        expected = None if self.digests is None else self.digests[index]
        try:
            item = self.items[index]
            called = self._called(index, item)
            found = None if expected is None else _digest(item, called)
        except UnsteadyError:
            raise
        except DataError as error:
            if expected in (None, UNREADABLE):
                raise
            raise UnsteadyError(f"{error} It could be read when this run began. {STEADY}") from error
        if found != expected:
            raise UnsteadyError(f"{called} changed while it was being read. {STEADY}")
        image = _picture(item)
        if isinstance(image, Image.Image):
            return (backbone.transform if transform is None else transform)(prepared(image, called))
        shape = backbone.preprocessing["input_size"]
        if not isinstance(image, Tensor) or list(image.shape) != shape or not image.is_floating_point():
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise DataError(
                f"{called} is {found}; it must be a PIL image or a normalised floating-point tensor {shape}."
            )
        if transform is not None:
            raise DataError(f"{called} is a tensor; random views are made of PIL images only.")
        if not image.isfinite().all():
            raise DataError(f"{called} holds NaN or infinity.")
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

    def fingerprint(self) -> str:
        """sha256 over the contents and labels of all images, whatever their order and names.

        Raises:
            DataError: an image cannot be read.
        """
        lines = [f"{self.digest(index)} {self.answer(target)}" for index, target in enumerate(self.targets.tolist())]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

    def answer(self, target: int | list[bool]) -> str:
        """What one image is labelled as, whatever the order of the classes: a label, or all of them in their order."""
        if isinstance(target, int):
            return self.labels[target]
        return json.dumps(sorted(label for label, has in zip(self.labels, target, strict=True) if has))


def unreadable(texts: Sequence[str], num_images: int, where: str) -> DataError:
    """The error that names images that cannot be read, ten of them at most.

    Args:
        texts: what is wrong with each.
        num_images: how many images there are in all.
        where: in what.
    """
    named = "\n  ".join(texts[:10]) + (f"\n  … and {len(texts) - 10} more" if len(texts) > 10 else "")
    return DataError(
        f"{len(texts)} of {num_images} images in {where} cannot be read:\n  {named}\n"
        "Mend them, or leave them out with --skip-bad (in Python: skip_bad=True)."
    )


def _picture(item: Any) -> Any:
    """The image of an item: read from its file, or what a dataset's item begins with."""
    if isinstance(item, Path):
        return read_image(item)
    if isinstance(item, EncodedImage):
        return read_image(io.BytesIO(item.content), item.name)
    return item[0]


def _digest(item: Any, called: str) -> str:
    """sha256 over a file's bytes, or over the image of a dataset's item; DataError where it cannot be read."""
    if isinstance(item, Path):
        try:
            content = item.read_bytes()
        except OSError as error:
            raise DataError(f"Image {str(item)!r} cannot be read: {error.strerror}.") from error
    elif isinstance(item, EncodedImage):
        content = item.content
    elif isinstance(item[0], Tensor):
        pixels = item[0].detach().cpu().contiguous()
        content = pixels.reshape(-1).view(torch.uint8).numpy().tobytes()
        if pixels.dtype != torch.float32:  # equal bytes of another dtype are other values
            content = str(pixels.dtype).encode() + content
    elif isinstance(item[0], Image.Image):
        seen = prepared(item[0], called)
        content = f"{seen.mode}{seen.size}".encode() + seen.tobytes()
    else:
        content = repr(type(item[0])).encode()
    return hashlib.sha256(content).hexdigest()


def class_name(text: str, called: str = "A class") -> str:
    """A class's name in Unicode's composed form: macOS writes an accented letter as two characters, Linux as one.

    Args:
        text: the name as it was found.
        called: what has it, for the message.

    Raises:
        DataError: it is not UTF-8, as in archives made by Windows.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{called} has a name that is not UTF-8, {text!r}: rename it.") from error
    return unicodedata.normalize("NFC", text)


def label_counts(targets: Targets, num_classes: int) -> Int[Tensor, " C"]:
    """How many images have each label."""
    return targets.bincount(minlength=num_classes) if targets.ndim == 1 else targets.sum(0)
