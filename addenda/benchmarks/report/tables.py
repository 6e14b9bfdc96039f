"""The tables of a report: one form for all benchmarks, written as Markdown here and as HTML by `templates/`."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from addenda import terminal


class Table(NamedTuple):
    """Cells as texts, or as Markup where they are Markdown already.

    Attributes:
        columns: their heads.
        rows: each as many cells.
        num_left: so many columns are aligned to the left, the others to the right.
        ours: the row of our method.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_left: int = 1
    ours: int | None = None


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
