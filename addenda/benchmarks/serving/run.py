"""`addenda bench serving`: what a server gives beside its bare model, under load, and while its registry changes."""

from __future__ import annotations

import io
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.cost.run import random_task
from addenda.benchmarks.report.tables import Figure, write
from addenda.benchmarks.serving.load import Measured
from addenda.benchmarks.serving.server import Server, generator, goldens, served
from addenda.combined import CombinedModel, micro_batch, numerics
from addenda.combined.probes import probe_images
from addenda.files import output_folder
from addenda.registry import Golden, Task
from addenda.terminal import progress

SHARES = (0.5, 0.7, 0.9)
"""Of the capacity, at which requests arrive in the open loop."""
THROUGHPUT, P99_RATIO, SERVED_S, GROWTH = 0.85, 1.2, 2, 1.05
CHANGED = 10
"""Tasks of the registry whose changes are measured."""


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
) -> list[Figure]:
    """Serves random tasks of a backbone in a process, loads it from another, and prints a table.

    Args:
        backbone: a loaded backbone, which the server finds again by its name and `weights`.
        weights: a local file of its weights.
        out: folder for serving.json and serving.md.
        quick: 1 and 10 tasks, two rounds of two seconds, 20 cycles.
        counts: of tasks; None is 1, 10, 100 and 1,000, on Ray 10.
        seconds: of each load; a round has one of each kind.
        rounds: of which medians are given.
        cycles: of registering and retiring a task.
        ray: the address of a Ray cluster; then replicas there are measured instead, and nothing else.
        replicas: how many, one measurement each.

    Raises:
        AddendaError: a server does not start.
    """
    if out is not None:
        output_folder(out)
    counts = counts or ((CHANGED,) if ray is not None else (1, 10) if quick else (1, 10, 100, 1000))
    if quick:
        seconds, rounds, cycles = min(seconds, 2), 2, min(cycles, 20)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder, generator() as load, progress() as report:
        bench = _Bench(backbone, load, partial(served, backbone, weights, Path(folder)), seconds, rounds)
        if ray is not None:
            figures += bench.replicas(ray, counts, replicas, report)
        else:
            for number, count in enumerate(counts):
                report("Serving tasks", number, len(counts) + 1)
                figures += bench.throughput(count)
            report("Changes of the registry", len(counts), len(counts) + 1)
            figures += bench.changes(cycles)
            report("Changes of the registry", len(counts) + 1, len(counts) + 1)
    figures = [figure for figure in figures if not math.isnan(figure.measured)]
    device = numerics(backbone)["device"]
    details = {
        "command": f"addenda bench serving --backbone {backbone.name} --tasks {','.join(map(str, counts))} "
        f"--seconds {seconds:g} --rounds {rounds} "
        + (f"--cycles {cycles}" if ray is None else f"--ray {ray} --replicas {','.join(map(str, replicas))}"),
        "backbone": backbone.name,
        "device": device,
        "threads": torch.get_num_threads(),
        "micro_batch": micro_batch(backbone.device),
        "counts": list(counts),
    }
    title = f"{backbone.name}, {device}, {torch.get_num_threads()} threads; {seconds:g} s a load, {rounds} rounds"
    write("serving", title, figures, details, out)
    return figures


@dataclass
class _Bench:
    backbone: FrozenBackbone
    load: Callable[..., Measured]
    served: Callable[..., AbstractContextManager[Server]]
    seconds: float
    rounds: int

    def __post_init__(self) -> None:
        _, height, width = self.backbone.preprocessing["input_size"]
        self.images, at_once = (
            [_image(number, width, height) for number in range(16)],
            micro_batch(self.backbone.device),
        )
        self._clients = 3 * at_once
        """Connections of a closed loop, a server: two full passes wait behind the one at work."""
        probes = probe_images(self.backbone)
        self.batch = torch.cat([probes] * -(-at_once // len(probes)))[:at_once]

    def throughput(self, count: int) -> list[Figure]:
        """A server of so many tasks: closed loop beside the bare model, then open loop."""
        group, tasks = f"{count:,} tasks", [random_task(self.backbone, number) for number in range(count)]
        model = CombinedModel(self.backbone, tasks)
        clients = self._clients
        rates: dict[str, list[float]] = {"bare": [], "combined": [], "served": []}
        failed = 0
        with self.served(tasks) as server:
            self.load(server, self.images, seconds=min(2, self.seconds), clients=clients)
            for _ in range(self.rounds):
                rates["bare"].append(self._alone(lambda: self.backbone.backbone_logits(self.batch)))
                rates["combined"].append(self._alone(lambda: model(self.batch)))
                closed = self._closed(server, clients)
                rates["served"].append(closed.rate)
                failed += closed.num_failed
            shares = [served / bare for served, bare in zip(rates["served"], rates["bare"], strict=True)]
            of_pass = [served / alone for served, alone in zip(rates["served"], rates["combined"], strict=True)]
            figures = [
                Figure.of_rounds(group, "stock timm alone", "images/s", rates["bare"], None),
                Figure.of_rounds(group, "the combined model alone", "images/s", rates["combined"], None),
                Figure.of_rounds(group, f"served, {clients} clients", "images/s", rates["served"], None),
                Figure.of_rounds(group, "served / stock timm", "x", shares, None),
                Figure.of_rounds(group, "served / the combined model", "x", of_pass, THROUGHPUT, more=True),
                Figure(group, "failed requests, closed loop", "", failed, target=0),
            ]
            capacity = statistics.median(rates["served"])
            for share in SHARES:
                opened = [self._open(server, share * capacity, seed) for seed in range(self.rounds)]
                figures += _latencies(group, f"at {share:.0%} of that", opened)
        return figures

    def changes(self, cycles: int) -> list[Figure]:
        """A server whose registry changes: latency and failures, time until a task is served, and memory."""
        group = f"{CHANGED} tasks, changing"
        with self.served([random_task(self.backbone, number) for number in range(CHANGED)]) as server:
            rate = SHARES[0] * self._closed(server, self._clients).rate
            fresh = self._fresh(CHANGED)
            quiet: list[Measured] = []
            busy: list[Measured] = []
            served: list[float] = []
            for seed in range(self.rounds):
                quiet.append(self._open(server, rate, seed))
                ready = [next(fresh) for _ in range(max(2, int(self.seconds)))]
                thread = threading.Thread(target=lambda ready=ready: served.extend(server.change(*ready)))
                thread.start()
                busy.append(self._open(server, rate, seed))
                thread.join()
            ratios = [_p(99, one) / _p(99, other) for one, other in zip(busy, quiet, strict=True)]
            idle = server.change(*(next(fresh) for _ in range(10)))
            memory = []
            for _ in range(cycles):
                server.change(next(fresh))
                memory.append(server.memory_mb())
            middle, tenth = len(memory) // 2, len(memory) // 10
            end = statistics.median(memory[-max(1, tenth) :])
            growth = end / statistics.median(memory[middle - tenth : middle + 1])
        return [
            *_latencies(group, f"at {SHARES[0]:.0%}, nothing changes", quiet),
            *_latencies(group, f"at {SHARES[0]:.0%}, tasks come and go", busy),
            Figure.of_rounds(group, "p99 while tasks come and go / without", "x", ratios, P99_RATIO),
            Figure.of_rounds(group, "from registered to served, under load", "s", served, SERVED_S),
            Figure.of_rounds(group, "from registered to served, idle", "s", idle, SERVED_S),
            Figure(group, f"memory after {cycles:,} registered and retired", "MB", end),
            Figure(group, f"that / memory after {cycles // 2:,}", "x", growth, target=GROWTH),
        ]

    def replicas(
        self, ray: str, sizes: Sequence[int], counts: Sequence[int], report: Callable[[str, int, int], None]
    ) -> list[Figure]:
        """Replicas on a Ray cluster, each on its share of this machine's cores: a closed loop on so many."""
        figures: list[Figure] = []
        ends: list[tuple[int, float, float]] = []
        for number, size in enumerate(sizes):
            report("Serving tasks on replicas", number, len(sizes))
            found, seconds, memory = self._replicas(ray, size, counts)
            figures += found
            ends.append((size, seconds, memory))
        report("Serving tasks on replicas", len(sizes), len(sizes))
        if len(ends) > 1:
            (few, seconds, memory), (many, most_seconds, most_memory) = ends[0], ends[-1]
            group = f"a task more, from {few:,} to {many:,}, {counts[0]} replica{'s' * (counts[0] > 1)}"
            figures += [
                Figure(group, "time of an image", "ms", 1000 * (most_seconds - seconds) / (many - few)),
                Figure(group, "memory of a replica", "kB", 1000 * (most_memory - memory) / (many - few)),
            ]
        return figures

    def _replicas(self, ray: str, size: int, counts: Sequence[int]) -> tuple[list[Figure], float, float]:
        """Replicas with so many tasks; of the first count also an image's seconds, and a replica's memory in MB."""
        cpus = max(1, (os.cpu_count() or 1) // max(counts))
        group = f"{size:,} tasks on Ray Serve, {cpus} CPUs a replica"
        tasks = [random_task(self.backbone, number) for number in range(size)]
        figures: list[Figure] = []
        all_rates: list[list[float]] = []
        all_memory: list[float] = []
        for count in counts:
            clients, rates, failed = self._clients * count, [], 0
            options = ("--ray", ray, "--replicas", str(count), "--cpus", str(cpus), "--drain", "0")
            with self.served(tasks, *options, ready=f" with {count} replica") as server:
                self.load(server, self.images, seconds=min(2, self.seconds), clients=clients)
                for _ in range(self.rounds):
                    closed = self._closed(server, clients)
                    rates.append(closed.rate)
                    failed += closed.num_failed
                all_memory.append(server.memory_mb())
                started = server.started_s
            all_rates.append(rates)
            shares = [rate / one for rate, one in zip(rates, all_rates[0], strict=True)]
            figures += [
                Figure.of_rounds(group, f"replicas: {count}, {clients} clients", "images/s", rates, None),
                Figure.of_rounds(group, f"replicas: {count} / {counts[0]}", "x", shares, None),
                Figure(group, f"replicas: {count}, failed requests", "", failed, target=0),
                Figure(group, f"replicas: {count}, from the command to all tasks served", "s", started),
                Figure(group, f"replicas: {count}, memory of one", "MB", all_memory[-1]),
            ]
        return figures, 1 / statistics.median(all_rates[0]), all_memory[0]

    def _closed(self, server: Server, clients: int) -> Measured:
        return self.load(server, self.images, seconds=self.seconds, clients=clients)

    def _open(self, server: Server, rate: float, seed: int) -> Measured:
        return self.load(server, self.images, seconds=self.seconds, rate=rate, seed=seed)

    def _alone(self, run: Callable[[], object]) -> float:
        """Images a second of a call that takes the canonical micro-batch."""
        images, start = 0, time.perf_counter()
        with torch.no_grad():
            while time.perf_counter() < start + self.seconds:
                run()
                if self.backbone.device.type == "cuda":
                    torch.cuda.synchronize(self.backbone.device)
                images += len(self.batch)
        return images / (time.perf_counter() - start)

    def _fresh(self, start: int, at_once: int = 20) -> Iterator[tuple[Task, Golden]]:
        """Tasks that nobody has seen, with their golden probes, without end."""
        while True:
            tasks = [random_task(self.backbone, number) for number in range(start, start + at_once)]
            yield from zip(tasks, goldens(self.backbone, tasks), strict=True)
            start += at_once


def _image(number: int, width: int, height: int) -> bytes:
    """A JPEG file of the size that the backbone takes."""
    blocks = np.random.RandomState(number).randint(0, 255, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _p(percent: int, measured: Measured) -> float:
    """A percentile of a load's latencies, in ms."""
    return 1000 * float(np.percentile(measured.latencies_s or [float("nan")], percent))


def _latencies(group: str, when: str, loads: Sequence[Measured]) -> list[Figure]:
    """What an open loop measured, over its rounds."""
    failed = sum(load.num_failed for load in loads)
    lag = 1000 * max(load.lag_s for load in loads)
    return [
        *(Figure.of_rounds(group, f"p{p}, {when}", "ms", [_p(p, load) for load in loads], None) for p in (50, 95, 99)),
        Figure(group, f"failed requests, {when}", "", failed, target=0),
        Figure(group, f"the generator's latest sending, {when}", "ms", lag),
    ]
