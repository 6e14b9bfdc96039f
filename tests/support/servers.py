"""Servers for tests: one in this process, and one in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2
from fastapi import FastAPI
from fastapi.testclient import TestClient

from addenda import FrozenBackbone, Registry
from addenda.serving.app import make_app
from addenda.serving.keys import KeyFile
from addenda.serving.service import Limits, Service


class AppClient(TestClient):
    """A client that says of which kind its application is."""

    app: FastAPI


@contextmanager
def client_of(
    backbone: FrozenBackbone,
    registry: Registry,
    keys: KeyFile | None = None,
    alias: str | None = None,
    limits: Limits | None = None,
) -> Iterator[AppClient]:
    """A client of an application in this process; `client.app.state.service` is its service."""
    app = make_app(lambda metrics: Service(backbone, registry, alias, limits, metrics.report), keys)
    with AppClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


class ServedProcess:
    """`addenda serve` in a process of its own, on a free port; as a context it is killed at the end.

    Attributes:
        module: what is run.
        start_s: seconds that it may take until it answers.
        url: where it answers.
        process: the process.
    """

    module = "addenda.cli"
    start_s = 60

    def __init__(self, registry: str | Path, folder: Path, *options: object, **environment: str) -> None:
        self.log = folder / "serve.log"
        command = [sys.executable, "-m", self.module, "serve", "--registry", registry, "--port", 0, *options]
        environment = {**os.environ, "ADDENDA_KEYS": str(folder / "keys.json"), "OMP_NUM_THREADS": "1", **environment}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=log, env=environment, cwd=folder
            )
        self.url = ""
        deadline = time.monotonic() + self.start_s
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"The server did not start:\n{self.log.read_text()}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        found = re.search(r" on (http://\S+)", self.log.read_text())
        if found is None:
            return False
        self.url = found[1]
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=1).status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self, timeout_s: float = 60) -> int:
        """Sends SIGTERM and gives the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
