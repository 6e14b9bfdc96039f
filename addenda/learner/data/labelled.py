"""Labelled images from any source, and how they are read: each is decoded once, and errors name every bad image.

A training run reads each file twice and decodes it once. The first read hashes all files, since their contents decide
their order and whether there is anything to do; cached activations need no second read. The second read hashes the file
again and decodes it, for all its views. Test images are decoded in the first read, so that bad ones are found before
training; `evaluate` needs no second read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from addenda.backbones import THREADS, FrozenBackbone, LeftOut, in_words, prepared, read_ahead, read_image
from addenda.exceptions import DataError, UnsteadyError
from addenda.learner.context import RunContext
from addenda.learner.objectives import Objective, Targets, objective_of

UNREADABLE = "0" * 64  # digest of an image that cannot be read
AHEAD = 16  # images to hash in advance
STEADY = (
    "Files must not change during a run, and a Dataset must return the same image each time; random views are set by "
    "`augmentation`."
)

View = TypeVar("View")


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an encoded image that is not a file of its own."""

    name: str  # in messages
    content: bytes


@runtime_checkable
class ImageDataset(Protocol):
    """A torch Dataset of (image, target) with PIL images or normalised tensors; `classes` names the classes.

    A target is a class index, from 0, or a vector with 0 or 1 for each of at least two labels.
    """

    def __len__(self) -> int:
        """The number of items."""

    def __getitem__(self, index: int) -> Any:
        """An image and its target."""


@dataclass(frozen=True)
class Item:
    """One loaded image, not decoded if it is a file."""

    called: str  # in messages
    held: Any  # the content of a file, a `prepared` PIL image, or whatever else a dataset returned
    file_name: str = ""  # in messages about a file that is not an image

    @cached_property
    def digest(self) -> str:
        """sha256 of the bytes of a file, or of the image of a dataset."""
        content = self.held
        if isinstance(content, Tensor):
            pixels = content.detach().cpu().contiguous()
            content = pixels.reshape(-1).view(torch.uint8).numpy().tobytes()
            if pixels.dtype != torch.float32:  # equal bytes of different dtypes are different values
                content = str(pixels.dtype).encode() + content
        elif isinstance(content, Image.Image):
            content = f"{content.mode}{content.size}".encode() + content.tobytes()
        elif not isinstance(content, bytes):
            content = repr(type(content)).encode()
        return hashlib.sha256(content).hexdigest()

    def picture(self) -> Any:
        """The PIL image, or what a dataset returned; DataError if a file is not a readable image."""
        return read_image(io.BytesIO(self.held), self.file_name) if isinstance(self.held, bytes) else self.held

    def views(
        self, backbone: FrozenBackbone, transforms: Sequence[Callable[[Image.Image], Tensor] | None] = (None,)
    ) -> list[Float[Tensor, "3 H W"]]:
        """The image under each transform, decoded once; None stands for the backbone's own transform."""
        image = self.picture()
        if isinstance(image, Image.Image):
            return [(backbone.transform if transform is None else transform)(image) for transform in transforms]
        shape = backbone.preprocessing["input_size"]
        if not isinstance(image, Tensor) or list(image.shape) != shape or not image.is_floating_point():
            kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise DataError(
                f"{self.called} is {kind}; it must be a PIL image or a normalised floating-point tensor {shape}."
            )
        if any(transform is not None for transform in transforms):
            raise DataError(f"{self.called} is a tensor; random views require PIL images.")
        if not image.isfinite().all():
            raise DataError(f"{self.called} holds NaN or infinity.")
        return [image for _ in transforms]


@dataclass(frozen=True)
class LabelledImages:
    """Images and targets; the images are read one at a time."""

    where: str  # name of the dataset in messages
    labels: tuple[str, ...]  # names of the C classes
    targets: Targets
    items: list[Path] | ImageDataset  # or a sequence of EncodedImage
    places: tuple[int, ...] | None = None  # original index of each image after `select`; None before
    digests: tuple[str, ...] | None = None  # sha256 of each image, once `hashed`
    folder: Path | None = None  # the folder of the class folders or of the listing
    left_out: LeftOut = field(default_factory=dict)  # other files and folders in that folder
    deeper: tuple[str, ...] = ()  # subfolders of class folders that hold images
    groups: tuple[str, ...] | None = None  # group of each image; with "" it is a group of its own
    lost: tuple[str, ...] = ()  # errors of items whose targets could not be read

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def objective(self) -> Objective:
        """The objective of the targets."""
        return objective_of(self.targets)

    @property
    def can_vary(self) -> bool:
        """Whether random views are possible: for image files and PIL images, but not for tensors."""
        for index in range(len(self)):
            try:
                item = self.items[index]
            except DataError:  # reading decides later whether it may be skipped
                continue
            return isinstance(item, Path | EncodedImage) or isinstance(item[0], Image.Image)
        return False

    @property
    def counts(self) -> list[int]:
        """The number of images with each label."""
        counts: list[int] = self.objective.counts(self.targets, len(self.labels)).tolist()
        return counts

    @property
    def remarks(self) -> str:
        """Remarks on the folder of the images in one line: what was left out, and subfolders. May be empty."""
        if self.folder is None:
            return ""
        remarks = [f"left out: {others}"] if (others := in_words(self.left_out, self.folder)) else []
        if self.deeper:
            listed = ", ".join(self.deeper[:3]) + (", …" if len(self.deeper) > 3 else "")
            remarks.append(f"images in subfolders of class folders belong to that class ({listed})")
        return f"{self.where}: {'; '.join(remarks)}." if remarks else ""

    def grouped_by(self, pattern: str) -> LabelledImages:
        """Groups the images by the match of a regular expression in each file's path, or by its first capture group.

        The path is relative to the folder of the images or of the listing, with slashes; for other files it is the full
        path.

        Raises:
            DataError: the images are not files, already have groups, or have paths without a match.
        """
        if self.groups is not None:
            raise DataError(f"{self.where} already has a column 'group'; remove the column, or do not set group_by.")
        if not isinstance(self.items, list):
            raise DataError(f"group_by matches the paths of image files, but the images of {self.where} are not files.")
        groups, unmatched, pattern = [], [], unicodedata.normalize("NFC", pattern)
        for item in self.items:
            name = Path(item if self.folder is None else os.path.relpath(item, self.folder)).as_posix()
            match = re.search(pattern, unicodedata.normalize("NFC", name))
            if match is None:
                unmatched.append(f"{name!r}")
            else:
                groups.append(match[1] or "" if match.re.groups else match[0])
        if unmatched:
            raise DataError(
                f"group_by {pattern!r} does not match the paths of {len(unmatched)} of {len(self)} images in "
                f"{self.where}:{ten_of(unmatched)}\nA match may be empty: the image is then a group of its own."
            )
        return replace(self, groups=tuple(groups))

    def check_whole(self, skip_bad: bool) -> LabelledImages:
        """Returns the images; DataError if some cannot be loaded and `skip_bad` is not set."""
        if self.lost and not skip_bad:
            raise unreadable(self.lost, len(self) + len(self.lost), self.where)
        return self

    @property
    def threads(self) -> int:
        """Number of reading threads: one for the code of a Dataset, which may not be thread-safe."""
        return THREADS if isinstance(self.items, list) else 1

    def hashed(self) -> LabelledImages:
        """The images with their sha256, in an order that depends on labels and contents only.

        So neither a file's name nor its position in a listing affects a split, a shuffle, a sum or a digest. An image
        that cannot be read has the digest UNREADABLE; reading decides later whether it is an error or is skipped.
        """
        digests = read_ahead(range(len(self)), lambda index: self._load(index).digest, AHEAD, self.threads)
        return self.in_order({row: UNREADABLE if isinstance(d, DataError) else d for row, d in digests})[0]

    def in_order(self, digests: Mapping[int, str]) -> tuple[LabelledImages, list[int]]:
        """The images whose digests are given by row, in the order of `hashed`; and their rows in that order."""
        targets = self.targets.tolist()
        groups = self.groups or [""] * len(self)
        order = sorted(digests, key=lambda row: (self.label_text(targets[row]), digests[row], groups[row], row))
        return replace(self.select(order), digests=tuple(digests[row] for row in order)), order

    def select(self, rows: Sequence[int]) -> LabelledImages:
        """The images of the given rows, in that order, without copying pixels."""
        items: Any = self.items
        return replace(
            self,
            targets=self.targets[torch.tensor(rows, dtype=torch.int64, device="cpu")],
            items=[items[row] for row in rows] if isinstance(items, list) else Subset(items, rows),
            places=tuple(rows if self.places is None else (self.places[row] for row in rows)),
            digests=None if self.digests is None else tuple(self.digests[row] for row in rows),
            groups=None if self.groups is None else tuple(self.groups[row] for row in rows),
        )

    def digest(self, index: int) -> str:
        """sha256 of the content of an image, not of its name; DataError if it cannot be read."""
        return self._load(index).digest if self.digests is None else self.digests[index]

    def item(self, index: int) -> Item:
        """Loads one image; UnsteadyError if it changed since it was `hashed`."""
        expected = None if self.digests is None else self.digests[index]
        try:
            item = self._load(index)
        except UnsteadyError:
            raise
        except DataError as error:
            if expected in (None, UNREADABLE):
                raise
            raise UnsteadyError(f"{error} It was readable when this run began. {STEADY}") from error
        if expected is not None and item.digest != expected:
            raise UnsteadyError(f"{item.called} changed during the run. {STEADY}")
        return item

    def _load(self, index: int) -> Item:
        """Reads an item without decoding it."""
        item, position = self.items[index], index if self.places is None else self.places[index]
        called = f"Item {position} of {self.where}"
        if isinstance(item, Path):
            try:
                return Item(str(item), item.read_bytes(), f"Image {str(item)!r}")
            except OSError as error:
                raise DataError(f"Image {str(item)!r} cannot be read: {error.strerror}.") from error
        if isinstance(item, EncodedImage):
            return Item(called, item.content, item.name)
        return Item(called, prepared(item[0], called) if isinstance(item[0], Image.Image) else item[0])

    def read(self, index: int, backbone: FrozenBackbone) -> Float[Tensor, "3 H W"]:
        """One image as input of the backbone; see `item` and `Item.views`."""
        return self.item(index).views(backbone)[0]

    def read_all(self, backbone: FrozenBackbone) -> Float[Tensor, "N 3 H W"]:
        """All images as one tensor, for datasets that fit into memory."""
        return torch.stack([self.read(index, backbone) for index in range(len(self))])

    def fingerprint(self) -> str:
        """sha256 over the contents, labels and groups of all images, independent of their order and names."""
        lines = [
            f"{self.digest(index)} {self.label_text(target)}" for index, target in enumerate(self.targets.tolist())
        ]
        if self.groups is not None:
            lines = [f"{line} {json.dumps(group)}" for line, group in zip(lines, self.groups, strict=True)]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

    def label_text(self, target: int | list[bool]) -> str:
        """The label of a target, or all its labels, as text that does not depend on the order of the classes."""
        return self.objective.label_text(target, self.labels)


def encoded(numbers: Sequence[Sequence[int]], num_labels: int, multi: bool) -> Targets:
    """Targets from the label indices of each image: Bool[N, C] if `multi`, else Int[N] from one index each."""
    if not multi:
        return torch.tensor([number for (number,) in numbers], dtype=torch.int64, device="cpu")
    targets = torch.zeros(len(numbers), num_labels, dtype=torch.bool, device="cpu")
    for row, labels in enumerate(numbers):
        targets[row, list(labels)] = True
    return targets


def read_in_batches(
    images: LabelledImages,
    rows: Sequence[int],
    views: Callable[[int, Item], Sequence[View]],
    size: int,
    what: str,
    context: RunContext,
    bad: dict[int, str],
) -> Iterator[list[View]]:
    """Reads rows, applies `views` to each on the reading threads, and yields the results in batches of up to `size`.

    Errors are collected in `bad` by row. Unless bad images are skipped, one DataError lists them all at the end.
    """

    def load(row: int) -> Sequence[View]:
        return views(row, images.item(row))

    batch: list[View] = []
    first: DataError | None = None
    for done, (row, result) in enumerate(read_ahead(rows, load, size, images.threads), 1):
        if isinstance(result, DataError):
            bad[row], first = str(result), first or result
        elif not bad or context.skip_bad:  # once a run has failed, reading goes on only to list every bad image
            batch += result
        while len(batch) >= size:
            yield batch[:size]
            del batch[:size]
        context.report(what, done, len(rows))
    if bad and (not context.skip_bad or len(bad) == len(images)):
        raise unreadable(list(dict.fromkeys(bad.values())), len(images), images.where) from first
    if batch:
        yield batch


def class_name(text: str, owner: str = "A class") -> str:
    """A class name without outer spaces, in Unicode's composed form (macOS decomposes names).

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{owner} has a name that is not UTF-8, {text!r}; rename it.") from error
    return unicodedata.normalize("NFC", text.strip())


def alike(labels: Sequence[str]) -> tuple[str, str] | None:
    """The first two labels that differ only in case, or are one number; None if there are none."""
    known: dict[str | float, str] = {}
    for label in labels:
        try:
            key: str | float = float(label)
        except ValueError:
            key = label.casefold()
        if (first := known.setdefault(key, label)) != label:
            return first, label
    return None


def ten_of(texts: Sequence[str]) -> str:
    """Indented lines for a message, the first ten."""
    return "".join(f"\n  {text}" for text in texts[:10]) + (f"\n  … and {len(texts) - 10} more" if texts[10:] else "")


def unreadable(texts: Sequence[str], num_images: int, where: str) -> DataError:
    """The error that lists images that cannot be read."""
    return DataError(
        f"{len(texts)} of {num_images} images in {where} cannot be read:{ten_of(texts)}\n"
        "Fix or remove them, or pass --skip-bad (in Python: skip_bad=True)."
    )
