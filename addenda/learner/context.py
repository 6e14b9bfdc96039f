"""What a whole run is told once rather than layer by layer: what to leave out, and whom to tell how it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from addenda.learner.config import Settings

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


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


def silent(*_: object) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class RunContext:
    """How a run treats images that cannot be read, and whom it tells of its progress.

    Attributes:
        skip_bad: leave such images out, rather than refuse.
        report: told of the progress.
        on_epoch: called after each epoch.
    """

    skip_bad: bool = False
    report: Report = silent
    on_epoch: OnEpoch = silent


QUIET = RunContext()
"""Refuses what cannot be read, and tells nobody of its progress."""
