"""Escapes untrusted text for terminals and spreadsheets, so that a label or a note cannot control either."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, bidirectional formatting characters, line separators and surrogates."""
FORMULA = ("=", "+", "-", "@")


def shown(text: str) -> str:
    """Escapes invisible and direction-changing characters as Python string literals do."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def shown_lines(text: str) -> str:
    """Escapes each line of a message; line breaks stay."""
    return "\n".join(map(shown, text.split("\n")))


def csv_row(cells: Iterable[Any]) -> list[Any]:
    """Escapes a CSV row for spreadsheets: text that starts like a formula is prefixed with `'`."""
    return [_cell(shown(cell)) if isinstance(cell, str) else cell for cell in cells]


def _cell(text: str) -> str:
    if not text.startswith(FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
