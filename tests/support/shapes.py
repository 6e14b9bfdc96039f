"""A pytest plugin that checks shape annotations at every call and fails if an annotated function is never called.

`PYTEST_PLUGINS=tests.support.shapes` enables it; the checks take about as long as the calls themselves.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from operator import attrgetter
from typing import Any

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

from tests.support.places import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(ROOT.glob("addenda/**/*.py"))
    if "from jaxtyping import" in path.read_text() and path.parent.name != "exporting"
]
"""All modules with shape annotations except those that torch traces, because tracing cannot pass a checker."""

SHAPED: set[tuple[str, str]] = set()
"""Modules and qualified names of functions with shape annotations."""
CALLED: set[tuple[str, str]] = set()
"""Those that were called, in any of the processes."""


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function with shape annotations so that each call checks types and shapes and is recorded."""
    if "jaxtyping." not in str(function.__annotations__):
        return function
    check = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
    name = (function.__module__, function.__qualname__)
    SHAPED.add(name)

    @wraps(function)
    def noted(*arguments: object, **options: object) -> object:
        CALLED.add(name)
        return check(*arguments, **options)

    return noted


def _abstract(module: str, name: str) -> bool:
    function = None if "<locals>" in name else attrgetter(name)(sys.modules[module])
    return getattr(function, "__isabstractmethod__", False)


def _never_called() -> list[str]:
    return [".".join(name) for name in sorted(SHAPED - CALLED) if not _abstract(*name)]


_jaxtyped = jaxtyping.jaxtyped


def jaxtyped(typechecker: Any) -> Callable[[Any], Any]:
    """Stands in for jaxtyping's decorator, whose bookkeeping doubles the time of functions that have no shapes."""

    def decorate(each: Any) -> Any:
        words = re.findall(r"\w+", "" if isinstance(each, type) else str(each.__annotations__))
        shaped = isinstance(each, type) or any("jaxtyping." in str(each.__globals__.get(word)) for word in words)
        return _jaxtyped(each, typechecker=typechecker) if shaped else each

    return decorate


def pytest_load_initial_conftests() -> None:
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
    install_import_hook(MODULES, f"{__name__}.checked")


def pytest_sessionstart() -> None:
    for module in MODULES:
        import_module(module)


def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})  # missing if the worker crashed
    SHAPED.update(map(tuple, output.get("shaped", ())))
    CALLED.update(map(tuple, output.get("called", ())))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput |= {"shaped": [*SHAPED], "called": [*CALLED]}
    elif _never_called():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"{len(CALLED)} functions with shape annotations were called")
    for name in _never_called():
        terminalreporter.line(f"never called: {name}")
