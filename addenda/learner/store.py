"""Rows of an entry of the activation cache: memory-mapped, each with a digest that says it is there and whole."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Float32, UInt8
from torch import Tensor

from addenda.files import Hold

ENTRY_MARKER, ENTRY_TEXT = "addenda-entry", "Activations of some images, made by Addenda.\n"
"""A file in an entry, which says whose it is and is held by those who have it open."""
THREADS = 4
"""That hash rows at once: Python's lock is free meanwhile."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """Memory-mapped rows of one entry, which is not evicted while a store of it is open.

    Each row has a digest of its key and values. It is written after the row and is what says that the row is there; so
    two runs may fill one entry at once, and what a kill or a fault of the disk leaves is computed again.

    Attributes:
        key_values: keys and values of each layer in half precision.
        pooled: the backbone's own pooled feature.
        place: the row of each key.
    """

    key_values: Float16[Tensor, "K L 2 H P d"]
    pooled: Float32[Tensor, "K D"]
    place: dict[str, int]
    _digests: UInt8[np.ndarray, "K 32"]
    _keys: UInt8[np.ndarray, "K 32"]
    _maps: tuple[Any, ...]
    _in_use: Hold
    _checked: set[int] = field(default_factory=set)

    def put(
        self, rows: Sequence[int], key_values: Float16[Tensor, "n L 2 H P d"], pooled: Float32[Tensor, "n D"]
    ) -> None:
        """Writes some rows, and then their digests."""
        for row, layers, feature in zip(rows, key_values, pooled, strict=True):
            self.key_values[row], self.pooled[row] = layers, feature
        for row, digest in zip(rows, self._hashed(rows), strict=True):
            self._digests[row] = np.frombuffer(digest, np.uint8)
        self._checked.update(rows)

    def held(self, rows: Iterable[int]) -> set[int]:
        """Those of some rows that were written and are as they were: each is hashed when it is first asked about."""
        written = {row for row in rows if row in self._checked or self._digests[row].any()}
        unseen = sorted(written - self._checked)
        damaged = {
            row
            for row, digest in zip(unseen, self._hashed(unseen), strict=True)
            if self._digests[row].tobytes() != digest
        }
        if damaged:
            log.warning("%d cached rows are damaged or were exchanged; recomputing.", len(damaged))
        self._checked.update(written - damaged)
        return written - damaged

    def take_over(self, other: Store) -> None:
        """Copies the rows that another entry has of the same images and views, with their digests."""
        for key, row in self.place.items():
            theirs = other.place.get(key)
            if theirs is not None and other._digests[theirs].any() and not self._digests[row].any():
                self.key_values[row], self.pooled[row] = other.key_values[theirs], other.pooled[theirs]
                self._digests[row] = other._digests[theirs]

    def release(self) -> None:
        """Lets the entry be evicted; what it held can still be read here."""
        self._in_use.close()

    def reserve(self) -> None:
        """Takes the whole size on the disk, where a full one would kill the run later; OSError where it is full."""
        for mapped in self._maps:
            _reserve(Path(mapped.filename))

    def flush(self) -> None:
        """Writes rows and digests to the disk."""
        for mapped in self._maps:
            mapped.flush()

    def _hashed(self, rows: Sequence[int]) -> list[bytes]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self._digest, rows))

    def _digest(self, row: int) -> bytes:
        found = hashlib.sha256(self._keys[row])
        for mapped in self._maps[:2]:
            found.update(mapped[row])
        return found.digest()


def map_rows(folder: Path, mode: Any, shape: tuple[int, ...], width: int, keys: UInt8[np.ndarray, "K 32"]) -> Store:
    """Maps an entry's arrays into memory; ValueError where a file is not the size that its header says."""
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "key_values": (np.float16, shape),
        "pooled": (np.float32, (shape[0], width)),
        "digests": (np.uint8, (shape[0], 32)),
    }
    maps = []
    for name, (dtype, expected) in wanted.items():
        path = folder / f"{name}.npy"
        if mode == "w+":
            maps.append(np.lib.format.open_memmap(path, mode, dtype, expected))
            continue
        found = np.load(path, mmap_mode="r")  # refuses a file that is too short; opened to write it would grow
        if found.shape != expected or found.dtype != dtype:
            raise ValueError(f"{path.name} holds {found.dtype} {found.shape}")
        maps.append(np.lib.format.open_memmap(path, mode))
    place = {row.tobytes().hex(): i for i, row in enumerate(keys)}
    key_values, pooled, digests = maps
    in_use = Hold(folder / ENTRY_MARKER, shared=True)
    return Store(torch.from_numpy(key_values), torch.from_numpy(pooled), place, digests, keys, tuple(maps), in_use)


def _reserve(path: Path) -> None:
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        if shutil.disk_usage(path).free < size:  # macOS, and file systems that cannot reserve
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
