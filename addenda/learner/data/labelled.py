"""Labelled images, wherever they came from, and how they are read: each decoded once, every bad one named.

In a run each file of the training images is read twice, and decoded once. The first time all are hashed, since their
contents decide their order, and whether there is anything to do at all; activations that are kept need no more. The
second time what is hashed again is decoded, and all views are made of that. Of a test set the first time decodes too,
before training rather than after it, and `evaluate` needs no second.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
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

UNREADABLE = "0" * 64  # in the place of the digest of an image that cannot be read
AHEAD = 16  # images whose digests may wait to be asked for
STEADY = (
    "Files must stay as they are until a run ends, and a Dataset must give the same image each time: random views are "
    "`augmentation`'s to make."
)

View = TypeVar("View")


@dataclass(frozen=True)
class EncodedImage:
    """An image file's bytes that lie in no file of their own, and what it is called in messages."""

    name: str
    content: bytes


@runtime_checkable
class ImageDataset(Protocol):
    """A torch Dataset of (image, target): PIL images or normalised tensors. `classes` names the classes.

    A target is a class, from 0, or a vector of 0 and 1, one for each of two labels or more.
    """

    def __len__(self) -> int:
        """How many items there are."""

    def __getitem__(self, index: int) -> Any:
        """One image and its target."""


@dataclass(frozen=True)
class Item:
    """One image as it was had, once."""

    called: str  # in messages
    held: Any  # a file's content, a PIL image that is `prepared`, or whatever else a dataset gave
    named: str = ""  # what its file is called where it is no image

    @cached_property
    def digest(self) -> str:
        """sha256 over a file's bytes, or over a dataset's image."""
        content = self.held
        if isinstance(content, Tensor):
            pixels = content.detach().cpu().contiguous()
            content = pixels.reshape(-1).view(torch.uint8).numpy().tobytes()
            if pixels.dtype != torch.float32:  # equal bytes of another dtype are other values
                content = str(pixels.dtype).encode() + content
        elif isinstance(content, Image.Image):
            content = f"{content.mode}{content.size}".encode() + content.tobytes()
        elif not isinstance(content, bytes):
            content = repr(type(content)).encode()
        return hashlib.sha256(content).hexdigest()

    def picture(self) -> Any:
        """A PIL image in most cases, or what a dataset gives; DataError where a file is no readable image."""
        return read_image(io.BytesIO(self.held), self.named) if isinstance(self.held, bytes) else self.held

    def views(
        self, backbone: FrozenBackbone, transforms: Sequence[Callable[[Image.Image], Tensor] | None] = (None,)
    ) -> list[Float[Tensor, "3 H W"]]:
        """The image as the backbone takes it, decoded once, for each transform; None is the backbone's own."""
        image = self.picture()
        if isinstance(image, Image.Image):
            return [(backbone.transform if transform is None else transform)(image) for transform in transforms]
        shape = backbone.preprocessing["input_size"]
        if not isinstance(image, Tensor) or list(image.shape) != shape or not image.is_floating_point():
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise DataError(
                f"{self.called} is {found}; it must be a PIL image or a normalised floating-point tensor {shape}."
            )
        if any(transform is not None for transform in transforms):
            raise DataError(f"{self.called} is a tensor; random views are made of PIL images only.")
        if not image.isfinite().all():
            raise DataError(f"{self.called} holds NaN or infinity.")
        return [image for _ in transforms]


@dataclass(frozen=True)
class LabelledImages:
    """Images and targets, read one at a time."""

    where: str  # what they are called in messages
    labels: tuple[str, ...]  # names of the C classes
    targets: Targets
    items: list[Path] | ImageDataset  # or image files in another place than a folder: of an EncodedImage each
    places: tuple[int, ...] | None = None  # where each stood before some were selected; None where all are there
    digests: tuple[str, ...] | None = None  # sha256 of each image's content, once `hashed`
    folder: Path | None = None  # where the class folders are, of images that lie in such
    left_out: LeftOut = field(default_factory=dict)  # what else is in that folder
    deeper: tuple[str, ...] = ()  # folders inside class folders that hold images
    groups: tuple[str, ...] | None = None  # of each image; "" is a group of its own
    lost: tuple[str, ...] = ()  # what is wrong with items of which not even the targets could be had

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def objective(self) -> Objective:
        """How their targets are learned: asked for once, though every image's answer needs it."""
        return objective_of(self.targets)

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
        counts: list[int] = self.objective.counts(self.targets, len(self.labels)).tolist()
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

    def grouped_by(self, pattern: str) -> LabelledImages:
        """The same images in groups: what a regular expression finds in each file's path, or its first group if any.

        The path is that within the folder of the images or of the listing, with slashes; of other files it is whole.

        Raises:
            DataError: these are no files, they have groups already, or in some the expression finds nothing.
        """
        if self.groups is not None:
            raise DataError(f"{self.where} has a column 'group' already; leave out group_by, or the column.")
        if not isinstance(self.items, list):
            raise DataError(f"group_by reads the names of image files; {self.where} has images without.")
        found, missed = [], []
        for item in self.items:
            name = Path(item if self.folder is None else os.path.relpath(item, self.folder)).as_posix()
            match = re.search(pattern, name)
            if match is None:
                missed.append(f"{name!r}")
            else:
                found.append(match[1] or "" if match.re.groups else match[0])
        if missed:
            raise DataError(
                f"group_by, {pattern!r}, finds nothing in the names of {len(missed)} of {len(self)} images in "
                f"{self.where}:{ten_of(missed)}\nA group may be empty: such an image stands for itself."
            )
        return replace(self, groups=tuple(found))

    def check_whole(self, skip_bad: bool) -> LabelledImages:
        """The same images; DataError where some cannot be had and are not to be left out."""
        if self.lost and not skip_bad:
            raise unreadable(self.lost, len(self) + len(self.lost), self.where)
        return self

    @property
    def threads(self) -> int:
        """That may read at once: a dataset's own code is asked for one item at a time."""
        return THREADS if isinstance(self.items, list) else 1

    def hashed(self) -> LabelledImages:
        """The same images with the sha256 of each, in an order that labels and contents decide, and nothing else.

        So neither a file's name nor its place in a listing reaches a split, a shuffle, a sum or a digest. What cannot
        be read has the digest UNREADABLE: whether it is refused or left out is for the reading to say.
        """
        found = read_ahead(range(len(self)), lambda index: self._load(index).digest, AHEAD, self.threads)
        return self.in_order({row: UNREADABLE if isinstance(one, DataError) else one for row, one in found})[0]

    def in_order(self, digests: Mapping[int, str]) -> tuple[LabelledImages, list[int]]:
        """Those images whose digests are given, by their rows, with them in the order of `hashed`; and these rows."""
        targets = self.targets.tolist()
        groups = self.groups or [""] * len(self)
        order = sorted(digests, key=lambda row: (self.answer(targets[row]), digests[row], groups[row], row))
        return replace(self.select(order), digests=tuple(digests[row] for row in order)), order

    def select(self, rows: Sequence[int]) -> LabelledImages:
        """Some of the images in the order of their rows, without a copy of their pixels."""
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
        """sha256 over an image's content, whatever its name; DataError where it cannot be read."""
        return self._load(index).digest if self.digests is None else self.digests[index]

    def item(self, index: int) -> Item:
        """One image, read once, so that its digest and all its views come from the same bytes; as it was `hashed`."""
        expected = None if self.digests is None else self.digests[index]
        try:
            found = self._load(index)
        except UnsteadyError:
            raise
        except DataError as error:
            if expected in (None, UNREADABLE):
                raise
            raise UnsteadyError(f"{error} It could be read when this run began. {STEADY}") from error
        if expected is not None and found.digest != expected:
            raise UnsteadyError(f"{found.called} changed while it was being read. {STEADY}")
        return found

    def _load(self, index: int) -> Item:
        """Reads an item, and decodes nothing."""
        item, place = self.items[index], index if self.places is None else self.places[index]
        called = f"Item {place} of {self.where}"
        if isinstance(item, Path):
            try:
                return Item(str(item), item.read_bytes(), f"Image {str(item)!r}")
            except OSError as error:
                raise DataError(f"Image {str(item)!r} cannot be read: {error.strerror}.") from error
        if isinstance(item, EncodedImage):
            return Item(called, item.content, item.name)
        return Item(called, prepared(item[0], called) if isinstance(item[0], Image.Image) else item[0])

    def read(
        self, index: int, backbone: FrozenBackbone, transform: Callable[[Image.Image], Tensor] | None = None
    ) -> Float[Tensor, "3 H W"]:
        """One image as the backbone takes it; see `item` and `Item.views`."""
        return self.item(index).views(backbone, [transform])[0]

    def read_all(self, backbone: FrozenBackbone) -> Float[Tensor, "N 3 H W"]:
        """Every image: for sets that fit into memory."""
        return torch.stack([self.read(index, backbone) for index in range(len(self))])

    def fingerprint(self) -> str:
        """sha256 over the contents, labels and groups of all images, whatever their order and names."""
        lines = [f"{self.digest(index)} {self.answer(target)}" for index, target in enumerate(self.targets.tolist())]
        if self.groups is not None:
            lines = [f"{line} {json.dumps(group)}" for line, group in zip(lines, self.groups, strict=True)]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

    def answer(self, target: int | list[bool]) -> str:
        """What one image is labelled as, whatever the order of the classes: a label, or all of them in their order."""
        return self.objective.answer(target, self.labels)


def encoded(numbers: Sequence[Sequence[int]], num_labels: int, multi: bool) -> Targets:
    """Targets of images whose labels have these numbers: several each, or one."""
    if not multi:
        return torch.tensor([number for (number,) in numbers], dtype=torch.int64, device="cpu")
    targets = torch.zeros(len(numbers), num_labels, dtype=torch.bool, device="cpu")
    for row, several in enumerate(numbers):
        targets[row, list(several)] = True
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
    """Reads some rows, and gives what `views` made of each, on the threads that read, in batches of `size` or less.

    What is wrong with which row is noted in `bad`; unless such images are left out, one error names them all.
    """

    def made(row: int) -> Sequence[View]:
        return views(row, images.item(row))

    batch: list[View] = []
    first: DataError | None = None
    for done, (row, found) in enumerate(read_ahead(rows, made, size, images.threads), 1):
        if isinstance(found, DataError):
            bad[row], first = str(found), first or found
        elif not bad or context.skip_bad:  # once a run is lost, the rest is only read, to name every bad image
            batch += found
        while len(batch) >= size:
            yield batch[:size]
            del batch[:size]
        context.report(what, done, len(rows))
    if bad and (not context.skip_bad or len(bad) == len(images)):
        raise unreadable(list(dict.fromkeys(bad.values())), len(images), images.where) from first
    if batch:
        yield batch


def ten_of(texts: Sequence[str]) -> str:
    """Lines of a message, of which it shows ten."""
    return "".join(f"\n  {text}" for text in texts[:10]) + (f"\n  … and {len(texts) - 10} more" if texts[10:] else "")


def unreadable(texts: Sequence[str], num_images: int, where: str) -> DataError:
    """The error that says what is wrong with some images of all that are in a place."""
    return DataError(
        f"{len(texts)} of {num_images} images in {where} cannot be read:{ten_of(texts)}\n"
        "Mend them, or leave them out with --skip-bad (in Python: skip_bad=True)."
    )
