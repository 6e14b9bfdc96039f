"""Reading labelled images in batches ahead of the model, with every bad one named.

In a run each file of the training images is read twice, and decoded once. The first time all are hashed, since their
contents decide their order, and whether there is anything to do at all; activations that are kept need no more. The
second time what is hashed again is decoded, and all views are made of that. Of a test set the first time decodes too,
before training rather than after it, and `evaluate` needs no second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from addenda.backbones import FrozenBackbone, read_ahead
from addenda.exceptions import DataError
from addenda.learner.context import RunContext
from addenda.learner.data.labelled import Item, LabelledImages, unreadable

View = TypeVar("View")


def read_in_batches(
    images: LabelledImages,
    rows: Sequence[int],
    views: Callable[[int, Item], Sequence[View]],
    size: int,
    what: str,
    context: RunContext,
    bad: dict[int, str],
) -> Iterator[list[View]]:
    """Reads some images, and gives what was made of them in batches; the last may be smaller.

    Args:
        images: of which.
        rows: which.
        views: what is wanted of an image, by its row; made on the threads that read.
        size: views in a batch, and the most images whose views wait in memory.
        what: what is being done, for the report.
        context: whether images that cannot be read are left out.
        bad: what is wrong with each of these is noted here, by its row.

    Raises:
        DataError: images that cannot be read, all named together, unless they are to be left out.
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


def checked(
    images: LabelledImages, backbone: FrozenBackbone, context: RunContext
) -> tuple[LabelledImages, dict[int, str]]:
    """The images that can be read, hashed and in order, and what is wrong with the others; nothing is kept of pixels.

    Raises:
        DataError: images that cannot be read, all named together, unless they are to be left out.
    """
    bad: dict[int, str] = {}

    def look(row: int, item: Item) -> list[tuple[int, str]]:
        item.views(backbone)
        return [(row, item.digest)]

    reading = read_in_batches(images, range(len(images)), look, 1, "checking test images", context, bad)
    found = [one for batch in reading for one in batch]
    return images.select([row for row, _ in found]).in_order([digest for _, digest in found])[0], bad
