"""The processes of the benchmark: a server of a registry that is made for it, and the one that loads it."""

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
    """A process that serves a registry."""

    def __init__(
        self, process: subprocess.Popen[bytes], registry: Registry, log: Path, num_tasks: int, ready: str
    ) -> None:
        self._registry, start = registry, time.perf_counter()
        while (found := re.search(rf" on http://([\d.]+):(\d+){ready}", log.read_text())) is None:
            if process.poll() is not None:
                raise AddendaError(f"The server did not start: {log.read_text()[-500:]}")
            time.sleep(0.05)
        self.host, self.port = found[1], int(found[2])
        while self._tasks() != num_tasks:
            time.sleep(0.05)
        self.started_s = time.perf_counter() - start

    def change(self, *tasks: tuple[Task, Golden]) -> list[float]:
        """Registers tasks and retires them, one after the other; seconds until each was served."""
        seconds, before = [], self._tasks()
        for task, golden in tasks:
            start = time.perf_counter()
            registered = self._registry.register(task, golden)
            while self._tasks() == before:
                time.sleep(0.01)
            seconds.append(time.perf_counter() - start)
            self._registry.retire(registered.ref)
            while self._tasks() != before:
                time.sleep(0.01)
        return seconds

    def memory_mb(self) -> float:
        """What the process that answers holds in memory; NaN elsewhere than on Linux, where it tells none."""
        return self._metric("process_resident_memory_bytes", float("nan")) / 1e6

    def _tasks(self) -> int:
        """How many tasks are served; -1 before it answers."""
        try:
            return int(self._metric("addenda_tasks", -1))
        except ConnectionError:
            return -1

    def _metric(self, name: str, untold: float) -> float:
        """A number of its metrics."""
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=60)) as connection:
            connection.request("GET", "/metrics")
            found = re.search(rf"^{name} (\S+)", connection.getresponse().read().decode(), re.MULTILINE)
        return float(found[1]) if found else untold


@contextmanager
def generator(images: Sequence[bytes]) -> Iterator[Callable[..., Measured]]:
    """A process that makes load; called with a server and what `load.load` takes, and told what it measured."""
    with subprocess.Popen(GENERATOR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def load(server: ServerProcess, **how: float) -> Measured:
            head = f"POST {PREDICT} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nContent-Type: image/jpeg\r\n"
            requests = [f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image for image in images]
            order = {"host": server.host, "port": server.port, "requests": [one.hex() for one in requests], **how}
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
            return Measured(**json.loads(stdout.readline()))

        yield load
        stdin.close()


def goldens(backbone: FrozenBackbone, tasks: Sequence[Task]) -> list[Golden]:
    """Golden probes of many tasks in one pass, whose bits are those that each has alone."""
    described = numerics(backbone)
    under = numerics_fingerprint(described)
    found = CombinedModel(backbone, tasks)(probe_images(backbone))
    logits = [found[task.name].cpu() for task in tasks]
    return [Golden(described, under, values, tensor_digest(values)) for values in logits]


@contextmanager
def served(
    backbone: FrozenBackbone, weights: Path | None, tasks: Sequence[Task], *options: str, ready: str = ""
) -> Iterator[ServerProcess]:
    """A server of a new registry of these tasks, which says `ready` behind its address."""
    with tempfile.TemporaryDirectory() as own, ExitStack() as stack:
        registry = stack.enter_context(Registry.open(f"{own}/tasks.db"))
        registry.add_backbone(backbone.record())
        for task, golden in zip(tasks, goldens(backbone, tasks), strict=True):
            registry.register(task, golden)
        file = () if weights is None else ("--weights", str(weights.resolve()))
        command = (*SERVER, "--registry", f"{own}/tasks.db", "--port", "0", "--keys", f"{own}/keys.json")
        log = stack.enter_context(open(f"{own}/log", "w+"))
        process = subprocess.Popen(
            (*command, "--log-level", "error", "--device", str(backbone.device), *file, *options),
            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip
        try:
            yield ServerProcess(process, registry, Path(log.name), len(tasks), ready)
        finally:
            process.terminate()
            process.wait()
