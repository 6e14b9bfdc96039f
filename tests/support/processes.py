"""Runs a test's functions in other processes, with another hash seed or with SIGKILL at any statement of a change."""

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
    """Starts the interpreter that processes are forked from, with slow imports done and another hash seed."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", seed)
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.set_forkserver_preload([__name__, "tests.support.registries", "psycopg", "hypothesis"])
        forkserver.ensure_running()


def exit_code(function: Callable[..., None], *arguments: object, timeout_s: float = 60) -> int | None:
    """Runs a module-level function in a process and returns its exit code, or None after the timeout."""
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    process.join(timeout_s)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    return code


def all_at_once(function: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[int | None]:
    """Starts processes together and returns their exit codes; the function takes a barrier as its last argument."""
    start = FORKS.Barrier(len(arguments))
    processes = [FORKS.Process(target=function, args=(*values, start)) for values in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def killed_at_each_statement(change: Callable[..., None], location: str, *arguments: object) -> int:
    """Kills a process at each statement of its write transaction and at the commit, until it completes.

    A killed change must leave nothing behind, and the next process must find the registry unlocked.

    Args:
        change: a module-level function that changes the registry, so that another process can import it.
        location: the registry.
        arguments: further arguments of `change`.

    Returns:
        The number of kills before the change succeeded.
    """
    before = everything(location)
    for statements in count():
        code = exit_code(_change_and_die, statements, change, location, *arguments)
        if code == 0:
            assert everything(location) != before, "the change did nothing, so the test proves nothing"
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
