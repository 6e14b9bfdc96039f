"""The mean over seeds with its spread, and how a number is written in its unit."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Literal, NamedTuple

from addenda.terminal import size

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


def shown(spread: Spread | None, unit: Unit = "%", sign: str = "") -> str:
    """The mean, and ± its spread where there are several seeds; bytes, and prices that are all the same, have none."""
    if spread is None:
        return NOTHING
    if spread.deviation is None or unit == "bytes" or (spread.deviation == 0 and unit != "%"):
        return number(spread.mean, unit, sign)
    return f"{number(spread.mean, unit, sign)} ± {number(spread.deviation, unit)}"
