"""The one reader: images are read ahead of the model, on several threads and in order, and a bad one is told of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones.frozen import FrozenBackbone
from addenda.backbones.images import read_image
from addenda.exceptions import DataError, UnsteadyError

THREADS = 2
"""That read, decode and transform: Pillow frees Python's lock, and two keep up with a ViT-Ti on two cores."""

Row = TypeVar("Row")
Found = TypeVar("Found")
Name = TypeVar("Name", bound=str | Path)


def read_ahead(
    rows: Sequence[Row], read: Callable[[Row], Found], ahead: int, threads: int = THREADS
) -> Iterator[tuple[Row, Found | DataError]]:
    """Reads rows in their order while the caller is at work on those before.

    At most `ahead` rows are read and not yet asked for: all that is in memory beside the caller's own. A DataError of
    `read` is given in place of what was wanted, but an UnsteadyError is raised.
    """

    def attempt(row: Row) -> Found | DataError:
        try:
            return read(row)
        except UnsteadyError:
            raise
        except DataError as error:
            return error

    left, pool = iter(rows), ThreadPoolExecutor(threads)
    try:
        begun = deque((row, pool.submit(attempt, row)) for row in islice(left, max(ahead, threads)))
        while begun:
            row, future = begun.popleft()
            found = future.result()
            begun.extend((following, pool.submit(attempt, following)) for following in islice(left, 1))
            yield row, found
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Files(Generic[Name]):
    """Some image files that were read together."""

    asked: list[Name]  # all of them, in their order
    images: Float[Tensor, "B 3 H W"]  # what a model takes of each that could be read
    bad: dict[Name, str]  # what is wrong with each of the others

    @property
    def paths(self) -> list[Name]:
        """Those that could be read."""
        return [path for path in self.asked if path not in self.bad]


def read_files(
    backbone: FrozenBackbone, paths: Sequence[Name], size: int, skip_bad: bool = False
) -> Iterator[Files[Name]]:
    """Reads image files as a backbone takes them, in batches of a size: each is opened and decoded once.

    Raises:
        DataError: a file that is not a readable image, unless `skip_bad` leaves these out.
    """
    reading = read_ahead(paths, lambda path: backbone.transform(read_image(path)), size)
    nothing = torch.empty(0, *backbone.preprocessing["input_size"], dtype=torch.float32, device="cpu")
    while some := list(islice(reading, size)):
        bad = {path: found for path, found in some if isinstance(found, DataError)}
        if bad and not skip_bad:
            raise next(iter(bad.values()))
        images = [found for _, found in some if isinstance(found, Tensor)]
        yield Files(
            [path for path, _ in some],
            torch.stack(images) if images else nothing,
            {path: str(error) for path, error in bad.items()},
        )
