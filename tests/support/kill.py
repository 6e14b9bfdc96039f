"""The command line in processes of their own, killed at moments that are seen from outside."""

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
    """Runs `addenda` on a registry and a cache of its own.

    Args:
        folder: where both are.
        registry: False for commands that take none.
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
        """What it prints as JSON."""
        process = self._start(*arguments)
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return json.loads(out)

    def kill(self, when: Callable[[], bool], *arguments: object) -> None:
        """Kills it by SIGKILL as soon as something is so."""
        process = self._start(*arguments)
        while process.poll() is None and not when():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors

    def seen(self, pattern: str) -> Callable[[], bool]:
        """Whether the cache holds something of that name."""
        return lambda: next(self.cache.glob(pattern), None) is not None
