"""An entry of the activation cache: memory-mapped rows, each with a digest that says it is there and whole."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
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
"""A file in an entry, which says whose it is and is held by those who have it open."""
FILES = r"(keys|key_values|features|pooled|digests)\.npy|meta\.json"
IDENTITY = ("format", "preparation", "backbone", "numerics", "shape", "width")
"""What decides, beside the images, which entry it is."""
THREADS = 4
"""That hash rows at once: Python's lock is free meanwhile."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """One cache entry, as `addenda cache list` shows it."""

    name: str  # its folder
    backbone: str  # timm's name
    num_images: int  # images or views there is room for
    num_done: int  # of them computed
    num_bytes: int
    used_at: datetime  # when it was last opened, UTC


class Store:
    """Memory-mapped rows of one entry, which is not evicted while a store of it is open; `place` has each key's.

    Each row has a digest of its key and values. It is written after the row and is what says that the row is there; so
    two runs may fill one entry at once, and what a kill or a fault of the disk leaves is computed again.
    """

    def __init__(self, folder: Path, mode: Any, meta: dict[str, Any], keys: UInt8[np.ndarray, "K 32"]) -> None:
        """ValueError where a file is not the size that its header says."""
        count = meta["num_rows"]
        wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
            "key_values": (np.float16, (count, *meta["shape"])),
            "features": (np.float32, (count, meta["width"])),
            "digests": (np.uint8, (count, 32)),
        }
        if not meta["shape"]:  # of a run that trains no token
            del wanted["key_values"]
        self._maps: list[Any] = []
        for name, (dtype, expected) in wanted.items():
            path = folder / f"{name}.npy"
            if mode == "w+":
                self._maps.append(np.lib.format.open_memmap(path, mode, dtype, expected))
                continue
            found = np.load(path, mmap_mode="r")  # refuses a file that is too short; opened to write it would grow
            if found.shape != expected or found.dtype != dtype:
                raise ValueError(f"{path.name} holds {found.dtype} {found.shape}")
            self._maps.append(np.lib.format.open_memmap(path, mode))
        self._keys, self._digests = keys, self._maps[-1]
        self.key_values: Float16[Tensor, "K ..."] = (
            torch.from_numpy(self._maps[0]) if meta["shape"] else _nothing(count)
        )
        self.features: Float32[Tensor, "K F"] = torch.from_numpy(self._maps[-2])
        self.place = {row.tobytes().hex(): i for i, row in enumerate(keys)}
        self._checked: set[int] = set()
        self._in_use = Hold(folder / ENTRY_MARKER, shared=True)

    def put(self, rows: Sequence[int], key_values: Float16[Tensor, "n ..."], features: Float32[Tensor, "n F"]) -> None:
        """Writes some rows, and then their digests."""
        for row, offered, read in zip(rows, key_values, features, strict=True):
            self.key_values[row], self.features[row] = offered, read
        for row, digest in zip(rows, self._hashed(rows), strict=True):
            self._digests[row] = np.frombuffer(digest, np.uint8)
        self._checked.update(rows)

    def held(self, rows: Iterable[int]) -> set[int]:
        """Those of some rows that were written and are as they were: each is hashed when it is first asked about."""
        written = {row for row in rows if row in self._checked or self._digests[row].any()}
        unseen = sorted(written - self._checked)
        hashed = zip(unseen, self._hashed(unseen), strict=True)
        damaged = {row for row, digest in hashed if self._digests[row].tobytes() != digest}
        if damaged:
            log.warning("%d cached rows are damaged or were exchanged; recomputing.", len(damaged))
        self._checked.update(written - damaged)
        return written - damaged

    def take_over(self, other: Store) -> None:
        """Copies the rows that another entry has of the same images and views, with their digests."""
        for key, row in self.place.items():
            theirs = other.place.get(key)
            if theirs is not None and other._digests[theirs].any() and not self._digests[row].any():
                self.key_values[row], self.features[row] = other.key_values[theirs], other.features[theirs]
                self._digests[row] = other._digests[theirs]

    def release(self) -> None:
        """Lets the entry be evicted; what it held can still be read here."""
        self._in_use.close()

    def reserve(self) -> None:
        """Takes the whole size on the disk, where a full one would kill the run later; OSError where it is full."""
        for path in (Path(mapped.filename) for mapped in self._maps):
            size = path.stat().st_size
            try:
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                if shutil.disk_usage(path).free < size:  # macOS, and file systems that cannot reserve
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

    def flush(self) -> None:
        """Writes rows and digests to the disk."""
        for mapped in self._maps:
            mapped.flush()

    def _hashed(self, rows: Sequence[int]) -> list[bytes]:
        def hashed(row: int) -> bytes:
            found = hashlib.sha256(self._keys[row])
            for mapped in self._maps[:-1]:
                found.update(mapped[row])
            return found.digest()

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(hashed, rows))


def _nothing(count: int) -> Float16[Tensor, "K 0"]:
    return torch.empty(count, 0, dtype=torch.float16, device="cpu")


def create(cache: Path, meta: dict[str, Any], keys: Sequence[str]) -> Store:
    """A new entry; what was there of its name goes. TrainingError where the disk has no room."""
    packed = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 32)
    folder = cache / _name(meta, packed)
    try:
        if is_claimed(folder, ENTRY_MARKER, ENTRY_TEXT):  # another run may still read the files that go
            discard(folder, FILES, ENTRY_MARKER)
        claim(folder, ENTRY_MARKER, ENTRY_TEXT)
        np.save(folder / "keys.npy", packed)
        store = Store(folder, "w+", meta, packed)
        store.reserve()
        (folder / "meta.json").write_text(json.dumps(meta))
    except OSError as error:
        if is_claimed(folder, ENTRY_MARKER, ENTRY_TEXT):
            discard(folder, FILES, ENTRY_MARKER)
        whole = len(keys) * row_bytes(meta["shape"], meta["width"])
        raise TrainingError(
            f"The activations of {len(keys)} images take {whole / 1e9:.2f} GB, "
            f"and {cache} cannot hold them ({error.strerror or error}). Free some space, keep less of them "
            "(--cache-gb), or set ADDENDA_CACHE to a folder on a larger disk."
        ) from error
    return store


def load(folder: Path, meta: dict[str, Any]) -> Store | None:
    """An entry of this backbone and these numerics; one that is damaged is discarded, and said to be."""
    found = _read_meta(folder)
    if found is not None and any(found[k] != meta[k] for k in IDENTITY):
        return None
    try:
        if found is None:
            raise ValueError("its description cannot be read")
        check_private(folder)
        keys = np.load(folder / "keys.npy")
        if folder.name != _name(found, keys):
            raise ValueError("it is not what its name says")
        return Store(folder, "r+", found, keys)
    except PermissionError as error:
        raise TrainingError(f"A cache entry cannot be trusted: {error}.") from error
    except (OSError, ValueError, KeyError, EOFError) as error:
        log.warning("Discarding the damaged cache entry %s (%s); recomputing.", folder, str(error))
        evict(folder)
        return None


def row_bytes(shape: Sequence[int], width: int) -> int:
    """What a row takes on the disk, its digest and key aside; without keys and values their shape is empty."""
    return 2 * math.prod(shape) * bool(shape) + 4 * width


def _name(meta: dict[str, Any], keys: UInt8[np.ndarray, "K 32"]) -> str:
    identity = json.dumps([meta[k] for k in IDENTITY])
    return hashlib.sha256(identity.encode() + keys.tobytes()).hexdigest()[:16]


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        return meta if all(key in meta for key in IDENTITY) else None
    except (OSError, ValueError, TypeError):
        return None


def described(folder: Path) -> Kept:
    """An entry for the list."""
    meta = _read_meta(folder) or {"name": "(damaged)", "num_rows": 0}
    try:
        num_done = int(np.load(folder / "digests.npy").any(axis=1).sum())
    except (OSError, ValueError, EOFError):
        num_done = 0
    num_bytes = sum(path.lstat().st_size for path in folder.iterdir())
    used_at = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
    return Kept(folder.name, meta["name"], meta["num_rows"], num_done, num_bytes, used_at)


def evict(folder: Path) -> bool:
    """Deletes an entry unless a run has it open, which is then said to stay."""
    try:
        with Hold(folder / ENTRY_MARKER, shared=False):
            discard(folder, FILES, ENTRY_MARKER)
        return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
