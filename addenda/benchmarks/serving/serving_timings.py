"""`addenda bench serving`: throughput relative to the model alone, latency under load, and registry changes."""

from __future__ import annotations

import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count as numbers_from
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.cost import random_task
from addenda.benchmarks.report.tables import Figure, write
from addenda.benchmarks.serving.load import Measured, generator, pin
from addenda.benchmarks.serving.server_process import ServerProcess
from addenda.combined import CombinedModel, micro_batch, numerics
from addenda.combined.golden import goldens
from addenda.combined.probe_inputs import probe_images
from addenda.files import output_folder
from addenda.registry import Golden, Registry, Task
from addenda.serving.server import keep_memory
from addenda.terminal import progress
from addenda.text import plural

SHARES = (0.5, 0.7, 0.9)
"""Arrival rates in the open loop, as fractions of the closed-loop throughput."""
LOW_LOAD, P99_RATIO, SERVED_S, GROWTH = 1.3, 1.2, 2, 1.05
"""Targets."""
THROUGHPUT, THROUGHPUT_OF_MANY = 0.9, 0.8
"""Targets for served images per second, relative to the model's, with up to 100 tasks and with more."""
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of clients of the sweep."""
CHANGED = 10
"""Number of tasks of the sweep, and in the registry whose changes are measured."""


def run_serving(
    backbone: FrozenBackbone,
    weights: Path | None = None,
    out: Path | None = None,
    quick: bool = False,
    counts: Sequence[int] | None = None,
    seconds: float = 20,
    rounds: int = 5,
    cycles: int = 1000,
    ray: str | None = None,
    replicas: Sequence[int] = (1, 2),
    workers: int = 0,
) -> list[Figure]:
    """Serves random tasks, generates load in another process, and prints a table.

    Each load takes `seconds` and is repeated for `rounds`. With `workers`, a server with that many is loaded beside the
    one without, in turn. With `ray`, the address of a cluster, only replicas on that cluster are measured.
    """
    if out is not None:
        output_folder(out)
    keep_memory()  # as the server does, so that the model alone is as fast as it can be
    counts = counts or ((CHANGED,) if ray is not None else (1, 10) if quick else (1, 10, 100, 1000))
    if quick:
        seconds, rounds, cycles = min(seconds, 2), 2, min(cycles, 20)
    device, batch_size, threads = numerics(backbone)["device"], micro_batch(backbone.device), torch.get_num_threads()
    figures: list[Figure] = []
    images, (server_cores, generator_cores) = [_image(backbone, number) for number in range(16)], cores_apart(threads)
    with generator(images, generator_cores) as load, progress() as report:
        bench = _Bench(
            backbone, weights, partial(load, seconds=seconds), seconds, rounds, 3 * batch_size, workers, server_cores
        )
        if ray is None:
            steps = [("Serving tasks", partial(bench.throughput, count)) for count in counts]
            steps.append(("One client to many", partial(bench.sweep)))
            steps.append(("Changing the registry", partial(bench.changes, cycles)))
        else:
            steps = [("Serving tasks on replicas", partial(bench.replicas, count, ray, replicas)) for count in counts]
        for number, (title, measure) in enumerate(steps):
            report(title, number, len(steps))
            figures += measure()
            report(title, number + 1, len(steps))
    if ray is not None and len(counts) > 1:
        figures += _cost_per_task(figures, counts[0], counts[-1], replicas[0])
    figures = [figure for figure in figures if not math.isnan(figure.measured)]
    details = {
        "command": f"addenda bench serving --backbone {backbone.name} --tasks {','.join(map(str, counts))} "
        f"--seconds {seconds:g} --rounds {rounds} "
        + (f"--workers {workers} " if workers else "")
        + (f"--cycles {cycles}" if ray is None else f"--ray {ray} --replicas {','.join(map(str, replicas))}"),
        "backbone": backbone.name,
        "device": device,
        "threads": threads,
        "micro_batch": batch_size,
        "counts": list(counts),
    }
    title = f"{backbone.name}, {device}, {threads} threads; {seconds:g} s per load, {rounds} rounds"
    write("serving", title, figures, details, out)
    return figures


@dataclass(frozen=True)
class _Bench:
    """Shared state of all measurements."""

    backbone: FrozenBackbone
    weights: Path | None
    load: Callable[..., Measured]  # from `generator`
    seconds: float  # of a load
    rounds: int
    clients: int  # per server in a closed loop: enough for one running and two waiting full batches
    workers: int  # of the server that is compared with one without; 0 for none
    cores: Collection[int]  # those of the servers, if the load generator has one of its own

    def throughput(self, count: int) -> list[Figure]:
        """Measures a server with `count` tasks: a closed loop relative to the model alone, then an open loop."""
        tasks = [random_task(self.backbone, number) for number in range(count)]
        model, group = CombinedModel(self.backbone, tasks), plural(count, "task")
        of_rounds = partial(Figure.of_rounds, group)
        bare, combined, bare_ms, combined_ms, one_client_ms = (list[float]() for _ in range(5))
        loads, with_workers = list[Measured](), list[Measured]()
        with ExitStack() as stack:
            server = stack.enter_context(self._served(tasks))
            servers = [server]
            if self.workers:
                servers.append(stack.enter_context(self._served(tasks, "--workers", str(self.workers))))
            for each in servers:
                self.load(*each.address, clients=self.clients, seconds=min(2, self.seconds))  # warms up
            for _ in range(self.rounds):
                bare.append(self._alone(self.backbone.backbone_logits))
                combined.append(self._alone(model))
                loads.append(self.load(*server.address, clients=self.clients))
                with_workers += [self.load(*each.address, clients=self.clients) for each in servers[1:]]
                bare_ms.append(1000 / self._alone(self.backbone.backbone_logits, 1))
                combined_ms.append(1000 / self._alone(model, 1))
                one_client_ms.append(_p(50, self.load(*server.address, clients=1)))
            rates = [load.rate for load in loads]
            throughput = THROUGHPUT if count <= 100 else THROUGHPUT_OF_MANY
            figures = [
                of_rounds("stock timm alone", "images/s", bare),
                of_rounds("the combined model alone", "images/s", combined),
                of_rounds(f"served, {self.clients} clients", "images/s", rates),
                of_rounds("served / stock timm", "x", _ratios(rates, bare)),
                of_rounds("served / the combined model", "x", _ratios(rates, combined), throughput, more=True),
                _failed(group, "failed requests, closed loop", loads),
            ]
            if self.workers:
                name, faster = plural(self.workers, "worker"), [load.rate for load in with_workers]
                figures += [
                    of_rounds(f"served with {name}", "images/s", faster),
                    of_rounds(f"with {name} / the combined model", "x", _ratios(faster, combined)),
                    of_rounds(f"with {name} / without", "x", _ratios(faster, rates)),
                    _failed(group, f"failed requests with {name}", with_workers),
                ]
            figures += [
                of_rounds("one image, stock timm alone", "ms", bare_ms),
                of_rounds("one image, the combined model alone", "ms", combined_ms),
                of_rounds("one image, served, p50 of one client", "ms", one_client_ms),
                of_rounds("that / the combined model", "x", _ratios(one_client_ms, combined_ms), LOW_LOAD),
                of_rounds("that / stock timm", "x", _ratios(one_client_ms, bare_ms)),
            ]
            for share in SHARES:
                rate = share * statistics.median(rates)
                opened = [self.load(*server.address, rate=rate, seed=seed) for seed in range(self.rounds)]
                figures += _latencies(group, f"at {share:.0%} of that", opened)
        return figures

    def sweep(self) -> list[Figure]:
        """Measures a server in a closed loop of one to many clients."""
        group, loads = f"{CHANGED} tasks, by clients", {clients: list[Measured]() for clients in CLIENTS}
        with self._served([random_task(self.backbone, number) for number in range(CHANGED)]) as server:
            self.load(*server.address, clients=CLIENTS[-1], seconds=min(2, self.seconds))  # warms up
            for _ in range(self.rounds):
                for clients, measured in loads.items():
                    measured.append(self.load(*server.address, clients=clients))
        figures = []
        for clients, measured in loads.items():
            name = plural(clients, "client")
            figures.append(Figure.of_rounds(group, name, "images/s", [load.rate for load in measured]))
            figures += [
                Figure.of_rounds(group, f"p{p}, {name}", "ms", [_p(p, load) for load in measured]) for p in (50, 99)
            ]
            figures.append(_failed(group, f"failed requests, {name}", measured))
        return figures

    def changes(self, cycles: int) -> list[Figure]:
        """Measures a server whose registry changes: latency, failures, time until a task is served, and memory."""
        group, new = f"{CHANGED} tasks, changing", self._new_tasks()
        unchanged: list[Measured] = []
        changing: list[Measured] = []
        served: list[float] = []
        memory: list[float] = []
        tasks = [random_task(self.backbone, number) for number in range(CHANGED)]
        with self._served(tasks) as server, ThreadPoolExecutor(1) as pool:
            rate = SHARES[0] * self.load(*server.address, clients=self.clients).rate
            for seed in range(self.rounds):
                unchanged.append(self.load(*server.address, rate=rate, seed=seed))
                changes = pool.submit(server.change, *(next(new) for _ in range(max(2, int(self.seconds)))))
                changing.append(self.load(*server.address, rate=rate, seed=seed))
                served += changes.result()
            idle = server.change(*(next(new) for _ in range(10)))
            for _ in range(cycles):
                server.change(next(new))
                memory.append(server.memory_mb())
        middle, tenth = len(memory) // 2, len(memory) // 10
        end = statistics.median(memory[-max(1, tenth) :])
        growth = end / statistics.median(memory[middle - tenth : middle + 1])
        ratios = _ratios([_p(99, load) for load in changing], [_p(99, load) for load in unchanged])
        return [
            *_latencies(group, f"at {SHARES[0]:.0%}, nothing changes", unchanged),
            *_latencies(group, f"at {SHARES[0]:.0%}, tasks come and go", changing),
            Figure.of_rounds(group, "p99 while tasks come and go / without", "x", ratios, P99_RATIO),
            Figure.of_rounds(group, "from registered to served, under load", "s", served, SERVED_S),
            Figure.of_rounds(group, "from registered to served, idle", "s", idle, SERVED_S),
            Figure(group, f"memory after {cycles:,} registered and retired", "MB", end),
            Figure(group, f"that / memory after {cycles // 2:,}", "x", growth, target=GROWTH),
        ]

    def replicas(self, size: int, ray: str, counts: Sequence[int]) -> list[Figure]:
        """Measures replicas with `size` tasks on a Ray cluster in a closed loop; they share this machine's cores."""
        cpus = max(1, (os.cpu_count() or 1) // max(counts))
        group = f"{size:,} tasks on Ray Serve, {cpus} CPUs a replica"
        tasks = [random_task(self.backbone, number) for number in range(size)]
        figures: list[Figure] = []
        first: list[float] = []
        for count in counts:
            clients, name = self.clients * count, f"replicas: {count}"
            options = ("--ray", ray, "--replicas", str(count), "--cpus", str(cpus), "--drain", "0")
            with self._served(tasks, *options, ready=f" with {count} replica") as server:
                self.load(*server.address, clients=clients, seconds=min(2, self.seconds))  # warms up
                loads = [self.load(*server.address, clients=clients) for _ in range(self.rounds)]
                memory = server.memory_mb()
            rates = [load.rate for load in loads]
            first = first or rates
            figures += [
                Figure.of_rounds(group, f"{name}, {clients} clients", "images/s", rates),
                Figure.of_rounds(group, f"{name} / {counts[0]}", "x", _ratios(rates, first)),
                _failed(group, f"{name}, failed requests", loads),
                Figure(group, f"{name}, from the command to all tasks served", "s", server.started_s),
                Figure(group, f"{name}, memory of one", "MB", memory),
            ]
        return figures

    @contextmanager
    def _served(self, tasks: Sequence[Task], *options: str, ready: str = "") -> Iterator[ServerProcess]:
        """Serves the tasks from a new registry; the server is ready when it prints its address followed by `ready`."""
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            registry = stack.enter_context(Registry.open(f"{folder}/tasks.db"))
            registry.add_backbone(self.backbone.record())
            for task, golden in zip(tasks, goldens(self.backbone, tasks), strict=True):
                registry.register(task, golden)
            command = [sys.executable, "-m", "addenda.cli", "serve", "--registry", f"{folder}/tasks.db"]
            command += ["--port", "0", "--keys", f"{folder}/keys.json", "--log-level", "error"]
            command += ["--device", str(self.backbone.device), *options]
            if self.weights is not None:
                command += ["--weights", str(self.weights.resolve())]
            log = stack.enter_context(open(f"{folder}/log", "w+"))
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            pin(process.pid, self.cores)
            try:
                yield ServerProcess(process, registry, Path(log.name), len(tasks), ready)
            finally:
                process.terminate()
                process.wait()

    def _alone(self, run: Callable[[Tensor], object], batch_size: int | None = None) -> float:
        """Images per second of a function, by default in canonical micro-batches."""
        device, probes = self.backbone.device, probe_images(self.backbone)
        batch_size = batch_size or micro_batch(device)
        batch = torch.cat([probes] * -(-batch_size // len(probes)))[:batch_size]
        images, start = 0, time.perf_counter()
        with torch.no_grad():
            while time.perf_counter() < start + self.seconds:
                run(batch)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                images += batch_size
        return images / (time.perf_counter() - start)

    def _new_tasks(self) -> Iterator[tuple[Task, Golden]]:
        """An endless supply of unregistered tasks with their golden probes."""
        for start in numbers_from(CHANGED, 20):
            tasks = [random_task(self.backbone, number) for number in range(start, start + 20)]
            yield from zip(tasks, goldens(self.backbone, tasks), strict=True)


def cores_apart(threads: int) -> tuple[list[int], list[int]]:
    """The cores of the servers and that of the load generator; none if torch's threads leave no core free."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (cores[:-1], cores[-1:]) if threads < len(cores) else ([], [])


def _cost_per_task(figures: Sequence[Figure], fewest: int, most: int, count: int) -> list[Figure]:
    """Time and memory per additional task, from the measurements with the fewest and the most tasks."""
    before, after = (
        [figure.measured for figure in figures if figure.group.startswith(f"{size:,} tasks ")]
        for size in (fewest, most)
    )
    group = f"a task more, from {fewest:,} to {most:,}, {plural(count, 'replica')}"
    return [
        Figure(group, "time of an image", "ms", 1000 * (1 / after[0] - 1 / before[0]) / (most - fewest)),
        Figure(group, "memory of a replica", "kB", 1000 * (after[4] - before[4]) / (most - fewest)),
    ]


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


def _image(backbone: FrozenBackbone, number: int) -> bytes:
    """A JPEG file of the backbone's input size."""
    _, height, width = backbone.preprocessing["input_size"]
    blocks = np.random.RandomState(number).randint(0, 255, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _p(percent: int, load: Measured) -> float:
    """A percentile of a load's latencies, in ms."""
    return 1000 * float(np.percentile(load.latencies_s or [float("nan")], percent))


def _latencies(group: str, when: str, loads: Sequence[Measured]) -> list[Figure]:
    """Latencies, failures and sending delay of an open loop, over its rounds."""
    lag = 1000 * max(load.lag_s for load in loads)
    return [
        *(Figure.of_rounds(group, f"p{p}, {when}", "ms", [_p(p, load) for load in loads]) for p in (50, 95, 99)),
        _failed(group, f"failed requests, {when}", loads),
        Figure(group, f"the generator's latest sending, {when}", "ms", lag),
    ]


def _failed(group: str, what: str, loads: Sequence[Measured]) -> Figure:
    return Figure(group, what, "", sum(sum(load.failed.values()) for load in loads), target=0)
