"""Texts meant to deceive: terminal control sequences, formulas, names that no database can store."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from addenda import FrozenBackbone, Registry, Task
from addenda.combined import golden
from addenda.exceptions import IntegrityError, RegistryError
from addenda.registry.audit.faults import Fault
from addenda.text import csv_row, shown
from tests.support.commands import Run
from tests.support.databases import tamper
from tests.support.tasks import random_task

TRICK = "fine\x1b[1A\x1b[2K\u202egnihton\u2066 \x9b31m\r\x00"


def test_terminal_control_sequences_are_escaped() -> None:
    assert shown(TRICK) == r"fine\x1b[1A\x1b[2K\u202egnihton\u2066 \x9b31m\r\x00"
    plain = "Ünïcödé, 漢字, 👩‍👩‍👧, עברית, tab none"
    assert shown(plain) == plain


def test_csv_cells_are_not_formulas_and_numbers_stay_numbers() -> None:
    row = ["=HYPERLINK(1)", "+1", "-2.5", "@SUM", "-bird", "cat", 0.5, "a\nb"]
    assert csv_row(row) == ["'=HYPERLINK(1)", "+1", "-2.5", "'@SUM", "'-bird", "cat", 0.5, r"a\nb"]


def test_notes_reasons_and_labels_are_escaped_in_a_terminal_and_unchanged_in_json(
    run: Run, tiny: FrozenBackbone, registered: Callable[..., Task], registry: Registry
) -> None:
    trick = TRICK.replace("\x00", "")
    registered("plain")
    registry.note("plain", trick)
    registry.add_backbone(tiny.record())
    task = replace(random_task(tiny, "labelled"), labels=(trick, "=cmd|' /C calc'!A0", "c"))
    registry.register(task, golden(tiny, task))
    registry.retire("plain", trick)
    for command in (("db", "log"), ("tasks", "show", "labelled"), ("tasks", "show", "plain:1"), ("tasks", "list", "*")):
        out = run(*command).out
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066]", out), command
    assert r"\x1b[1A" in run("db", "log").out
    assert json.loads(run("db", "log", "--json").out)[-1]["details"]["reason"] == trick


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_notes_and_reasons_that_no_database_can_store_are_rejected(full_book: Registry, text: str) -> None:
    generation = full_book.generation
    for change in (lambda: full_book.note("digits", text), lambda: full_book.retire("digits", text)):
        with pytest.raises(
            RegistryError, match=r"The (note|reason) (contains a NUL character|cannot be encoded as UTF-8)"
        ):
            change()
    assert full_book.generation == generation


def test_an_invalid_task_name_is_detected_by_backup_and_verification(full_book: Registry, tmp_path: Path) -> None:
    tamper(full_book, "task", "UPDATE task SET name = '../strokes' WHERE name = 'strokes'")
    report = full_book.check_integrity()
    assert Fault("../strokes:1", "has an invalid name") in report.faults
    with pytest.raises(IntegrityError, match=r"damaged"):
        full_book.backup(tmp_path / "copy.db")
