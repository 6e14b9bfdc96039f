"""Runs commands, and a test's functions, in processes forked from an interpreter that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from itertools import count
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Connection, Engine, event

from tests.support.databases import everything
from tests.support.places import ROOT

FORKS = multiprocessing.get_context("forkserver")
KILLED = -signal.SIGKILL


PRELOADED = (
    __name__, "tests.support.registries", "psycopg", "hypothesis", "addenda.learner", "addenda.serving.server",
    "sklearn.linear_model",
)  # fmt: skip
"""Most of what commands import: an interpreter of its own would take each of them seconds."""


class Forked:
    """`python -m MODULE ARGUMENTS`, in a forked process; has the methods of a `subprocess.Popen` that tests use.

    Args:
        arguments: the command line.
        log: the file for what it prints.
        errors: the file for its errors; default: the same file.
        folder: its working folder.
        environment: its environment.
        module: has the function `main`.
    """

    def __init__(
        self,
        arguments: tuple[object, ...],
        log: Path,
        folder: Path,
        environment: dict[str, str],
        errors: Path | None = None,
        module: str = "addenda.cli",
    ) -> None:
        start_another_interpreter()
        words = [module, *map(str, arguments)]
        self._process = FORKS.Process(target=_main, args=(words, log, errors, folder, environment))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for its end and returns the exit code."""
        self._process.join(timeout_s)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("addenda", timeout_s or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _main(words: list[str], log: Path, errors: Path | None, folder: Path, environment: dict[str, str]) -> None:
    for descriptor, path in ((1, log), (2, errors)):
        os.dup2(1 if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    os.chdir(folder)
    sys.argv = words
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests run in the background ignore it
    import_module(words[0]).main()


def descriptors(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(path))
    return found


def num_sockets(pid: int) -> int:
    """How many sockets a process has open."""
    return sum(name.startswith("socket:") for name in descriptors(pid))


def start_another_interpreter() -> None:
    """Starts the interpreter that processes are forked from, with slow imports done and another hash seed."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", seed)
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.set_forkserver_preload([*PRELOADED])
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
