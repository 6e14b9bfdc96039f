"""Commands in separate processes, killed as soon as a condition holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from addenda.learner.activation_cache import NAME
from tests.support.places import ROOT


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

    def _start(self, *arguments: object) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "addenda.cli",
            *map(str, arguments),
            *(("--registry", str(self.registry)) if self._takes_registry else ()),
            "--json",
        ]
        environment = {**os.environ, "ADDENDA_CACHE": str(self.cache.parent)}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            cwd=ROOT,
        )  # fmt: skip

    def run(self, *arguments: object) -> Any:
        """Runs a command and returns the JSON that it prints."""
        process = self._start(*arguments)
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return json.loads(out)

    def kill(self, when: Callable[[], bool], *arguments: object) -> None:
        """Starts a command and kills it with SIGKILL as soon as the condition holds."""
        process = self._start(*arguments)
        while process.poll() is None and not when():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors

    def seen(self, pattern: str) -> Callable[[], bool]:
        """A condition that holds once a path in the cache matches the pattern."""
        return lambda: next(self.cache.glob(pattern), None) is not None
