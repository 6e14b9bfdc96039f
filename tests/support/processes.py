"""Processes of a test's own functions: another hash seed than ours, and SIGKILL at any statement of a change."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from itertools import count
from multiprocessing import forkserver
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event

from tests.support.databases import everything
from tests.support.places import ROOT

FORKS = multiprocessing.get_context("forkserver")
KILLED = -signal.SIGKILL


def start_another_interpreter() -> None:
    """Starts the interpreter from which processes are forked: what is slow to import is there, and hashes differ."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", seed)
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.set_forkserver_preload([__name__, "tests.support.registries", "psycopg", "hypothesis"])
        forkserver.ensure_running()


def exit_code(function: Callable[..., None], *arguments: object, timeout_s: float = 60) -> int | None:
    """Runs a module's function in a process; None where it does not end in time."""
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    process.join(timeout_s)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    return code


def all_at_once(function: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[int | None]:
    """Exit codes of processes that are let go together; the function takes a barrier after its arguments."""
    start = FORKS.Barrier(len(arguments))
    processes = [FORKS.Process(target=function, args=(*each, start)) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def killed_at_each_statement(change: Callable[..., None], location: str, *arguments: object) -> int:
    """Kills a process at each statement of its write transaction and at the commit, until it lives to the end.

    Nothing may be left of a change that was killed, and whoever comes next finds the registry free.

    Args:
        change: what the process does with the registry; a function of a module, so that another process finds it.
        location: of the registry.
        arguments: more for the change.

    Returns:
        How often it was killed. The change is made then.
    """
    before = everything(location)
    for statements in count():
        code = exit_code(_change_and_die, statements, change, location, *arguments)
        if code == 0:
            assert everything(location) != before, "nothing was changed, so nothing could be left half done"
            return statements
        assert code == KILLED, f"{change.__name__} failed at statement {statements}"
        assert everything(location) == before, f"{change.__name__} left something at statement {statements}"
    raise AssertionError


def _change_and_die(statements: int, change: Callable[..., None], *arguments: object) -> None:
    numbers = count()

    def die_in_turn(connection: Connection, *_: object) -> None:
        if connection.get_execution_options().get("writes") and next(numbers) == statements:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", die_in_turn)
    event.listen(Engine, "commit", die_in_turn)
    change(*arguments)
