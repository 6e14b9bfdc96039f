"""The processes of the serving benchmark: a server with a temporary registry, and the load generator."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.serving.load import Measured
from addenda.combined import CombinedModel, numerics, numerics_fingerprint, tensor_digest
from addenda.combined.probe_inputs import probe_images
from addenda.exceptions import AddendaError
from addenda.registry import Golden, Registry, Task

SERVER = (sys.executable, "-m", "addenda.cli", "serve")
GENERATOR = (sys.executable, "-m", "addenda.benchmarks.serving.load")
PREDICT = "/api/v1/predict"


class ServerProcess:
    """A server process and its registry."""

    def __init__(
        self, process: subprocess.Popen[bytes], registry: Registry, log: Path, num_tasks: int, ready: str
    ) -> None:
        self._registry, start = registry, time.perf_counter()
        while (match := re.search(rf" on http://([\d.]+):(\d+){ready}", log.read_text())) is None:
            if process.poll() is not None:
                raise AddendaError(f"The server did not start: {log.read_text()[-500:]}")
            time.sleep(0.05)
        self.host, self.port = match[1], int(match[2])
        while self._num_tasks() != num_tasks:
            time.sleep(0.05)
        self.started_s = time.perf_counter() - start

    def change(self, *tasks: tuple[Task, Golden]) -> list[float]:
        """Registers each task and then retires it; returns the seconds until each was served."""
        seconds, before = [], self._num_tasks()
        for task, golden in tasks:
            start = time.perf_counter()
            registered = self._registry.register(task, golden)
            while self._num_tasks() == before:
                time.sleep(0.01)
            seconds.append(time.perf_counter() - start)
            self._registry.retire(registered.ref)
            while self._num_tasks() != before:
                time.sleep(0.01)
        return seconds

    def memory_mb(self) -> float:
        """Resident memory of the process that responds; NaN except on Linux, where the metric exists."""
        return self._metric("process_resident_memory_bytes", float("nan")) / 1e6

    def _num_tasks(self) -> int:
        """Number of served tasks; -1 before the server responds."""
        try:
            return int(self._metric("addenda_tasks", -1))
        except ConnectionError:
            return -1

    def _metric(self, name: str, default: float) -> float:
        """The value of a Prometheus metric, or the default if it is missing."""
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=60)) as connection:
            connection.request("GET", "/metrics")
            match = re.search(rf"^{name} (\S+)", connection.getresponse().read().decode(), re.MULTILINE)
        return float(match[1]) if match else default


@contextmanager
def generator(images: Sequence[bytes]) -> Iterator[Callable[..., Measured]]:
    """Starts the load generator; yields a function of a server and the options of `load.load`."""
    with subprocess.Popen(GENERATOR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def load(server: ServerProcess, **options: float) -> Measured:
            head = f"POST {PREDICT} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nContent-Type: image/jpeg\r\n"
            requests = [f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image for image in images]
            encoded = [request.hex() for request in requests]
            order = {"host": server.host, "port": server.port, "requests": encoded, **options}
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
            return Measured(**json.loads(stdout.readline()))

        yield load
        stdin.close()


def goldens(backbone: FrozenBackbone, tasks: Sequence[Task]) -> list[Golden]:
    """Golden probes of many tasks in one forward pass; each has the same bits as if computed alone."""
    described = numerics(backbone)
    fingerprint = numerics_fingerprint(described)
    outputs = CombinedModel(backbone, tasks)(probe_images(backbone))
    logits = [outputs[task.name].cpu() for task in tasks]
    return [Golden(described, fingerprint, values, tensor_digest(values)) for values in logits]


@contextmanager
def served(
    backbone: FrozenBackbone, weights: Path | None, tasks: Sequence[Task], *options: str, ready: str = ""
) -> Iterator[ServerProcess]:
    """Serves the tasks from a new registry; the server is ready when it prints its address followed by `ready`."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        registry = stack.enter_context(Registry.open(f"{folder}/tasks.db"))
        registry.add_backbone(backbone.record())
        for task, golden in zip(tasks, goldens(backbone, tasks), strict=True):
            registry.register(task, golden)
        weights_option = () if weights is None else ("--weights", str(weights.resolve()))
        command = (*SERVER, "--registry", f"{folder}/tasks.db", "--port", "0", "--keys", f"{folder}/keys.json")
        log = stack.enter_context(open(f"{folder}/log", "w+"))
        process = subprocess.Popen(
            (*command, "--log-level", "error", "--device", str(backbone.device), *weights_option, *options),
            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip
        try:
            yield ServerProcess(process, registry, Path(log.name), len(tasks), ready)
        finally:
            process.terminate()
            process.wait()
