"""`import addenda` provides every public name and loads no framework until one is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import addenda


def test_every_public_name_is_there_and_no_other() -> None:
    assert {"Augmentation", "TaskFilter", "Router", "exceptions"} <= {*addenda.__all__}
    for name in addenda.__all__:
        assert getattr(addenda, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="module 'addenda' has no attribute 'Memory'"):
        _ = addenda.Memory


def test_importing_addenda_starts_no_framework_and_knows_its_errors() -> None:
    script = (
        "import sys, addenda\n"
        "assert issubclass(addenda.exceptions.DataError, addenda.exceptions.AddendaError)\n"
        "assert not {'torch', 'timm', 'sqlalchemy', 'pydantic', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
