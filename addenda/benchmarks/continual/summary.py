"""The columns that methods are compared by, each the mean over seeds and its spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from addenda.benchmarks.continual.results import Cell, Results
from addenda.terminal import size

OURS = "addenda"
"""The method whose promise the report is about."""

NOTHING = "–"

Unit = Literal["%", "bytes", "s", "passes", "plain"]


class Spread(NamedTuple):
    """The mean over seeds and the standard deviation (of a sample); with one seed there is none."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of what was measured; None where nothing was."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None)


def number(value: float, unit: Unit, sign: str = "") -> str:
    """A value in its unit; "+" shows the sign of a difference. Fractions are shown in percent."""
    if unit == "bytes":
        return ("-" if value < 0 else sign) + size(abs(value))
    digits = {"%": 1, "s": 1, "passes": 2, "plain": 3}[unit]
    rounded = round(100 * value if unit == "%" else value, digits) + 0.0  # no "-0.0"
    return f"{rounded:{sign}.{digits}f}"


def shown(spread: Spread | None, unit: Unit) -> str:
    """The mean, and ± its spread where there are several seeds; bytes, and prices that are all the same, have none."""
    if spread is None:
        return NOTHING
    if spread.deviation is None or unit == "bytes" or (spread.deviation == 0 and unit != "%"):
        return number(spread.mean, unit)
    return f"{number(spread.mean, unit)} ± {number(spread.deviation, unit)}"


@dataclass(frozen=True)
class Column:
    """One figure of a cell: its key for programs, its title for people, its unit, and how a cell gives it."""

    key: str
    title: str
    unit: Unit
    of: Callable[[Cell], float | None]

    def spread(self, cells: Iterable[Cell]) -> Spread | None:
        """Over a method's cells."""
        return Spread.of(map(self.of, cells))

    def text(self, cells: Iterable[Cell]) -> str:
        """The same, as people read it."""
        return shown(self.spread(cells), self.unit)


AVERAGE_TOLD = Column(
    "average_accuracy_told", "average accuracy, told, %", "%", lambda c: c.told_metrics.average_accuracy
)
AVERAGE_UNTOLD = Column(
    "average_accuracy_untold", "average accuracy, untold, %", "%", lambda c: c.untold_metrics.average_accuracy
)
INCREMENTAL = Column(
    "average_incremental_accuracy_untold",
    "average incremental accuracy, untold, %",
    "%",
    lambda c: c.untold_metrics.average_incremental_accuracy,
)
FORGETTING_TOLD = Column("forgetting_told", "forgetting, told, points", "%", lambda c: c.told_metrics.forgetting)
FORGETTING_UNTOLD = Column(
    "forgetting_untold", "forgetting, untold, points", "%", lambda c: c.untold_metrics.forgetting
)
STORED = Column("stored_bytes", "stored per task", "bytes", lambda c: c.stored_bytes)
TRAINING = Column("train_seconds", "training seconds", "s", lambda c: sum(c.train_seconds))
INFERENCE = Column("relative_inference", "inference, passes", "passes", lambda c: c.relative_inference)
CHANGED = Column("changed_decisions", "answers changed, %", "%", lambda c: c.changed_decisions)

QUALITY = (AVERAGE_TOLD, AVERAGE_UNTOLD, INCREMENTAL, FORGETTING_TOLD, FORGETTING_UNTOLD)
PRICE = (STORED, TRAINING, INFERENCE)


def exactness(cells: Iterable[Cell]) -> str:
    """Whether old tasks' logits kept every byte in all seeds, or the most that one moved."""
    cells = list(cells)
    if not any(cell.comparisons for cell in cells):
        return "nothing to compare"
    if all(cell.identical for cell in cells):
        return "identical"
    most = max((cell.max_difference for cell in cells), key=lambda value: (math.isnan(value), value))
    return f"moves by {most:.2g}"


def verdict(results: Results) -> str:
    """One sentence: whether our method kept its promise; without it, which method answers best untold."""
    cells = results.of(OURS)
    if not cells:
        means = ((AVERAGE_UNTOLD.spread(results.of(note.name)), note.label) for note in results.methods)
        spread, label = max((spread, label) for spread, label in means if spread is not None)
        return f"{label}: the highest average accuracy, untold, {shown(spread, AVERAGE_UNTOLD.unit)} %."
    label = next(note.label for note in results.methods if note.name == OURS)
    seeds = "the one seed" if len(cells) == 1 else f"all {len(cells)} seeds"
    moved = sum(not cell.identical for cell in cells)
    told, untold = (column.text(cells) for column in (FORGETTING_TOLD, FORGETTING_UNTOLD))
    kept = {
        "nothing to compare": "one experience alone, so no old task's logits to compare",
        "identical": f"old tasks' logits identical, byte for byte, in {seeds}",
    }.get(exactness(cells), f"old tasks' logits MOVED in {moved} of {len(cells)} seeds ({exactness(cells)})")
    return f"{label}: {kept}; forgetting {told} points told, {untold} untold."
