"""What a whole run is told once: what to leave out, whom to tell how it stands, and where it is noted to be resumed."""

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
"""In a run's folder: held by the runs that are at it."""
FILES = rf"(sweep|refit)\.safetensors|[0-9a-f]{{16}}|{MARKER}"
"""What a run's folder holds: checkpoints of its phases, and folders of further sweeps."""

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch; `on_epoch` gets it. A candidate that trains no more has NaN.

    Attributes:
        phase: `"sweep"` or `"refit"`.
        epoch: from 1.
        epochs: how many there will be at most.
        train_loss: mean loss of each candidate on the training part.
        validation_loss: of each candidate on the validation part, calibrated; empty in the refit.
        validation_accuracy: likewise, 0..1; of a multi-label task the share of answers that are right.
        candidates: what each is trained with.
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
    """The standing of one run by phase: killed, it goes on from there to the same artifact.

    `prepare` makes the folder that the run's own is in, before anything is written. `run` is the checkpoint of the
    whole run, where this is of a part.
    """

    def __init__(self, folder: Path, prepare: Callable[[], None] = lambda: None, run: Checkpoint | None = None) -> None:
        self._folder, self._prepare, self._run = folder, prepare, run or self
        self._hold: Hold | None = None

    def within(self, name: str) -> Checkpoint:
        """The standing of a part of the run, which goes when the run's does."""
        return Checkpoint(self._folder / name, self._prepare, self._run)

    def save(self, phase: str, tensors: Mapping[str, Tensor], standing: Mapping[str, Any]) -> None:
        """Replaces what was saved of a phase, whole or not at all."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        data = save(contiguous, metadata={"standing": json.dumps(standing)})
        self._prepare()
        self._run._take()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with written(self._folder / f"{phase}.safetensors") as unfinished:
            unfinished.write_bytes(data)

    def _take(self) -> None:
        """Makes the run's folder and holds it, so that `cache clear` leaves it."""
        if self._hold is None or not (self._folder / MARKER).exists():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._folder / MARKER).touch()
            self._hold = Hold(self._folder / MARKER, shared=True)

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
            log.warning("The standing of an earlier run in %s cannot be read (%s); it starts anew.", path, str(error))
            return None

    def clear(self) -> None:
        """Forgets the run, unless another is at it too."""
        if self._hold is not None:
            self._hold.close()
            self._hold = None
        discard_run(self._folder)


def discard_run(folder: Path) -> None:
    """Deletes a run's checkpoints, unless a run is at it."""
    try:
        hold = Hold(folder / MARKER, shared=False)
    except BlockingIOError:
        return
    except OSError:  # nothing was ever saved there
        hold = None
    discard(folder, FILES, MARKER)
    if hold is not None:
        hold.close()


def silent(*_: object) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class RunContext:
    """How a run treats images that cannot be read, whom it tells of its progress, and where it notes each epoch."""

    skip_bad: bool = False
    report: Report = silent
    on_epoch: OnEpoch = silent
    checkpoint: Checkpoint | None = None


QUIET = RunContext()
"""Refuses what cannot be read, tells nobody of its progress, and notes nothing."""
