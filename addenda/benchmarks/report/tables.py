"""Tables of the benchmark reports, as Markdown here and as HTML by `templates/`."""

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
    """A table; cells are text, or Markup if they are Markdown already."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_left: int = 1  # number of left-aligned columns; the others are right-aligned
    ours: int | None = None  # index of our method's row


def markdown(table: Table) -> Markup:
    """A table in Markdown, one line per row."""
    rule = ["---" if column < table.num_left else "---:" for column in range(len(table.columns))]
    lines = [map(escaped, table.columns), rule, *(map(escaped, row) for row in table.rows)]
    return Markup("".join(f"| {' | '.join(line)} |\n" for line in lines))


def escaped(text: Any) -> str:
    """Text escaped for Markdown and the HTML in it."""
    if hasattr(text, "__html__"):
        return str(text)
    return re.sub(r"([\\`*_\[\]|$~])", r"\\\1", html.escape(str(text), quote=False)).replace("\n", " ")


def show(title: str, table: Table) -> None:
    """Prints a table."""
    terminal.console.print(terminal.table(title, table.columns, table.rows, right=table.columns[table.num_left :]))


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes results as JSON."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


NOTHING = "–"

Unit = Literal["%", "bytes", "s", "passes", "plain"]


@dataclass(frozen=True, order=True)
class Spread:
    """Mean and sample standard deviation over seeds; one seed has no deviation."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Mean and deviation of the values that are not None; None if there are none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None)


def number(value: float, unit: Unit, sign: str = "") -> str:
    """Formats a value in its unit, fractions in percent; `sign="+"` shows the sign of a difference."""
    if unit == "bytes":
        return ("-" if value < 0 else sign) + size(abs(value))
    digits = {"%": 1, "s": 1, "passes": 2, "plain": 3}[unit]
    rounded = round(100 * value if unit == "%" else value, digits) + 0.0  # no "-0.0"
    return f"{rounded:{sign}.{digits}f}"


def shown(spread: Spread | None, unit: Unit = "%", sign: str = "") -> str:
    """Formats mean ± deviation; the deviation is omitted for one seed, for bytes and, except in percent, if it is 0."""
    if spread is None:
        return NOTHING
    if spread.deviation is None or unit == "bytes" or (spread.deviation == 0 and unit != "%"):
        return number(spread.mean, unit, sign)
    return f"{number(spread.mean, unit, sign)} ± {number(spread.deviation, unit)}"


def write_pages(name: str, content: Mapping[str, Any], folder: Path) -> None:
    """Renders the templates NAME.md.j2 and NAME.html.j2 to report.md and report.html, which have the same content."""
    for kind in ("md", "html"):
        # `finalize` escapes for Markdown and returns Markup, which autoescape then leaves as it is.
        environment = Environment(
            loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined,
            finalize=(lambda value: Markup(escaped(value))) if kind == "md" else None,
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        )  # fmt: skip
        environment.filters["markdown"] = markdown
        environment.filters["base64"] = lambda data: b64encode(data).decode()
        # A code block by indentation, which no content can terminate.
        environment.filters["block"] = lambda text: Markup(textwrap.indent(text, "    ", lambda line: True))
        text = environment.get_template(f"{name}.{kind}.j2").render(content)
        (folder / f"report.{kind}").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    group: str  # its table: a database and its version, or a number of tasks
    what: str
    unit: str
    measured: float  # the median, or the value if measured once
    low: float | None = None  # first quartile; None if measured once
    high: float | None = None  # third quartile
    target: float | None = None  # of the design
    more: bool = False  # whether higher is better
    limit: float | None = None  # value if time were proportional to multiply-adds

    @classmethod
    def of_rounds(
        cls, group: str, what: str, unit: str, values: Sequence[float], target: float | None = None, **more: Any
    ) -> Figure:
        """A measurement of several rounds, with median and quartiles."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(group, what, unit, median, low, high, target, **more)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        return self.measured >= self.target if self.more else self.measured <= self.target


def write(
    name: str, title: str, figures: Sequence[Figure], details: Mapping[str, Any], out: Path | None, summary: str = ""
) -> None:
    """Prints the tables and the summary below them; with `out`, writes them there as NAME.md and NAME.json."""
    console.print(title)
    text = f"`{details['command']}`\n\n{title}\n"
    for group in dict.fromkeys(figure.group for figure in figures):
        table = table_of([figure for figure in figures if figure.group == group])
        show(group, table)
        text += f"\n**{group}**\n\n{markdown(table)}"
    if summary:
        console.print(summary)
        text += f"\n{summary}\n"
    if out is not None:
        report = {"figures": [asdict(figure) | {"met": figure.met} for figure in figures], **details}
        write_json(out / f"{name}.json", report)
        (out / f"{name}.md").write_text(text)
        console.print(f"Written to {out}: {name}.json, {name}.md.")


def table_of(figures: Sequence[Figure]) -> Table:
    """The figures of a group as a table; the last column is omitted if it would be empty."""

    def digits(value: float | None) -> str:
        return "" if value is None else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"

    columns, rows = ("metric", "measured", "quartiles", "target", "met", "by operations"), []
    for figure in figures:
        quartiles = "" if figure.low is None else f"{digits(figure.low)}–{digits(figure.high)}"
        target = "" if figure.target is None else f"{'≥' if figure.more else '≤'} {figure.target:g} {figure.unit}"
        met = {None: "", True: "yes", False: "no"}[figure.met]
        measured = f"{digits(figure.measured)} {figure.unit}"
        rows.append((figure.what, measured, quartiles, target, met, digits(figure.limit)))
    end = len(columns) if any(figure.limit is not None for figure in figures) else -1
    return Table(columns[:end], [row[:end] for row in rows])
