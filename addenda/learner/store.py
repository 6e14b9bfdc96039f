"""One entry of the activation cache: memory-mapped rows, each with a digest that proves it complete."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Float32, UInt8
from torch import Tensor

from addenda.exceptions import TrainingError
from addenda.files import Hold, check_private, claim, discard, is_claimed

ENTRY = r"[0-9a-f]{16}"
ENTRY_MARKER, ENTRY_TEXT = "addenda-entry", "Activations of some images, made by Addenda.\n"
"""A file that marks an entry as Addenda's; every process that has the entry open holds a lock on it."""
FILES = r"(keys|key_values|features|pooled|digests)\.npy|meta\.json"
IDENTITY = ("format", "preparation", "backbone", "numerics", "shape", "width")
"""Metadata keys that, with the image keys, identify an entry."""
THREADS = 4
"""Threads that hash rows; hashing releases the GIL."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheEntry:
    """Summary of one cache entry, as listed by `addenda cache list`."""

    name: str  # its folder
    backbone: str  # timm's name
    num_images: int  # rows allocated, one for each view of an image
    num_done: int  # rows computed
    num_bytes: int
    used_at: datetime  # when it was last opened, UTC


class Store:
    """Memory-mapped rows of one open entry, which is not evicted meanwhile; `row_of` maps each key to its row.

    The digest of a row covers its key and its values and is written after them, so its presence marks the row as
    complete. Hence two runs may fill one entry at once, and rows that a crash or a disk fault left incomplete or
    damaged are recomputed.
    """

    def __init__(self, folder: Path, mode: Any, meta: dict[str, Any], keys: UInt8[np.ndarray, "K 32"]) -> None:
        """Maps the files; raises ValueError if one does not have the shape and dtype that `meta` implies."""
        count = meta["num_rows"]
        layout: list[tuple[str, Any, tuple[int, ...]]] = [
            ("features", np.float32, (count, meta["width"])),
            ("digests", np.uint8, (count, 32)),
        ]
        if meta["shape"]:  # else created by a run that trains no token
            layout.insert(0, ("key_values", np.float16, (count, *meta["shape"])))
        self._maps: list[Any] = []
        self._files: list[Any] = []  # the files of the maps
        for name, dtype, shape in layout:
            path = folder / f"{name}.npy"
            if mode == "w+":
                np.lib.format.open_memmap(path, mode, dtype, shape)
            # This rejects a truncated file, which opening for writing would extend.
            array: Any = np.load(path, mmap_mode="r")
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{path.name} holds {array.dtype} {array.shape}")
            file = path.open("r+b")
            weakref.finalize(self, file.close)
            self._files.append(file)
            self._maps.append(np.memmap(file, dtype, "r+", array.offset, shape))
        self._keys, self._digests = keys, self._maps[-1]
        self.key_values: Float16[Tensor, "K ..."] = torch.empty(count, 0, dtype=torch.float16, device="cpu")
        if meta["shape"]:
            self.key_values = torch.from_numpy(self._maps[0])
        self.features: Float32[Tensor, "K F"] = torch.from_numpy(self._maps[-2])
        self.row_of = {key.tobytes().hex(): row for row, key in enumerate(keys)}
        self._checked: set[int] = set()
        self._in_use = Hold(folder / ENTRY_MARKER, shared=True)

    def put(self, rows: Sequence[int], key_values: Float16[Tensor, "n ..."], features: Float32[Tensor, "n F"]) -> None:
        """Writes rows, then their digests."""
        # Not through the maps, where every new page would be a page fault.
        for file, mapped, values in zip(self._files[-2::-1], self._maps[-2::-1], (features, key_values), strict=False):
            for row, value in zip(rows, values.contiguous().numpy(), strict=True):
                file.seek(mapped.offset + row * value.nbytes)
                file.write(value)
            file.flush()
        for row, digest in zip(rows, self._row_digests(rows), strict=True):
            self._digests[row] = np.frombuffer(digest, np.uint8)
        self._checked.update(rows)

    def valid_rows(self, rows: Iterable[int]) -> set[int]:
        """Returns those of `rows` that are complete and undamaged; hashes each row the first time it is asked for."""
        written = {row for row in rows if row in self._checked or self._digests[row].any()}
        unchecked = sorted(written - self._checked)
        digests = zip(unchecked, self._row_digests(unchecked), strict=True)
        damaged = {row for row, digest in digests if self._digests[row].tobytes() != digest}
        if damaged:
            log.warning("Recomputing %d cached rows whose digests do not match.", len(damaged))
        self._checked.update(written - damaged)
        return written - damaged

    def copy_from(self, other: Store) -> None:
        """Copies rows with the same keys, and their digests, from another entry."""
        for key, row in self.row_of.items():
            source = other.row_of.get(key)
            if source is not None and other._digests[source].any() and not self._digests[row].any():
                self.key_values[row], self.features[row] = other.key_values[source], other.features[source]
                self._digests[row] = other._digests[source]

    def release(self) -> None:
        """Allows the entry to be evicted; this store can still read its rows."""
        self._in_use.close()

    def reserve(self) -> None:
        """Allocates all disk space now, so that a full disk cannot kill the run later.

        Raises:
            OSError: the disk is full.
        """
        for path in (Path(mapped.filename) for mapped in self._maps):
            size = path.stat().st_size
            try:
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                if shutil.disk_usage(path).free < size:  # macOS, and file systems that cannot reserve space
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

    def flush(self) -> None:
        """Flushes rows and digests to disk."""
        for mapped in self._maps:
            mapped.flush()

    def _row_digests(self, rows: Sequence[int]) -> list[bytes]:
        def digest(row: int) -> bytes:
            sha256 = hashlib.sha256(self._keys[row])
            for mapped in self._maps[:-1]:
                sha256.update(mapped[row])
            return sha256.digest()

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(digest, rows))


def create(cache: Path, meta: dict[str, Any], keys: Sequence[str]) -> Store:
    """Creates an entry, replacing one of the same name.

    Raises:
        TrainingError: the disk is full.
    """
    packed = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 32)
    folder = cache / _name(meta, packed)
    try:
        if is_claimed(folder, ENTRY_MARKER, ENTRY_TEXT):  # another run may still have the old files mapped
            discard(folder, FILES, ENTRY_MARKER)
        claim(folder, ENTRY_MARKER, ENTRY_TEXT)
        np.save(folder / "keys.npy", packed)
        store = Store(folder, "w+", meta, packed)
        store.reserve()
        (folder / "meta.json").write_text(json.dumps(meta))
    except OSError as error:
        if is_claimed(folder, ENTRY_MARKER, ENTRY_TEXT):
            discard(folder, FILES, ENTRY_MARKER)
        num_bytes = len(keys) * row_bytes(meta["shape"], meta["width"])
        raise TrainingError(
            f"The activations of {len(keys)} images take {num_bytes / 1e9:.2f} GB, "
            f"and {cache} cannot hold them ({error.strerror or error}). Free some space, lower the cache budget "
            "(--cache-gb), or set ADDENDA_CACHE to a folder on a larger disk."
        ) from error
    return store


def load(folder: Path, meta: dict[str, Any]) -> Store | None:
    """Opens an entry if its backbone, numerics and shapes match `meta`; discards a damaged one with a warning."""
    stored = _read_meta(folder)
    if stored is not None and any(stored[key] != meta[key] for key in IDENTITY):
        return None
    try:
        if stored is None:
            raise ValueError("meta.json cannot be read")
        check_private(folder)
        keys = np.load(folder / "keys.npy")
        if folder.name != _name(stored, keys):
            raise ValueError("its name does not match its content")
        return Store(folder, "r+", stored, keys)
    except PermissionError as error:
        raise TrainingError(f"A cache entry cannot be trusted: {error}.") from error
    except (OSError, ValueError, KeyError, EOFError) as error:
        log.warning("Discarding the damaged cache entry %s (%s); recomputing.", folder, str(error))
        evict(folder)
        return None


def row_bytes(shape: Sequence[int], width: int) -> int:
    """Returns a row's size on disk without its digest and key; `shape` is empty if keys and values are not stored."""
    return 2 * math.prod(shape) * bool(shape) + 4 * width


def _name(meta: dict[str, Any], keys: UInt8[np.ndarray, "K 32"]) -> str:
    identity = json.dumps([meta[key] for key in IDENTITY])
    return hashlib.sha256(identity.encode() + keys.tobytes()).hexdigest()[:16]


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        return meta if all(key in meta for key in IDENTITY) else None
    except (OSError, ValueError, TypeError):
        return None


def describe(folder: Path) -> CacheEntry:
    """Summarises an entry for listing."""
    meta = _read_meta(folder) or {"name": "(damaged)", "num_rows": 0}
    try:
        num_done = int(np.load(folder / "digests.npy").any(axis=1).sum())
    except (OSError, ValueError, EOFError):
        num_done = 0
    num_bytes = sum(path.lstat().st_size for path in folder.iterdir())
    used_at = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
    return CacheEntry(folder.name, meta["name"], meta["num_rows"], num_done, num_bytes, used_at)


def evict(folder: Path) -> bool:
    """Deletes an entry; returns False if a run has it open."""
    try:
        with Hold(folder / ENTRY_MARKER, shared=False):
            discard(folder, FILES, ENTRY_MARKER)
        return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
