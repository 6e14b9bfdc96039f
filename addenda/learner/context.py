"""What a whole run is told once, rather than layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class RunContext:
    """How a run treats images that cannot be read, and whom it tells of its progress.

    Attributes:
        skip_bad: leave such images out, rather than refuse.
        report: told of the progress.
    """

    skip_bad: bool = False
    report: Report = silent


QUIET = RunContext()
"""Refuses what cannot be read, and tells nobody of its progress."""
