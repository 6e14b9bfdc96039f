"""Servers for tests: in the test process, and in a separate process."""

from __future__ import annotations

import os
import re
import signal
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
from addenda.serving.keys import KeyFile
from addenda.serving.server import make_app
from addenda.serving.service import Limits, Service
from tests.support.processes import Forked


class AppClient(TestClient):
    """A test client with the type of its application."""

    app: FastAPI


@contextmanager
def client_of(
    backbone: FrozenBackbone,
    registry: Registry,
    keys: KeyFile | None = None,
    alias: str | None = None,
    limits: Limits | None = None,
) -> Iterator[AppClient]:
    """A client of an application in the test process; `client.app.state.service` is its service."""
    app = make_app(lambda: Service(backbone, registry, alias, limits), keys or KeyFile("no-keys.json"))
    with AppClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


class ServedProcess:
    """`addenda serve` in a separate process on a free port; as a context manager it kills the process at the end.

    Attributes:
        module: the module that is run.
        start_s: seconds until it must be ready.
        url: its address.
        process: the process.
    """

    module = "addenda.cli"
    start_s = 60

    def __init__(self, registry: str | Path, folder: Path, *options: object, **environment: str) -> None:
        self.log = folder / "serve.log"
        command = ("serve", "--registry", registry, "--port", 0, *options)
        environment = {**os.environ, "ADDENDA_KEYS": str(folder / "keys.json"), "OMP_NUM_THREADS": "1", **environment}
        self.log.touch()
        self.process = Forked(command, self.log, folder, environment, module=self.module)
        self.url = ""
        deadline = time.monotonic() + self.start_s
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"The server did not start:\n{self.log.read_text()}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        match = re.search(r" on (http://\S+)", self.log.read_text())
        if match is None:
            return False
        self.url = match[1]
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=1).status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self, timeout_s: float = 60) -> int:
        """Sends SIGTERM and returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
