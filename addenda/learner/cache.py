"""The activation cache: a folder of what the frozen stream offered for images, addressed by their content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from filelock import FileLock
from jaxtyping import Float16, Float32, UInt8
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined import numerics, numerics_fingerprint
from addenda.exceptions import TrainingError

FORMAT = 1
RUNS = "runs"
"""Where interrupted runs stand, in the cache's folder."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """One set of kept activations, as `addenda cache list` shows it.

    Attributes:
        name: its folder.
        backbone: timm name of the backbone.
        num_images: how many images or views there is room for.
        num_done: how many of them are computed.
        num_bytes: what it takes on disk.
        used_at: when it was last opened, UTC.
    """

    name: str
    backbone: str
    num_images: int
    num_done: int
    num_bytes: int
    used_at: datetime


@dataclass(frozen=True)
class Store:
    """Memory-mapped rows of one set.

    Attributes:
        key_values: keys and values of each layer in half precision.
        pooled: the backbone's own pooled feature.
        done: 1 where the row is computed.
        place: the row of each key.
    """

    key_values: Float16[Tensor, "K L 2 H P d"]
    pooled: Float32[Tensor, "K D"]
    done: UInt8[Tensor, " K"]
    place: dict[str, int]
    _maps: tuple[Any, ...]

    def flush(self) -> None:
        """Writes rows to disk, and only then the marks that say that they are there."""
        key_values, pooled, done = self._maps
        key_values.flush()
        pooled.flush()
        done[:] = self.done.numpy()
        done.flush()


class ActivationCache:
    """Keeps activations across runs: keyed by image content and view, backbone fingerprint and numerics.

    A set is a folder of memory-mapped arrays: the operating system keeps of it in memory what fits, and never swaps it
    out. Rows marked as done survive a kill at any moment. Sets not used for longest make room for new ones.

    Args:
        folder: where; by default `$ADDENDA_CACHE`, else the user's cache folder.
        budget_gb: the most that all sets may take, in 10^9 bytes; 0 keeps nothing. By default half of what the disk
            has left, what is kept already counted as free.

    Raises:
        TrainingError: a budget below 0, or none that is a number.
    """

    def __init__(self, folder: str | Path | None = None, budget_gb: float | None = None) -> None:
        chosen = folder or os.environ.get("ADDENDA_CACHE") or platformdirs.user_cache_path("addenda") / "activations"
        self.folder = Path(chosen)
        if budget_gb is not None and not budget_gb >= 0:
            raise TrainingError(f"A cache cannot take {budget_gb:g} GB: give a number from 0 on.")
        self._budget_gb = budget_gb

    @property
    def budget_bytes(self) -> float:
        """The most that all sets may take."""
        if self._budget_gb is not None:
            return self._budget_gb * 1e9
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return (shutil.disk_usage(existing).free + sum(kept.num_bytes for kept in self.sets())) / 2

    def sets(self) -> list[Kept]:
        """All sets, the last used first."""
        found = []
        for folder in self._folders():
            meta = _read_meta(folder) or {"name": "(damaged)", "num_rows": 0}
            try:
                num_done = int(np.load(folder / "done.npy").sum())
            except (OSError, ValueError):
                num_done = 0
            found.append(
                Kept(
                    name=folder.name,
                    backbone=meta["name"],
                    num_images=meta["num_rows"],
                    num_done=num_done,
                    num_bytes=sum(path.stat().st_size for path in folder.iterdir()),
                    used_at=datetime.fromtimestamp(folder.stat().st_mtime, UTC),
                )
            )
        return sorted(found, key=lambda kept: kept.used_at, reverse=True)

    def clear(self, names: Sequence[str] | None = None) -> int:
        """Deletes some sets, or all and every interrupted run with them; returns the bytes set free."""
        freed = 0
        if names is None:
            shutil.rmtree(self.folder / RUNS, ignore_errors=True)
        for kept in self.sets():
            if names is None or kept.name in names:
                shutil.rmtree(self.folder / kept.name)
                freed += kept.num_bytes
        return freed

    def capacity(self, row_bytes: int, num_rows: int) -> int:
        """How many rows the budget holds.

        Raises:
            TrainingError: the budget is above 0 and holds not even one row.
        """
        budget = self.budget_bytes
        if self._budget_gb and budget < row_bytes:
            raise TrainingError(
                f"A cache of {self._budget_gb:g} GB does not hold the activations of one image ({row_bytes / 1e9:.4f} "
                f"GB); all {num_rows} take {num_rows * row_bytes / 1e9:.2f} GB. Give more, or 0 to compute them anew "
                "in each epoch."
            )
        return int(min(num_rows, budget / row_bytes))

    def open(self, backbone: FrozenBackbone, keys: Sequence[str]) -> Store:
        """A store that has a row for each key: one that is kept, or a new one with what others have already done.

        Args:
            backbone: the frozen backbone.
            keys: sha256 of each row's content and view.

        Raises:
            TrainingError: the disk has no room.
        """
        head_dim = backbone.embed_dim // backbone.num_heads
        shape = (len(keys), backbone.depth, 2, backbone.num_heads, backbone.num_tokens, head_dim)
        meta = {
            "format": FORMAT,
            "name": backbone.name,
            "backbone": backbone.fingerprint,
            "numerics": numerics_fingerprint(numerics(backbone)),
            "num_rows": len(keys),
            "shape": list(shape[1:]),
            "width": backbone.embed_dim,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            stores = [(folder, store) for folder in self._folders() if (store := self._load(folder, meta)) is not None]
            for folder, store in stores:
                if set(keys) <= store.place.keys():
                    os.utime(folder)
                    return store
            self._make_room(int(np.prod(shape)) * 2 + len(keys) * backbone.embed_dim * 4)
            made = self._create(meta, shape, keys)
            for _, store in stores:
                _copy(store, made)
            made.flush()
            return made

    def _folders(self) -> list[Path]:
        return (
            [path for path in self.folder.iterdir() if path.is_dir() and path.name != RUNS]
            if self.folder.is_dir()
            else []
        )

    def _load(self, folder: Path, meta: dict[str, Any]) -> Store | None:
        """A set of this backbone and these numerics; one that is damaged is deleted, and said to be."""
        found = _read_meta(folder)
        if found is not None and any(found[k] != meta[k] for k in ("backbone", "numerics", "shape", "width")):
            return None
        try:
            if found is None:
                raise ValueError("its description cannot be read")
            keys = np.load(folder / "keys.npy")
            if folder.name != _name(found, keys):
                raise ValueError("it is not what its name says")
            rows = found["num_rows"]
            return _map(folder, "r+", (rows, *found["shape"]), found["width"], keys)
        except (OSError, ValueError, KeyError) as error:
            log.warning("Kept activations %s are of no use (%s) and are made again.", folder, error)
            shutil.rmtree(folder)
            return None

    def _create(self, meta: dict[str, Any], shape: tuple[int, ...], keys: Sequence[str]) -> Store:
        packed = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 32)
        folder = self.folder / _name(meta, packed)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            np.save(folder / "keys.npy", packed)
            store = _map(folder, "w+", shape, meta["width"], packed)
            for mapped in store._maps:
                with open(str(mapped.filename), "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
            (folder / "meta.json").write_text(json.dumps(meta))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"The activations of {len(keys)} images take {np.prod(shape) * 2 / 1e9:.2f} GB, and {self.folder} "
                f"cannot hold them ({error.strerror}). Free some space, keep less of them (--cache-gb), or set "
                "ADDENDA_CACHE to a folder on a larger disk."
            ) from error
        return store

    def _make_room(self, num_bytes: int) -> None:
        kept = self.sets()
        while kept and sum(k.num_bytes for k in kept) + num_bytes > self.budget_bytes:
            oldest = kept.pop()
            log.info("Kept activations %s make room (%.2f GB).", oldest.name, oldest.num_bytes / 1e9)
            self.clear([oldest.name])


def _name(meta: dict[str, Any], keys: UInt8[np.ndarray, "K 32"]) -> str:
    identity = json.dumps([meta[k] for k in ("format", "backbone", "numerics", "shape", "width")])
    return hashlib.sha256(identity.encode() + keys.tobytes()).hexdigest()[:16]


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        return meta if meta["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(folder: Path, mode: Any, shape: tuple[int, ...], width: int, keys: UInt8[np.ndarray, "K 32"]) -> Store:
    """Maps a set's arrays into memory; ValueError where a file is not the size that its header says."""
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "key_values": (np.float16, shape),
        "pooled": (np.float32, (shape[0], width)),
        "done": (np.uint8, (shape[0],)),
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
    key_values, pooled, done = map(torch.from_numpy, maps)
    return Store(key_values, pooled, done.clone(), place, tuple(maps))


def _copy(source: Store, target: Store) -> None:
    """Takes over the rows that another set has done."""
    for key, row in target.place.items():
        other = source.place.get(key)
        if other is not None and source.done[other] and not target.done[row]:
            target.key_values[row] = source.key_values[other]
            target.pooled[row] = source.pooled[other]
            target.done[row] = 1
