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


def test_no_column_is_cut_off_when_the_table_is_just_wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "console", Console(file=(out := StringIO()), width=80))
    columns = ("method", "task-inc. %", "class-inc. %", "forgetting", "old logits", "per task", "train s", "passes")
    rows = [
        ("Addenda", "77.8", "62.7", "8.3", "identical", "1.8 MB", "21.4", "0.84"),
        ("streaming LDA", "63.5", "21.4", "25.0", "change by 18", "22.9 kB", "0.3", "1.00"),
    ]
    terminal.console.print(terminal.table("Accuracy", columns, rows, right=columns[1:]))
    printed = out.getvalue().split()
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert not {word for row in (columns, *rows) for cell in row for word in cell.split()} - {*printed}


def test_wide_characters_are_not_wrapped_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "console", Console(file=(out := StringIO()), width=80))
    terminal.console.print(terminal.table("Labels", ("label", "images"), [("柴犬と雪景色", 3)]))
    assert "柴犬と雪景色" in out.getvalue()
