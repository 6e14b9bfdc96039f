"""Terminal output: tables for people, JSON for programs, progress bars with the remaining time."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from addenda.text import shown, shown_lines

console = Console(markup=False, highlight=False)
if console.width < 1:  # COLUMNS=0
    console.width = 80
WORD = 16
"""Length up to which a table does not break words, in characters."""

SCORES = {
    "single-label": {"accuracy": "accuracy", "balanced_accuracy": "balanced", "calibration_error": "calibration error"},
    "multi-label": {
        "mean_average_precision": "mAP",
        "f1_micro": "F1",
        "exact_match": "exact match",
        "calibration_error": "calibration error",
    },
}
"""The displayed metrics of each objective, and their titles."""

PER_CLASS = {"single-label": ("accuracy", "class"), "multi-label": ("average precision", "label")}
"""The metric in `per_class` for each objective, and what it is listed by."""


def print_json(value: Any) -> None:
    """Prints a value as JSON on standard output, if it is open."""
    if sys.stdout is None:
        return
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8, or another encoding of the terminal
        text = json.dumps(value, indent=2)
    sys.stdout.write(text + "\n")


def print_result(as_json: bool, value: Any, *views: RenderableType) -> None:
    """Prints a value as JSON, or else its views for people."""
    if as_json:
        print_json(value)
        return
    for view in views:
        console.print(view)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]],
    right: Sequence[str] = (), whole: Sequence[str] = (),
) -> Group:  # fmt: skip
    """A table of plain text. Columns in `right` are right-aligned; cells of columns in `whole` are never wrapped.

    Other columns wrap between words of up to WORD characters. If the terminal is too narrow for that, each row becomes
    a list of its cells.
    """
    grid = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    cells = [[cell if isinstance(cell, Text) else Text(shown(str(cell))) for cell in row] for row in rows]
    widths, least = [], []
    for number, column in enumerate(columns):
        text = "\n".join([column, *(row[number].plain for row in cells)])
        words = [cell_len(word) for word in text.split() if len(word) <= WORD]
        widths.append(max(map(cell_len, text.split("\n"))))
        least.append(widths[-1] if column in whole else max(words, default=0))
    room = console.width - 2 * len(columns)
    heading = Text(shown(title), "bold")  # rich would wrap the table's own title to the table's width
    if sum(least) > room:
        blocks = [
            Text("\n").join(
                Text.assemble(f"{column}: " if column else "", cell) for column, cell in pairs if cell.plain
            )
            for pairs in (zip(columns, row, strict=True) for row in cells)
        ]
        return Group(heading, Text("\n\n").join(blocks))
    while sum(widths) > room:  # the widest columns wrap; rich would cut off the last one
        widest = max(range(len(widths)), key=lambda number: widths[number] - least[number])
        widths[widest] -= 1
    for column, width in zip(columns, widths, strict=True):
        side: Literal["left", "right"] = "right" if column in right else "left"
        grid.add_column(column, justify=side, overflow="fold", no_wrap=column in whole, width=width)
    for row in cells:
        grid.add_row(*row)
    return Group(heading, grid)


def percent(value: float | None) -> str:
    """A fraction in percent: 0.8412 -> 84.1; None -> a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def minute(time: str) -> str:
    """A registry timestamp to the minute: 2026-01-31T12:00:59.123456 -> 2026-01-31 12:00."""
    return time[:16].replace("T", " ")


def size(num_bytes: float) -> str:
    """A number of bytes with a readable unit."""
    return decimal(round(num_bytes)).replace("bytes", "B").replace("byte", "B")


class _EscapingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown_lines(super().format(record))


@contextmanager
def show_log(quiet: bool = False) -> Iterator[None]:
    """Prints the package's log on standard error, only warnings if `quiet`."""
    logger, handler = logging.getLogger("addenda"), logging.StreamHandler()
    handler.setFormatter(_EscapingFormatter("%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a progress bar per activity; yields the function to call with (activity, done, total)."""
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )
    bar_of: dict[str, Any] = {}

    def report(activity: str, done: int, total: int) -> None:
        key = activity.partition(",")[0]
        bars.start()
        if key not in bar_of:
            bar_of[key] = bars.add_task(activity, total=total)
        elif done < bars.tasks[bar_of[key]].completed:
            bars.reset(bar_of[key], total=total)
        bars.update(bar_of[key], description=activity, completed=done, total=total)

    try:
        yield report
    finally:
        if bars.live.is_started:
            bars.stop()
