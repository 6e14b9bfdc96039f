"""Tables for people: words are not broken if the terminal is wide enough, and never cut."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from addenda import terminal

ROWS = [("airplane-bird:1", "accuracy", "identical, byte for byte, to what was registered under the same numerics")]


@pytest.mark.parametrize(("width", "whole"), [(200, True), (80, True), (60, True), (24, False)])
def test_words_are_broken_only_in_narrow_terminals(width: int, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "console", Console(file=(out := StringIO()), width=width))
    terminal.console.print(terminal.table("Verified", ("task", "score", "result"), ROWS))
    words = out.getvalue().split()
    assert max(map(len, out.getvalue().splitlines())) <= width
    assert {"airplane-bird:1", "accuracy", "identical,", "numerics"} <= {*words} or not whole
    assert out.getvalue().count("y") == 3, "letters are lost"
