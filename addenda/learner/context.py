"""What all stages of a run share: handling of unreadable images, progress callbacks, and the checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from addenda.files import Hold, discard, written
from addenda.learner.learn_config import Settings

MARKER = "run"
"""Lock file in a run's folder, held by every process that works on the run."""
FILES = rf"(sweep|refit)\.safetensors|[0-9a-f]{{16}}|{MARKER}"
"""Pattern of the names in a run's folder: checkpoints of its phases, and a folder for each sweep."""

Report = Callable[[str, int, int], None]
"""Progress callback, called with a description, the number of units done, and their total."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """Results of one epoch, passed to `on_epoch`. A candidate that has stopped has NaN.

    Attributes:
        phase: `"sweep"` or `"refit"`.
        epoch: number of the epoch, from 1.
        epochs: maximum number of epochs.
        train_loss: mean training loss of each candidate.
        validation_loss: mean validation loss of each candidate after temperature scaling; empty in the refit.
        validation_accuracy: validation accuracy of each candidate, 0..1, over all labels if the task is multi-label;
            empty in the refit.
        candidates: settings of each candidate.
    """

    phase: str
    epoch: int
    epochs: int
    train_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    validation_accuracy: tuple[float, ...]
    candidates: tuple[Settings, ...]


OnEpoch = Callable[[Epoch], None]


class Checkpoint:
    """Checkpoint of one run, with a file for each phase; a run that was killed resumes to the same artifact.

    `prepare` creates the parent folder before the first write. `run` is the checkpoint of the whole run if this is the
    checkpoint of one of its sweeps.
    """

    def __init__(self, folder: Path, prepare: Callable[[], None] = lambda: None, run: Checkpoint | None = None) -> None:
        self._folder, self._prepare, self._run = folder, prepare, run or self
        self._hold: Hold | None = None
        self._failed = False

    def within(self, name: str) -> Checkpoint:
        """Returns the checkpoint of one sweep of the run; it is deleted with the run's."""
        return Checkpoint(self._folder / name, self._prepare, self._run)

    def save(self, phase: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replaces the checkpoint of a phase atomically; if the disk is full, only warns."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        data = save(contiguous, metadata={"standing": json.dumps(values)})
        self._prepare()
        try:
            self._run._lock()
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with written(self._folder / f"{phase}.safetensors") as unfinished:
                unfinished.write_bytes(data)
        except OSError as error:
            if not self._run._failed:
                log.warning(
                    "No checkpoint can be saved in %s: %s. If this run is interrupted, it starts over.",
                    self._folder, error.strerror,
                )  # fmt: skip
            self._run._failed = True

    def _lock(self) -> None:
        """Creates the run's folder and locks it against `addenda cache clear`."""
        if self._hold is None or not (self._folder / MARKER).exists():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._folder / MARKER).touch()
            self._hold = Hold(self._folder / MARKER, shared=True)

    def load(self, phase: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Loads the checkpoint of a phase; returns None if there is none or it cannot be read."""
        path = self._folder / f"{phase}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                values: dict[str, Any] = json.loads(file.metadata()["standing"])
                return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("Checkpoint %s cannot be read (%s); training starts over.", path, str(error))
            return None

    def clear(self) -> None:
        """Deletes the run's checkpoints, unless another process works on the same run."""
        if self._hold is not None:
            self._hold.close()
            self._hold = None
        discard_run(self._folder)


def discard_run(folder: Path) -> None:
    """Deletes a run's checkpoints, unless a process works on the run."""
    try:
        hold = Hold(folder / MARKER, shared=False)
    except BlockingIOError:
        return
    except OSError:  # nothing was saved
        hold = None
    discard(folder, FILES, MARKER)
    if hold is not None:
        hold.close()


def silent(*_: object) -> None:
    """Callback that does nothing."""


@dataclass(frozen=True)
class RunContext:
    """Whether a run skips unreadable images, its callbacks, and its checkpoint."""

    skip_bad: bool = False
    report: Report = silent
    on_epoch: OnEpoch = silent
    checkpoint: Checkpoint | None = None


QUIET = RunContext()
"""Context of a run that fails on unreadable images and has neither callbacks nor a checkpoint."""
