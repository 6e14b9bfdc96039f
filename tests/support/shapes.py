"""A plugin of pytest: each shape in a signature is checked in each call, and each such signature must be met.

`PYTEST_PLUGINS=tests.support.shapes` turns it on; it takes about as long as the calls themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from operator import attrgetter
from typing import Any

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

from tests.support.places import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(ROOT.glob("addenda/**/*.py"))
    if "from jaxtyping import" in path.read_text() and path.parent.name != "exporting"
]
"""All that state shapes, but for what torch traces, which follows no checker."""

SHAPED: set[tuple[str, str]] = set()
"""Modules and qualified names of functions whose signatures have shapes."""
CALLED: set[tuple[str, str]] = set()
"""Those of them that were called, by any of the processes."""


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks types and shapes in each call, and notes that there was one."""
    check = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
    if "jaxtyping." not in str(function.__annotations__):
        return check
    name = (function.__module__, function.__qualname__)
    SHAPED.add(name)

    @wraps(function)
    def noted(*arguments: object, **options: object) -> object:
        CALLED.add(name)
        return check(*arguments, **options)

    return noted


def _abstract(module: str, name: str) -> bool:
    found = None if "<locals>" in name else attrgetter(name)(sys.modules[module])
    return getattr(found, "__isabstractmethod__", False)


def _never_called() -> list[str]:
    return [".".join(name) for name in sorted(SHAPED - CALLED) if not _abstract(*name)]


def pytest_load_initial_conftests() -> None:
    install_import_hook(MODULES, f"{__name__}.checked")


def pytest_sessionstart() -> None:
    for module in MODULES:
        import_module(module)


def pytest_testnodedown(node: Any) -> None:
    told = getattr(node, "workeroutput", {})  # one that crashed tells nothing
    SHAPED.update(map(tuple, told.get("shaped", ())))
    CALLED.update(map(tuple, told.get("called", ())))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput |= {"shaped": [*SHAPED], "called": [*CALLED]}
    elif _never_called():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"{len(CALLED)} signatures with shapes were met")
    for name in _never_called():
        terminalreporter.line(f"never called: {name}")
