"""Reads images ahead of the model, on several threads and in order, and reports unreadable ones."""

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
"""Threads that read, decode and transform; Pillow releases the GIL, and two keep up with a ViT-Ti on two cores."""

Row = TypeVar("Row")
Value = TypeVar("Value")
Name = TypeVar("Name", bound=str | Path)


def read_ahead(
    rows: Sequence[Row], read: Callable[[Row], Value], ahead: int, threads: int = THREADS
) -> Iterator[tuple[Row, Value | DataError]]:
    """Reads rows in order in the background while the caller processes earlier ones.

    At most `ahead` rows are read before they are requested, which bounds the memory. A DataError of `read` is yielded
    in place of the value; an UnsteadyError is raised.
    """

    def attempt(row: Row) -> Value | DataError:
        try:
            return read(row)
        except UnsteadyError:
            raise
        except DataError as error:
            return error

    remaining, pool = iter(rows), ThreadPoolExecutor(threads)
    try:
        pending = deque((row, pool.submit(attempt, row)) for row in islice(remaining, max(ahead, threads)))
        while pending:
            row, future = pending.popleft()
            value = future.result()
            pending.extend((following, pool.submit(attempt, following)) for following in islice(remaining, 1))
            yield row, value
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Files(Generic[Name]):
    """A batch of image files."""

    asked: list[Name]  # all files of the batch, in order
    images: Float[Tensor, "B 3 H W"]  # model inputs of the readable files
    bad: dict[Name, str]  # error messages of the unreadable files

    @property
    def paths(self) -> list[Name]:
        """The readable files."""
        return [path for path in self.asked if path not in self.bad]


def read_files(
    backbone: FrozenBackbone, paths: Sequence[Name], size: int, skip_bad: bool = False
) -> Iterator[Files[Name]]:
    """Reads image files in batches of `size`, transformed for a backbone.

    Raises:
        DataError: a file is not a readable image, and `skip_bad` is False.
    """
    reading = read_ahead(paths, lambda path: backbone.transform(read_image(path)), size)
    empty = torch.empty(0, *backbone.preprocessing["input_size"], dtype=torch.float32, device="cpu")
    while batch := list(islice(reading, size)):
        bad = {path: error for path, error in batch if isinstance(error, DataError)}
        if bad and not skip_bad:
            raise next(iter(bad.values()))
        images = [image for _, image in batch if isinstance(image, Tensor)]
        yield Files(
            [path for path, _ in batch],
            torch.stack(images) if images else empty,
            {path: str(error) for path, error in bad.items()},
        )
