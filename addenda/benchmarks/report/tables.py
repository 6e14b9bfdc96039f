"""The tables of a report: one form for all benchmarks, written as Markdown here and as HTML by `templates/`."""

from __future__ import annotations

import html
import json
import re
import statistics
import textwrap
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from addenda import terminal
from addenda.terminal import console, size


class Table(NamedTuple):
    """Cells as texts, or as Markup where they are Markdown already."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_left: int = 1  # so many columns are aligned to the left, the others to the right
    ours: int | None = None  # the row of our method


def markdown(table: Table) -> Markup:
    """A table in Markdown, a line each row."""
    rule = ["---" if place < table.num_left else "---:" for place in range(len(table.columns))]
    lines = [map(escaped, table.columns), rule, *(map(escaped, row) for row in table.rows)]
    return Markup("".join(f"| {' | '.join(line)} |\n" for line in lines))


def escaped(text: Any) -> str:
    """Text that Markdown, and the HTML in it, show as it is."""
    if hasattr(text, "__html__"):
        return str(text)
    return re.sub(r"([\\`*_\[\]|$~])", r"\\\1", html.escape(str(text), quote=False)).replace("\n", " ")


def show(title: str, table: Table) -> None:
    """Prints a table."""
    terminal.console.print(terminal.table(title, table.columns, table.rows, right=table.columns[table.num_left :]))


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes results for programs."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


NOTHING = "–"

Unit = Literal["%", "bytes", "s", "passes", "plain"]


@dataclass(frozen=True, order=True)
class Spread:
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


def write_pages(name: str, content: Mapping[str, Any], folder: Path) -> None:
    """Writes report.md and report.html, which show the same, by the templates of a name."""
    for kind in ("md", "html"):
        # Markdown is escaped by `finalize`, before HTML's own way, which leaves Markup alone.
        made = Environment(
            loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined,
            finalize=(lambda value: Markup(escaped(value))) if kind == "md" else None,
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        )  # fmt: skip
        made.filters |= {"base64": lambda data: b64encode(data).decode(), "block": _block, "markdown": markdown}
        text = made.get_template(f"{name}.{kind}.j2").render(content)
        (folder / f"report.{kind}").write_text(text, encoding="utf-8")


def _block(text: str) -> Markup:
    """A block of code by indentation, which no content can end."""
    return Markup(textwrap.indent(text, "    ", lambda line: True))


@dataclass(frozen=True)
class Figure:
    """One thing that was measured."""

    group: str  # the table that it stands in: a database and its version, or so many tasks
    what: str
    unit: str
    measured: float  # the median
    low: float | None = None  # first quartile, None of what was measured once
    high: float | None = None  # third quartile
    target: float | None = None  # of the design; None where it sets none
    more: bool = False  # whether more is better
    limit: float | None = None  # what it would be if multiply-adds alone took time, and all went at one speed

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
    """The figures of a group; the last column is there only where it has something to say."""
    columns = ("what", "measured", "quartiles", "target", "met", "by operations")
    shown = len(columns) if any(figure.limit is not None for figure in figures) else -1
    return Table(columns[:shown], [_cells(figure)[:shown] for figure in figures])


def _cells(figure: Figure) -> tuple[str, ...]:
    def shown(value: float) -> str:
        return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"

    target = "" if figure.target is None else f"{'≥' if figure.more else '≤'} {figure.target:g} {figure.unit}"
    between = "" if figure.low is None or figure.high is None else f"{shown(figure.low)}–{shown(figure.high)}"
    met = {None: "", True: "yes", False: "no"}[figure.met]
    limit = "" if figure.limit is None else shown(figure.limit)
    return figure.what, f"{shown(figure.measured)} {figure.unit}", between, target, met, limit
