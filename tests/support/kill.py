"""Commands in separate processes, killed as soon as a condition holds."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from addenda.learner.activation_cache import NAME
from tests.support.places import ROOT
from tests.support.processes import Forked


class Commands:
    """Runs `addenda` with a temporary registry and cache.

    Args:
        folder: the folder of both.
        registry: False for commands without the option --registry.
    """

    def __init__(self, folder: Path, registry: bool = True) -> None:
        folder.mkdir()
        self._takes_registry = registry
        self.registry, self.cache = folder / "tasks.db", folder / "cache" / NAME
        self._out, self._errors = folder / "out", folder / "errors"

    def _start(self, *arguments: object) -> Forked:
        registry = ("--registry", self.registry) if self._takes_registry else ()
        environment = {**os.environ, "ADDENDA_CACHE": str(self.cache.parent)}
        return Forked((*arguments, *registry, "--json"), self._out, ROOT, environment, self._errors)

    def run(self, *arguments: object) -> Any:
        """Runs a command and returns the JSON that it prints."""
        code = self._start(*arguments).wait(300)
        assert code == 0, self._errors.read_text()
        return json.loads(self._out.read_text())

    def stop(self, when: Callable[[], bool], *arguments: object, number: int = signal.SIGKILL) -> tuple[int, str]:
        """Starts a command, sends it a signal as soon as the condition holds, and returns its exit code and errors."""
        process = self._start(*arguments)
        while process.poll() is None and not when():
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait(120), self._errors.read_text()

    def kill(self, when: Callable[[], bool], *arguments: object) -> None:
        """Starts a command and kills it with SIGKILL as soon as the condition holds."""
        code, errors = self.stop(when, *arguments)
        assert code == -signal.SIGKILL, errors

    def seen(self, pattern: str) -> Callable[[], bool]:
        """A condition that holds once a path in the cache matches the pattern."""
        return lambda: next(self.cache.glob(pattern), None) is not None
