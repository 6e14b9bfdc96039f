"""The activation cache: frozen activations on disk, addressed by image content."""

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
from addenda.files import claim, expanded, is_claimed, is_unfinished, leave_alone
from addenda.learner import store
from addenda.learner.context import Checkpoint, discard_run
from addenda.learner.store import CacheEntry, Store, evict, row_bytes

FORMAT = 3
NAME = "addenda-activations-v1"
"""The cache's own folder inside the folder the user names. Addenda touches nothing outside it."""
RUNS = "runs"
"""Folder for checkpoints of interrupted runs, inside the cache's own folder."""
MARKER = "CACHEDIR.TAG"
MARKER_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Activations that Addenda can compute again. See: addenda cache --help. Source: https://bford.info/cachedir/\n"
)

log = logging.getLogger(__name__)


class ActivationCache:
    """Caches frozen activations across runs, keyed by image content, view, backbone fingerprint and numerics.

    An entry is a folder of memory-mapped arrays, so the operating system holds in memory what fits and never swaps it.
    Least recently used entries are evicted first; an entry that a run has open is never evicted. All entries lie in the
    cache's own subfolder, and other files are left alone.

    Args:
        folder: parent of the cache's own folder. Default: `$ADDENDA_CACHE`, else the user's cache folder.
        budget_gb: maximum size of all entries, in 10^9 bytes; 0 stores nothing, and no checkpoint either. Default: half
            of the disk space that is free or taken by the cache itself.

    Attributes:
        folder: the cache's own folder.

    Raises:
        TrainingError: `budget_gb` is negative or NaN.
    """

    def __init__(self, folder: str | Path | None = None, budget_gb: float | None = None) -> None:
        parent = folder or os.environ.get("ADDENDA_CACHE") or platformdirs.user_cache_path("addenda")
        self.folder = expanded(parent) / NAME
        if budget_gb is not None and not budget_gb >= 0:
            raise TrainingError(f"A cache budget of {budget_gb:g} GB is invalid; give a number of at least 0.")
        self._budget_gb = budget_gb
        self.runs = self.folder / RUNS

    def claim(self) -> None:
        """Creates the cache's own folder, or checks that it is Addenda's and that no other user can write to it.

        Raises:
            TrainingError: the check fails, or the folder cannot be created.
        """
        try:
            claim(self.folder, MARKER, MARKER_TEXT)
        except OSError as error:
            raise TrainingError(
                f"The activation cache cannot use {str(self.folder.parent)!r}: {error}. Set ADDENDA_CACHE to a folder "
                "of your own."
            ) from error

    def checkpoint(self, run: str) -> Checkpoint | None:
        """Returns the checkpoint of a run, identified by a hex digest; None if the budget is 0."""
        return None if self._budget_gb == 0 else Checkpoint(self.runs / run[:16], self.claim)

    @property
    def budget_bytes(self) -> float:
        """Maximum size of all entries in bytes."""
        if self._budget_gb is not None:
            return self._budget_gb * 1e9
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return (shutil.disk_usage(existing).free + sum(entry.num_bytes for entry in self.sets())) / 2

    def sets(self) -> list[CacheEntry]:
        """Lists all entries, most recently used first."""
        entries = []
        for folder in self._folders():
            with suppress(FileNotFoundError):  # another process evicted it
                entries.append(store.describe(folder))
        return sorted(entries, key=lambda entry: entry.used_at, reverse=True)

    def clear(self, names: Sequence[str] | None = None) -> tuple[int, list[str]]:
        """Deletes the named entries, or all entries and all checkpoints of interrupted runs.

        Returns:
            The number of bytes freed, and the names of entries that stay because a run has them open.
        """
        if not is_claimed(self.folder, MARKER, MARKER_TEXT):
            return 0, []
        with FileLock(self.folder / ".lock"):
            if names is None and self.runs.is_dir():
                for run in self.runs.iterdir():
                    discard_run(run)
            before = self.sets()
            selected = [entry.name for entry in before if names is None or entry.name in names]
            in_use = [name for name in selected if not evict(self.folder / name)]
            freed = sum(entry.num_bytes for entry in before) - sum(entry.num_bytes for entry in self.sets())
        return freed, in_use

    def capacity(self, row_bytes: int, num_rows: int) -> int:
        """Returns how many of `num_rows` rows fit into the budget.

        Raises:
            TrainingError: the budget is above 0 and smaller than one row.
        """
        budget = self.budget_bytes
        if self._budget_gb and budget < row_bytes:
            raise TrainingError(
                f"A cache of {self._budget_gb:g} GB cannot hold the activations of one image ({row_bytes / 1e9:.4f} "
                f"GB); all {num_rows} take {num_rows * row_bytes / 1e9:.2f} GB. Raise the budget, or set it to 0 to "
                "recompute them in each epoch."
            )
        return int(min(num_rows, budget / row_bytes))

    def open(self, backbone: FrozenBackbone, keys: Sequence[str], tokens: bool = True) -> Store:
        """Opens an entry that has all of `keys`, or creates one and copies what other entries already hold.

        Args:
            backbone: the frozen backbone.
            keys: sha256 of each row's image content and view.
            tokens: whether rows also store keys and values, which only token training reads.

        Raises:
            TrainingError: the disk is full, or the folder does not belong to the user.
        """
        meta: dict[str, Any] = {
            "format": FORMAT,
            "preparation": PREPARATION,
            "name": backbone.name,
            "backbone": backbone.fingerprint,
            "numerics": numerics_fingerprint(numerics(backbone)),
            "num_rows": len(keys),
            "shape": list(backbone.key_value_shape) if tokens else [],
            "width": backbone.embed_dim + backbone.num_layer_features,
        }
        self.claim()
        with FileLock(self.folder / ".lock"):
            others = [(folder, other) for folder in self._folders() if (other := store.load(folder, meta)) is not None]
            for folder, other in others:
                if set(keys) <= other.row_of.keys():
                    with suppress(FileNotFoundError):
                        os.utime(folder)
                    return other
            for _, other in others:
                other.release()
            self._make_room(len(keys) * row_bytes(meta["shape"], meta["width"]))
            created = store.create(self.folder, meta, keys)
            for _, other in others:
                created.copy_from(other)
            created.flush()
            return created

    def _folders(self) -> list[Path]:
        """Lists the entries' folders; reports anything else once and leaves it alone."""
        folders = []
        for path in sorted(self.folder.iterdir()) if is_claimed(self.folder, MARKER, MARKER_TEXT) else ():
            if re.fullmatch(store.ENTRY, path.name) and is_claimed(path, store.ENTRY_MARKER, store.ENTRY_TEXT):
                folders.append(path)
            elif path.name not in (MARKER, ".lock", RUNS) and not is_unfinished(path, MARKER):
                leave_alone(path)
        return folders

    def _make_room(self, num_bytes: int) -> None:
        entries = self.sets()
        total = sum(entry.num_bytes for entry in entries) + num_bytes
        while entries and total > self.budget_bytes:
            oldest = entries.pop()
            if evict(self.folder / oldest.name):
                total -= oldest.num_bytes
                size_gb = oldest.num_bytes / 1e9
                log.info("Evicted the least recently used cache entry %s (%.2f GB).", oldest.name, size_gb)
