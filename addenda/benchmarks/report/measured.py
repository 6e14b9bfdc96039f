"""What a benchmark has measured beside its targets; as a table for each group, and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from addenda.benchmarks.report.tables import Table, markdown, show, write_json
from addenda.terminal import console


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


def write(
    name: str, title: str, figures: Sequence[Figure], details: Mapping[str, Any], out: Path | None, said: str = ""
) -> None:
    """Prints the tables and what is said below them; with a folder, writes them there as NAME.md and NAME.json."""
    console.print(title, highlight=False)
    text = f"`{details['command']}`\n\n{title}\n"
    for group in dict.fromkeys(figure.group for figure in figures):
        table = table_of([figure for figure in figures if figure.group == group])
        show(group, table)
        text += f"\n**{group}**\n\n{markdown(table)}"
    if said:
        console.print(said, highlight=False)
        text += f"\n{said}\n"
    if out is not None:
        report = {"figures": [asdict(figure) | {"met": figure.met} for figure in figures], **details}
        write_json(out / f"{name}.json", report)
        (out / f"{name}.md").write_text(text)
        console.print(f"Written to {out}: {name}.json, {name}.md.")


def table_of(figures: Sequence[Figure]) -> Table:
    """The figures of a group; a column that has nothing to say is left out."""
    columns = ("what", "measured", "quartiles", "target", "met", "by operations")
    rows = [_cells(figure) for figure in figures]
    kept = [place for place, column in enumerate(columns) if column != "by operations" or any(row[-1] for row in rows)]
    return Table([columns[place] for place in kept], [[row[place] for place in kept] for row in rows])


def _cells(figure: Figure) -> tuple[str, ...]:
    def shown(value: float) -> str:
        return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"

    target = "" if figure.target is None else f"{'≥' if figure.more else '≤'} {figure.target:g} {figure.unit}"
    between = "" if figure.low is None or figure.high is None else f"{shown(figure.low)}–{shown(figure.high)}"
    met = {None: "", True: "yes", False: "no"}[figure.met]
    limit = "" if figure.limit is None else shown(figure.limit)
    return figure.what, f"{shown(figure.measured)} {figure.unit}", between, target, met, limit
