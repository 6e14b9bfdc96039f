"""Text for people: escaped, numbers with nouns, how mappings differ, and what long work will take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, bidirectional formatting characters, line separators and surrogates."""
FORMULA = ("=", "+", "-", "@")
NOTABLE_S = 5.0
"""Seconds from which work that lies ahead is announced."""


def shown(text: str) -> str:
    """Escapes invisible and direction-changing characters as Python string literals do."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def shown_lines(text: str) -> str:
    """Escapes each line of a message; line breaks stay."""
    return "\n".join(map(shown, text.split("\n")))


def plural(number: int, noun: str) -> str:
    """A number with its noun: 1, "task" -> 1 task; 2, "task" -> 2 tasks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def estimate(noun: str, total: int, done: int, seconds: float) -> str:
    """Says what the rest of `total` units takes, when the first `done` took some seconds; empty if that is soon."""
    rest = (total - done) * seconds / done
    if rest < NOTABLE_S:
        return ""
    rate = done / seconds
    speed = f"at {rate:.{0 if rate >= 10 else 1}f} per second" if rate >= 0.1 else f"at {duration(1 / rate)} each"
    return f"{total} {noun} {speed}: about {duration(rest)}."


def duration(seconds: float) -> str:
    """A duration in a readable unit: 41 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], separator: str = "."
) -> list[tuple[str, Any, Any]]:
    """(key, first value, second value) wherever two nested mappings differ; lists are compared as values."""
    firsts, seconds = dict(flattened(first)), dict(flattened(second))
    pairs = {path: (firsts.get(path), seconds.get(path)) for path in firsts | seconds}
    return [(separator.join(path), value, other) for path, (value, other) in pairs.items() if value != other]


def flattened(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values of nested mappings with the keys that lead to them."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from flattened(inner, (*path, key))
        else:
            yield (*path, key), inner


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
