"""Memory that a server's processes share: counts with a limit for all of them, and the pixels of images."""

from __future__ import annotations

import mmap
import os
import tempfile
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

Cells = memoryview | list[int]
"""A count of each process."""
COUNTS = ("images", "body_bytes", "connections", "key_file_existed")
"""What is counted in each process."""


def shared_memory(num_bytes: int) -> int:
    """Creates memory that has no name, and so ends with the last process that has it; returns its descriptor."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("addenda")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, num_bytes)
    return descriptor


class Quota:
    """A count with a limit that holds for all processes of a server; each process changes its own cell only."""

    def __init__(self, limit: int, cells: Cells | None = None, own: int = 0) -> None:
        self.limit = limit
        self._cells, self._own = [0] if cells is None else cells, own

    @property
    def used(self) -> int:
        """The count of all processes."""
        return sum(self._cells)

    @property
    def others(self) -> int:
        """The count of the other processes."""
        return self.used - self._cells[self._own]

    def add(self, count: int) -> None:
        """Adds to this process's count, whatever the limit."""
        self._cells[self._own] += count

    def take(self, count: int) -> bool:
        """Adds to this process's count, or returns False if all together would exceed the limit.

        It adds before it compares, so of two processes at the limit at least one sees the other.
        """
        self.add(count)
        if self.used > self.limit:
            self.give(count)
            return False
        return True

    def give(self, count: int) -> None:
        """Subtracts what was taken."""
        self.add(-count)


class Board:
    """The counts of all processes of a server: number 0 runs the model, the others are workers."""

    def __init__(self, descriptor: int, workers: int) -> None:
        self._width = workers + 1
        self._cells = memoryview(mmap.mmap(descriptor, self.num_bytes(workers))).cast("q")

    @staticmethod
    def num_bytes(workers: int) -> int:
        """The size of the memory."""
        return 8 * len(COUNTS) * (workers + 1)

    def cells(self, count: str) -> Cells:
        """The cells of one of COUNTS, one for each process."""
        start = COUNTS.index(count) * self._width
        return self._cells[start : start + self._width]

    def clear(self, process: int) -> None:
        """Sets the counts of a process that has ended to 0; that the key file existed stays known."""
        for count in COUNTS[:-1]:
            self.cells(count)[process] = 0


def pixel_slots(descriptor: int, shape: tuple[int, ...]) -> Float[Tensor, "N 3 H W"]:
    """The shared memory as slots for one preprocessed image each."""
    memory = mmap.mmap(descriptor, 0)
    slots: Tensor = torch.frombuffer(memory, dtype=torch.float32).view(-1, *shape)
    return slots


def pixel_bytes(count: int, shape: tuple[int, ...]) -> int:
    """The size of memory with `count` slots."""
    return 4 * count * prod(shape)
