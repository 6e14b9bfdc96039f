"""Commands import nothing that they do not use, whose import would take longer than their work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

import pytest
from PIL import Image

from tests.support.places import DATA

FRAMEWORKS = {"torch", "numpy", "timm", "sklearn", "safetensors", "alembic"}
LEARNING = {"scipy", "sklearn", "torchmetrics", "addenda.learner"}


@pytest.mark.parametrize(
    "command",
    [
        ("tasks", "list"),
        ("tasks", "list", "--json"),
        ("tasks", "show", "adapted"),
        ("tasks", "show", "adapted", "--json"),
        ("tasks", "lineage", "fours"),
        ("tasks", "tag", "fours", "seen"),
        ("db", "log"),
    ],
    ids=" ".join,
)
def test_reading_records_imports_no_framework(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert run_without(FRAMEWORKS, command, tmp_path)


@pytest.mark.slow
def test_verifying_and_predicting_import_nothing_of_learning(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(image := tmp_path / "one.png")
    assert "5 tasks verified" in run_without(LEARNING, ("verify",), tmp_path)
    assert "fours" in run_without(LEARNING, ("predict", str(image)), tmp_path)


def run_without(packages: Set[str], command: tuple[str, ...], folder: Path) -> str:
    """The output of a command on the registry of five tasks, whose interpreter must not import the packages."""
    registry = shutil.copy(DATA / "five-tasks.db", folder / "tasks.db")
    script = (
        f"import sys; sys.argv = ['addenda', *{command!r}, '--registry', {str(registry)!r}]\n"
        "from addenda.cli import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code\n"
        f"heavy = {packages!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
