"""The activation cache: a folder of what the frozen stream offered for images, addressed by their content."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from addenda.backbones import PREPARATION, FrozenBackbone
from addenda.combined import numerics, numerics_fingerprint
from addenda.exceptions import TrainingError
from addenda.files import claim, is_claimed, is_unfinished, leave_alone
from addenda.learner.context import Checkpoint, discard_run
from addenda.learner.store import (
    ENTRY,
    ENTRY_MARKER,
    ENTRY_TEXT,
    Kept,
    Store,
    create,
    described,
    evict,
    load,
    row_bytes,
)

FORMAT = 3
NAME = "addenda-activations-v1"
"""The cache's own folder, within the one that a user names: nothing outside it is looked at."""
RUNS = "runs"
"""Checkpoints of interrupted runs, in the cache's own folder."""
MARKER = "CACHEDIR.TAG"
MARKER_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Activations that Addenda can compute again. See: addenda cache --help. Source: https://bford.info/cachedir/\n"
)

log = logging.getLogger(__name__)


class ActivationCache:
    """Keeps activations across runs: keyed by image content and view, backbone fingerprint and numerics.

    An entry is a folder of memory-mapped arrays: the operating system keeps of it in memory what fits, and never swaps
    it out. Least recently used entries are evicted first, never one that a run has open. Everything lies in a folder of
    its own name; what else is there is left alone.

    Args:
        folder: where that folder is; by default `$ADDENDA_CACHE`, else the user's cache folder.
        budget_gb: the most that all entries may take, in 10^9 bytes; 0 keeps nothing. By default half of what the disk
            has left, what is kept already counted as free.

    Attributes:
        folder: the cache's own folder.

    Raises:
        TrainingError: a budget below 0, or none that is a number.
    """

    def __init__(self, folder: str | Path | None = None, budget_gb: float | None = None) -> None:
        chosen = folder or os.environ.get("ADDENDA_CACHE") or platformdirs.user_cache_path("addenda")
        self.folder = Path(chosen).expanduser() / NAME
        if budget_gb is not None and not budget_gb >= 0:
            raise TrainingError(f"A cache cannot take {budget_gb:g} GB: give a number from 0 on.")
        self._budget_gb = budget_gb

    @property
    def runs(self) -> Path:
        """Where checkpoints of interrupted runs lie."""
        return self.folder / RUNS

    def claim(self) -> None:
        """Makes the folder, or makes sure that it is Addenda's own and nobody else can write to it.

        Raises:
            TrainingError: it is not, or cannot be made.
        """
        try:
            claim(self.folder, MARKER, MARKER_TEXT)
        except OSError as error:
            raise TrainingError(
                f"The activation cache cannot be in {str(self.folder.parent)!r}: {error}. Set ADDENDA_CACHE to a "
                "folder of your own."
            ) from error

    def checkpoint(self, run: str) -> Checkpoint:
        """Where a run stands that was interrupted, or begins."""
        return Checkpoint(self.runs / run[:16], self.claim)

    @property
    def budget_bytes(self) -> float:
        """The most that all entries may take."""
        if self._budget_gb is not None:
            return self._budget_gb * 1e9
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return (shutil.disk_usage(existing).free + sum(kept.num_bytes for kept in self.sets())) / 2

    def sets(self) -> list[Kept]:
        """All entries, the last used first."""
        found = []
        for folder in self._folders():
            with suppress(FileNotFoundError):  # evicted meanwhile
                found.append(described(folder))
        return sorted(found, key=lambda kept: kept.used_at, reverse=True)

    def clear(self, names: Sequence[str] | None = None) -> tuple[int, list[str]]:
        """Deletes some entries, or all and every interrupted run with them.

        Returns:
            The bytes set free, and the names of entries that a run has open, which stay.
        """
        if not is_claimed(self.folder, MARKER, MARKER_TEXT):
            return 0, []
        with self._lock():
            if names is None and self.runs.is_dir():
                for run in self.runs.iterdir():
                    discard_run(run)
            before = self.sets()
            chosen = [kept.name for kept in before if names is None or kept.name in names]
            in_use = [name for name in chosen if not evict(self.folder / name)]
            freed = sum(kept.num_bytes for kept in before) - sum(kept.num_bytes for kept in self.sets())
        return freed, in_use

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

    def open(self, backbone: FrozenBackbone, keys: Sequence[str], tokens: bool = True) -> Store:
        """A store that has a row for each key: one that is kept, or a new one with what others have already done.

        Args:
            backbone: the frozen backbone.
            keys: sha256 of each row's content and view.
            tokens: whether rows have keys and values too, which only the training of tokens reads.

        Raises:
            TrainingError: the disk has no room, or the folder is not the user's own.
        """
        head_dim = backbone.embed_dim // backbone.num_heads
        meta: dict[str, Any] = {
            "format": FORMAT,
            "preparation": PREPARATION,
            "name": backbone.name,
            "backbone": backbone.fingerprint,
            "numerics": numerics_fingerprint(numerics(backbone)),
            "num_rows": len(keys),
            "shape": [backbone.depth, 2, backbone.num_heads, backbone.num_tokens, head_dim] if tokens else [],
            "width": backbone.embed_dim + backbone.num_layer_features,
        }
        self.claim()
        with self._lock():
            stores = [(folder, store) for folder in self._folders() if (store := load(folder, meta)) is not None]
            for folder, store in stores:
                if set(keys) <= store.place.keys():
                    with suppress(FileNotFoundError):
                        os.utime(folder)
                    return store
            for _, store in stores:
                store.release()
            self._make_room(len(keys) * row_bytes(meta["shape"], meta["width"]))
            made = create(self.folder, meta, keys)
            for _, store in stores:
                made.take_over(store)
            made.flush()
            return made

    def _lock(self) -> FileLock:
        """Entries come and go in one process at a time."""
        return FileLock(self.folder / ".lock")

    def _folders(self) -> list[Path]:
        """The entries; what is not one is named once and left alone."""
        found = []
        for path in sorted(self.folder.iterdir()) if is_claimed(self.folder, MARKER, MARKER_TEXT) else ():
            if re.fullmatch(ENTRY, path.name) and is_claimed(path, ENTRY_MARKER, ENTRY_TEXT):
                found.append(path)
            elif path.name not in (MARKER, ".lock", RUNS) and not is_unfinished(path, MARKER):
                leave_alone(path)
        return found

    def _make_room(self, num_bytes: int) -> None:
        found = self.sets()
        total = sum(kept.num_bytes for kept in found) + num_bytes
        for oldest in reversed(found):
            if total <= self.budget_bytes:
                break
            if evict(self.folder / oldest.name):
                total -= oldest.num_bytes
                size_gb = oldest.num_bytes / 1e9
                log.info("Evicted the cache entry %s, the least recently used (%.2f GB).", oldest.name, size_gb)
