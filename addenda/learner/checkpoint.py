"""Where a run stands after each epoch, on disk: a run that was killed goes on from there to the same artifact."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)


class Checkpoint:
    """The standing of one run, by phase.

    Args:
        folder: the run's own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def within(self, name: str) -> Checkpoint:
        """The standing of a part of the run, which goes when the run's does."""
        return Checkpoint(self._folder / name)

    def save(self, phase: str, tensors: Mapping[str, Tensor], standing: Mapping[str, Any]) -> None:
        """Replaces what was saved of a phase, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{phase}.safetensors"
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")  # of a lost node's worker that lives on, too
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished,
                  metadata={"standing": json.dumps(standing)})  # fmt: skip
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)

    def load(self, phase: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved of a phase; None where there is nothing, or nothing that can be read."""
        path = self._folder / f"{phase}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                standing: dict[str, Any] = json.loads(file.metadata()["standing"])
                return {name: file.get_tensor(name) for name in file.keys()}, standing  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("The standing of an earlier run in %s cannot be read (%s); it starts anew.", path, error)
            return None

    def clear(self) -> None:
        """Forgets the run."""
        shutil.rmtree(self._folder, ignore_errors=True)
