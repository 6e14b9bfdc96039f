"""Other people's words, as a terminal and a spreadsheet may show them: a label or a note commands neither."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that turn the direction of writing, ends of lines, and halves of characters."""
FORMULA = ("=", "+", "-", "@")


def shown(text: str) -> str:
    """A text in which every character that is not seen, or moves others, is written as Python would escape it."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shown_lines(text: str) -> str:
    """The same of each line of a message."""
    return "\n".join(map(shown, text.split("\n")))


def csv_row(cells: Iterable[Any]) -> list[Any]:
    """A row of CSV that a spreadsheet shows and does not run: before a text that begins as a formula stands `'`."""
    return [_cell(shown(cell)) if isinstance(cell, str) else cell for cell in cells]


def _cell(text: str) -> str:
    if not text.startswith(FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
