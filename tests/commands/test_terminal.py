"""Tables for people: words are not broken if the terminal is wide enough, and never cut."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from addenda import Registry, terminal
from addenda.commands.checkup import Finding
from addenda.commands.verify import doctor
from tests.support.commands import Run
from tests.support.places import ROOT

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


def test_in_a_narrow_terminal_each_row_is_a_list_of_all_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "console", Console(file=(out := StringIO()), width=20))
    columns, row = ("#", "when", "who", "", "details"), ("7", "2026-01-31 12:00", "ada", "ok", "a note of some length")
    terminal.console.print(terminal.table("Events", columns, [row, row], whole=("when",)))
    printed = out.getvalue()
    assert max(map(len, printed.splitlines())) <= 20
    words = printed.replace("\n", " ").split()
    assert [word for word in words if word in {"#:", "when:", "who:", "details:", "ok"}] == [
        "#:", "when:", "who:", "ok", "details:",
    ] * 2  # fmt: skip


def test_a_width_of_zero_is_no_width(tmp_path: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-c", "from addenda import terminal; print(terminal.console.width)"],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "0"}, check=True, cwd=ROOT,
    )  # fmt: skip
    assert listed.stdout.strip() == "80"


def test_without_standard_output_json_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    terminal.print_json({"a": 1})


@pytest.mark.parametrize("folder", ["[/red]", "v[red]"])
def test_a_path_is_not_markup(run: Run, tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    location = tmp_path / folder / "a.db"
    Registry.open(location).close()
    listed = run("tasks", "list", "zzz", "--registry", location)
    assert (listed.code, f"0 tasks in {location}" in listed.out.replace("\n", "")) == (0, True), listed


@pytest.mark.parametrize(
    "words",
    [
        ("serve", "--cache-mb", "inf"), ("serve", "--timeout", "nan"), ("serve", "--drain", "inf"),
        ("db", "log", "--after", "9" * 20), ("db", "log", "--limit", "9" * 20), ("tasks", "list", "--limit", "9" * 19),
    ],
)  # fmt: skip
def test_numbers_that_nothing_can_hold_are_refused(run: Run, words: tuple[str, ...]) -> None:
    refused = run(*words)
    assert refused.code == 2
    assert "This is a bug" not in refused.err


def test_doctor_keeps_its_details_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "console", Console(file=(out := StringIO()), width=80))
    subject = "exactness of vit_tiny_patch16_224.augreg_in21k_ft_in1k with the registry's tasks"
    monkeypatch.setattr("addenda.commands.checkup.checkup", lambda *_: [Finding(subject, "ok", "one detail")])
    doctor("addenda.db", "cpu")
    assert "one detail" in out.getvalue()
