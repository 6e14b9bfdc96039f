"""Labelled images, wherever they came from: what they are, and whether a task can be learned from them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from addenda.backbones import THREADS, FrozenBackbone, LeftOut, in_words, read_ahead
from addenda.exceptions import DataError, UnsteadyError
from addenda.learner.data.items import EncodedImage, Item, load
from addenda.learner.objectives import Objective, Targets, objective_of

UNREADABLE = "0" * 64
"""In the place of the digest of an image that cannot be read."""

AHEAD = 16
"""Images whose digests may wait to be asked for."""

STEADY = (
    "Files must stay as they are until a run ends, and a Dataset must give the same image each time: random views are "
    "`augmentation`'s to make."
)


@runtime_checkable
class ImageDataset(Protocol):
    """A torch Dataset of (image, target): PIL images or normalised tensors. `classes` names the classes.

    A target is a class, from 0, or a vector of 0 and 1, one for each of two labels or more.
    """

    def __len__(self) -> int:
        """How many items there are."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One image and its target."""


@runtime_checkable
class EncodedImages(Protocol):
    """Image files that lie in another place than a folder."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Path | EncodedImage:
        """One of them, not decoded."""


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
    items: list[Path] | EncodedImages | ImageDataset
    places: tuple[int, ...] | None = None
    digests: tuple[str, ...] | None = None
    folder: Path | None = None
    left_out: LeftOut = field(default_factory=dict)
    deeper: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

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

        So neither a file's name nor its place in a listing reaches a split, a shuffle, a sum or a digest.

        What cannot be read has the digest UNREADABLE: whether it is refused or left out is for the reading to say.
        """
        found = read_ahead(range(len(self)), lambda index: self._load(index).digest, AHEAD, self.threads)
        return self.in_order([UNREADABLE if isinstance(one, DataError) else one for _, one in found])[0]

    def in_order(self, digests: Sequence[str]) -> tuple[LabelledImages, list[int]]:
        """The same images with the digests given, one for each, in the order of `hashed`; and their rows before."""
        answers = [self.answer(target) for target in self.targets.tolist()]
        order = sorted(range(len(self)), key=lambda index: (answers[index], digests[index]))
        return replace(self.select(order), digests=tuple(digests[index] for index in order)), order

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

    def digest(self, index: int) -> str:
        """sha256 over an image's content, whatever its name; DataError where it cannot be read."""
        return self._load(index).digest if self.digests is None else self.digests[index]

    def item(self, index: int) -> Item:
        """One image, read once: its digest and all its views come from the same bytes.

        Raises:
            DataError: it cannot be read.
            UnsteadyError: it is no longer what was `hashed`.
        """
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
        item, place = self.items[index], index if self.places is None else self.places[index]
        return load(item, f"Item {place} of {self.where}")

    def read(
        self, index: int, backbone: FrozenBackbone, transform: Callable[[Image.Image], Tensor] | None = None
    ) -> Float[Tensor, "3 H W"]:
        """One image as the backbone takes it; see `item` and `Item.views`."""
        return self.item(index).views(backbone, [transform])[0]

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
        return self.objective.answer(target, self.labels)


def unreadable(texts: Sequence[str], num_images: int, where: str) -> DataError:
    """The error that says what is wrong with some images of all that are in a place, of ten of them at most."""
    named = "\n  ".join(texts[:10]) + (f"\n  … and {len(texts) - 10} more" if len(texts) > 10 else "")
    return DataError(
        f"{len(texts)} of {num_images} images in {where} cannot be read:\n  {named}\n"
        "Mend them, or leave them out with --skip-bad (in Python: skip_bad=True)."
    )


def class_name(text: str, called: str = "A class") -> str:
    """A class's name in Unicode's composed form: macOS writes an accented letter as two characters, Linux as one.

    Raises:
        DataError: it is not UTF-8, as in archives made by Windows; the message says what is `called` so.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{called} has a name that is not UTF-8, {text!r}: rename it.") from error
    return unicodedata.normalize("NFC", text)
