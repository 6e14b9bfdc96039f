"""The server that a benchmark measures: its start, changes to its registry, and its metrics."""

from __future__ import annotations

import http.client
import re
import subprocess
import time
from contextlib import closing
from pathlib import Path

from addenda.exceptions import AddendaError
from addenda.registry import Golden, Registry, Task

POLL_S = 0.05
"""Seconds between readings of the metrics, which take time from the server that is measured."""


class ServerProcess:
    """A server process, ready as soon as this is made, and its registry."""

    def __init__(
        self, process: subprocess.Popen[bytes], registry: Registry, log: Path, num_tasks: int, ready: str
    ) -> None:
        self._registry, start = registry, time.perf_counter()
        while (match := re.search(rf" on http://([\d.]+):(\d+){ready}", log.read_text())) is None:
            if process.poll() is not None:
                raise AddendaError(f"The server did not start: {log.read_text()[-500:]}")
            time.sleep(POLL_S)
        self.address = match[1], int(match[2])
        while self._num_tasks() != num_tasks:
            time.sleep(POLL_S)
        self.started_s = time.perf_counter() - start

    def change(self, *tasks: tuple[Task, Golden]) -> list[float]:
        """Registers each task and then retires it; returns the seconds until each was served."""
        seconds, before = [], self._num_tasks()
        for task, golden in tasks:
            start = time.perf_counter()
            registered = self._registry.register(task, golden)
            while self._num_tasks() == before:
                time.sleep(POLL_S)
            seconds.append(time.perf_counter() - start)
            self._registry.retire(registered.ref)
            while self._num_tasks() != before:
                time.sleep(POLL_S)
        return seconds

    def memory_mb(self) -> float:
        """Resident memory of the process that responds; NaN except on Linux, where the metric exists."""
        return self._metric("process_resident_memory_bytes", float("nan")) / 1e6

    def _num_tasks(self) -> int:
        """Number of served tasks; -1 while the server does not respond."""
        try:
            return int(self._metric("addenda_tasks", -1))
        except (ConnectionError, TimeoutError):
            return -1

    def _metric(self, name: str, default: float) -> float:
        """The value of a Prometheus metric, or the default if it is missing."""
        with closing(http.client.HTTPConnection(*self.address, timeout=60)) as connection:
            connection.request("GET", "/metrics")
            match = re.search(rf"^{name} (\S+)", connection.getresponse().read().decode(), re.MULTILINE)
        return float(match[1]) if match else default
