"""Reading records imports no framework, whose import would take longer than the read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import DATA

FRAMEWORKS = {"torch", "numpy", "timm", "sklearn", "safetensors", "alembic"}


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
    registry = shutil.copy(DATA / "five-tasks.db", tmp_path / "tasks.db")
    script = (
        f"import sys; sys.argv = ['addenda', *{command!r}, '--registry', {str(registry)!r}]\n"
        "from addenda.cli import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code\n"
        f"heavy = {FRAMEWORKS!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
