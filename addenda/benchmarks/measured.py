"""What a benchmark has measured beside its targets; as a table for each group, and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from addenda.terminal import console, table

COLUMNS = ("what", "measured", "quartiles", "target", "met")


@dataclass(frozen=True)
class Figure:
    """One thing that was measured.

    Attributes:
        group: the table that it stands in: a database and its version, or so many tasks.
        what: in words.
        unit: of all its numbers.
        measured: the median.
        low: first quartile, None of what was measured once.
        high: third quartile.
        target: of the design; None where it sets none.
        more: whether more is better.
        limit: what it would be if multiply-adds were all that takes time, and all went at one speed.
    """

    group: str
    what: str
    unit: str
    measured: float
    low: float | None = None
    high: float | None = None
    target: float | None = None
    more: bool = False
    limit: float | None = None

    @classmethod
    def of_rounds(
        cls, group: str, what: str, unit: str, values: Sequence[float], target: float | None = None, **more: Any
    ) -> Figure:
        """Median and quartiles of several rounds."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(group, what, unit, median, low, high, target, **more)

    @property
    def met(self) -> bool | None:
        """Whether the target is met."""
        if self.target is None:
            return None
        return self.measured >= self.target if self.more else self.measured <= self.target


def write(name: str, title: str, figures: Sequence[Figure], details: Mapping[str, Any], out: Path | None) -> None:
    """Prints the tables; with a folder, writes them there as NAME.md and NAME.json."""
    console.print(title, highlight=False)
    lines = [f"`{details['command']}`", "", title]
    for group in dict.fromkeys(figure.group for figure in figures):
        cells = [_cells(figure) for figure in figures if figure.group == group]
        console.print(table(group, COLUMNS, cells, right=COLUMNS[1:4]))
        rows = (COLUMNS, ("---", *["---:"] * 3, "---"), *cells)
        lines += ["", f"**{group}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
    if out is None:
        return
    report = {"figures": [asdict(figure) | {"met": figure.met} for figure in figures], **details}
    (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    console.print(f"Written to {out}: {name}.json, {name}.md.")


def _cells(figure: Figure) -> tuple[str, ...]:
    def shown(value: float) -> str:
        return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"

    target = "" if figure.target is None else f"{'≥' if figure.more else '≤'} {figure.target:g} {figure.unit}"
    between = "" if figure.low is None or figure.high is None else f"{shown(figure.low)}–{shown(figure.high)}"
    met = {None: "", True: "yes", False: "no"}[figure.met]
    return figure.what, f"{shown(figure.measured)} {figure.unit}", between, target, met
