"""Runs commands in the test process and returns exit code, output and errors."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def addenda(*arguments: object) -> Result:
    """Runs `addenda` in the test process."""
    from addenda import cli

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["addenda", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return Result(int(stopped.value.code or 0), out.getvalue(), err.getvalue())
