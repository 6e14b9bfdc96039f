"""Where a run stands after each epoch, on disk: a run that was killed goes on from there to the same artifact."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from addenda.files import discard, written

FILES = r"(sweep|refit)\.safetensors|[0-9a-f]{16}"
"""What a run's folder holds: checkpoints of its phases, and folders of further sweeps."""

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
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with written(self._folder / f"{phase}.safetensors") as unfinished:
            save_file(contiguous, unfinished, metadata={"standing": json.dumps(standing)})

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
        discard(self._folder, FILES)
