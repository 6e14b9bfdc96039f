"""What the command line shows: tables for people, JSON for programs, progress with the time left."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from addenda.text import shown, shown_lines

console = Console()
WORD = 16

SCORES = {
    "single-label": {"accuracy": "accuracy", "balanced_accuracy": "balanced", "calibration_error": "calibration error"},
    "multi-label": {
        "mean_average_precision": "mAP",
        "f1_micro": "F1",
        "exact_match": "exact match",
        "calibration_error": "calibration error",
    },
}
"""What is shown of the metrics of each objective, and what it is called."""

PER_CLASS = {"single-label": ("accuracy", "class"), "multi-label": ("average precision", "label")}
"""What `per_class` of the metrics of each objective holds, and for each of what."""


def print_json(value: Any) -> None:
    """Prints a value as JSON on standard output, nothing else with it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8, or a terminal that has fewer letters
        text = json.dumps(value, indent=2)
    sys.stdout.write(text + "\n")


def answer(as_json: bool, value: Any, *shown: RenderableType) -> None:
    """Prints a value as JSON for programs, or else what is shown to people."""
    if as_json:
        print_json(value)
        return
    for one in shown:
        console.print(one)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]],
    right: Sequence[str] = (), whole: Sequence[str] = (),
) -> Group:  # fmt: skip
    """A table of plain texts; columns in `right` are aligned to the right, those in `whole` never broken.

    Where the terminal is narrow, words of up to WORD characters stay whole if it is not too narrow for that.
    """
    made = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    cells = [[cell if isinstance(cell, Text) else Text(shown(str(cell))) for cell in row] for row in rows]
    widths = []
    for number, column in enumerate(columns):
        words = " ".join([column, *(row[number].plain for row in cells)]).split()
        widths.append(max((len(word) for word in words if len(word) <= WORD), default=0))
    fits = sum(widths) + 2 * len(widths) <= console.width
    for column, width in zip(columns, widths, strict=True):
        side: Literal["left", "right"] = "right" if column in right else "left"
        least = width if fits else None
        made.add_column(column, justify=side, overflow="fold", no_wrap=column in whole, min_width=least)
    for row in cells:
        made.add_row(*row)
    return Group(Text(shown(title), "bold"), made)  # a title of the table's own would be as narrow as the table


def percent(value: float | None) -> str:
    """0.8412 -> 84.1; nothing measured -> a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def plural(number: int, noun: str) -> str:
    """1, "task" -> 1 task; 2 -> 2 tasks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def minute(time: str) -> str:
    """A time of the registry's as tables show it: 2026-01-31T12:00:59.123456 -> 2026-01-31 12:00."""
    return time[:16].replace("T", " ")


def size(num_bytes: float) -> str:
    """Bytes in the unit that reads best."""
    return decimal(round(num_bytes)).replace("bytes", "B").replace("byte", "B")


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown_lines(super().format(record))


@contextmanager
def show_log(quiet: bool = False) -> Iterator[None]:
    """Shows what the package logs on standard error, a line each; only warnings where it should be quiet."""
    logger, handler = logging.getLogger("addenda"), logging.StreamHandler()
    handler.setFormatter(_Shown("%(message)s"))
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
    """Shows one bar for each thing being done; gives the function to call with (what, done, total)."""
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )
    known: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        key = what.partition(",")[0]
        bars.start()
        if key not in known:
            known[key] = bars.add_task(what, total=total)
        elif done < bars.tasks[known[key]].completed:
            bars.reset(known[key], total=total)
        bars.update(known[key], description=what, completed=done, total=total)

    try:
        yield report
    finally:
        if bars.live.is_started:
            bars.stop()
