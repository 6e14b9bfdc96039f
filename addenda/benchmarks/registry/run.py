"""`addenda bench registry`: what a registry takes to register, load, list and tell of a change, on each database."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.cost.run import Run, interleave, random_task
from addenda.benchmarks.registry.filling import database_version, disk_bytes, fill
from addenda.benchmarks.report.tables import Figure, write
from addenda.combined import feature_statistics, numerics, numerics_fingerprint, tensor_digest
from addenda.combined.probes import NUM_PROBES
from addenda.exceptions import RegistryError
from addenda.files import output_folder
from addenda.learner import LearnConfig
from addenda.learner.objectives import SingleLabel
from addenda.registry import FeatureStatistics, Golden, Registry, Task, TaskFilter
from addenda.terminal import progress

IMAGES, PAGE = 500, 100
LABELS = tuple(f"class {number}" for number in range(10))
REGISTER_PER_S, LOAD_MS_EACH, PAGE_MS = 100, 2, 50
CHUNKS = 20
"""Parts of a series of registrations, each of which gives a rate."""

Report = Callable[[str, int, int], None]


def run_registry(
    backbone: FrozenBackbone,
    locations: Sequence[str] = (),
    out: Path | None = None,
    quick: bool = False,
    num_tasks: int = 1000,
    num_listed: int = 100_000,
) -> list[Figure]:
    """Measures a new SQLite file, then the databases given, and prints a table.

    Args:
        backbone: whose tasks they are; its weights may be random.
        locations: of further, empty databases; they stay filled.
        out: folder for registry.json and registry.md; the SQLite file lies there while it is measured, else where
            temporary files do, which may be no disk.
        quick: up to 100 tasks and 5,000 listed, fewer rounds.
        num_tasks: tasks of the backbone's own size to register and load, half of them with statistics; 40 at least.
        num_listed: small tasks to list.

    Raises:
        RegistryError: a database that is not empty or cannot be used.
    """
    if quick:
        num_tasks, num_listed = min(num_tasks, 100), min(num_listed, 5000)
    if out is not None:
        output_folder(out)
    device, figures = numerics(backbone)["device"], []
    with tempfile.TemporaryDirectory(dir=out) as folder, ExitStack() as stack, progress() as report:
        places = [f"{folder}/registry.db", *locations]
        opened = [stack.enter_context(Registry.open(place)) for place in places]
        for registry in opened:
            if registry.generation:
                raise RegistryError(
                    f"{registry.location!r} holds a registry at generation {registry.generation}, and the benchmark "
                    "fills it: give an empty database."
                )
        for registry, place in zip(opened, places, strict=True):
            figures += _Bench(registry, place, backbone, num_tasks, num_listed, 5 if quick else 20, report).measure()
    details = {
        "command": f"addenda bench registry --tasks {num_tasks} --listed {num_listed}"
        + " --registry URL" * len(locations),
        "backbone": backbone.name,
        "device": device,
        "num_tasks": num_tasks,
        "num_listed": num_listed,
    }
    title = f"{num_tasks:,} tasks of {backbone.name}, {num_listed:,} more listed; {device}"
    write("registry", title, figures, details, out)
    return figures


@dataclass
class _Bench:
    """One database, and how much is measured of it."""

    registry: Registry
    location: str
    backbone: FrozenBackbone
    num_tasks: int
    num_listed: int
    rounds: int
    report: Report

    def measure(self) -> list[Figure]:
        """Everything, in order: the tasks registered first are those that are loaded and listed."""
        registry, rounds, report = self.registry, self.rounds, self.report
        self.name, self.described = database_version(registry), numerics(self.backbone)
        others = [f"{number:064x}" for number in range(1, 5)]
        for fingerprint in (self.backbone.fingerprint, *others):
            registry.add_backbone({**self.backbone.record(), "fingerprint": fingerprint})
        targets = torch.arange(IMAGES, dtype=torch.int64, device="cpu") % len(LABELS)
        sums = feature_statistics(_normal(0, IMAGES, self.backbone.embed_dim), targets, len(LABELS))
        figures = [*self._registering(None), *self._registering(sums)]
        report(f"{self.name}: filling the list", 0, 1)
        fill(registry, _small_task(), others, self.num_listed)
        report(f"{self.name}: filling the list", 1, 1)
        cpu = torch.device("cpu")
        loads = interleave({"load": lambda: registry.load(self.backbone)}, max(3, rounds // 4), cpu)["load"]
        target = LOAD_MS_EACH * self.num_tasks / 1000
        figures.append(self._figure(f"{self.num_tasks:,} tasks read and hashed", "s", loads, target))
        for what, seconds in interleave(_pages(registry, others[1], self.num_listed), rounds, cpu).items():
            figures.append(self._figure(f"page: {what}", "ms", [1000 * value for value in seconds], PAGE_MS))
        report(f"{self.name}: waiting for changes", 0, 1)
        noticed = [1000 * value for value in _notice(registry, self.location, rounds)]
        report(f"{self.name}: waiting for changes", 1, 1)
        return [*figures, self._figure("a change noticed by wait()", "ms", noticed)]

    def _figure(
        self, what: str, unit: str, values: Sequence[float], target: float | None = None, **more: Any
    ) -> Figure:
        return Figure.of_rounds(self.name, what, unit, values, target, **more)

    def _registering(self, kept: FeatureStatistics | None) -> Iterator[Figure]:
        """Half of the tasks, with statistics of their images or without."""
        before, seconds, count = disk_bytes(self.registry), [], self.num_tasks // 2
        for number in range(count):
            seconds.append(self._register(number, kept))
            self.report(f"{self.name}: registering, statistics {kept is not None}", number + 1, count)
        what = f"registered with{'out' if kept is None else ''} statistics"
        weight = (disk_bytes(self.registry) - before) / count / 1000
        size = -(-count // CHUNKS)
        chunks = [seconds[start : start + size] for start in range(0, count, size)]
        rates = [len(chunk) / sum(chunk) for chunk in chunks]
        yield self._figure(what, "per s", rates, REGISTER_PER_S, more=True)
        yield Figure(self.name, f"a task {what}, on disk", "kB", weight)
        if "://" not in self.location:  # what no database can beat that logs each change before it makes it
            rates = _disk_alone(Path(self.location).parent, int(1000 * weight))
            yield self._figure("these bytes twice, the disk alone", "per s", rates)

    def _register(self, number: int, kept: FeatureStatistics | None) -> float:
        """Seconds that one registration takes, of content that nothing was computed of before."""
        place = number if kept is None else self.num_tasks + number
        logits = _normal(place, NUM_PROBES, len(LABELS))
        probe = Golden(self.described, numerics_fingerprint(self.described), logits, tensor_digest(logits))
        statistics = None if kept is None else replace(kept, sums=_normal(place, *kept.sums.shape))
        name = f"{'plain' if kept is None else 'known'}-{number}"
        task = replace(random_task(self.backbone, place), name=name, labels=LABELS, **_told())
        start = time.perf_counter()
        self.registry.register(task, probe, statistics)
        return time.perf_counter() - start


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def _disk_alone(folder: Path, num_bytes: int) -> list[float]:
    """How often in a second so many bytes are written to two files, and are on the disk."""
    data, rates = random.Random(0).randbytes(num_bytes), []
    with tempfile.TemporaryFile(dir=folder) as one, tempfile.TemporaryFile(dir=folder) as two:
        for _ in range(CHUNKS):
            start = time.perf_counter()
            for file in (one, two):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            rates.append(1 / (time.perf_counter() - start))
    return rates


def _told() -> dict[str, Any]:
    """What a learned task's row tells of it, as wide as that of a real one."""
    targets = torch.arange(IMAGES, dtype=torch.int64, device="cpu") % len(LABELS)
    measured = SingleLabel().score(_normal(0, IMAGES, len(LABELS)), targets, LABELS)
    return {
        "config": LearnConfig().to_json(),
        "metrics": {"regression": {"validation": measured, "test": measured}, "validation": measured, "test": measured},
        "data": {"num_images": IMAGES, "counts": dict.fromkeys(LABELS, IMAGES // len(LABELS)), "skipped": []},
    }


def _small_task() -> Task:
    """Of few numbers, since a list reads none of them."""
    tensors = (
        torch.ones(len(LABELS), 8, dtype=torch.float32, device="cpu"),
        torch.zeros(len(LABELS), dtype=torch.float32, device="cpu"),
        torch.ones(8, dtype=torch.float32, device="cpu"),
        torch.ones(1, 1, 8, dtype=torch.float32, device="cpu"),
    )
    return Task("line", "", LABELS, *tensors, **_told())


def _pages(registry: Registry, fingerprint: str, num_listed: int) -> dict[str, Run]:
    """Pages of the list that `fill` makes, by what they are chosen by; some find many tasks, some few or none."""
    middle = f"line-00-{num_listed // 400}:1"
    asked = {
        "first": (TaskFilter(), None),
        "from the middle": (TaskFilter(), middle),
        "name": (TaskFilter(name="line-00-0"), None),
        "name, pattern": (TaskFilter(name="line-07-*"), None),
        "tag, every tenth": (TaskFilter(tag="audited"), None),
        "tag, every thousandth": (TaskFilter(tag="pilot"), None),
        "score, most": (TaskFilter(min_score=0.1), None),
        "score, every thousandth": (TaskFilter(min_score=0.999), None),
        "score, none": (TaskFilter(min_score=1.1), None),
        "backbone": (TaskFilter(backbone=fingerprint), None),
        "backbone and score, none": (TaskFilter(backbone=fingerprint, min_score=1.1), None),
        "since": (TaskFilter(since=registry.record(middle).created_at), None),
        "until, few": (TaskFilter(until="2020-01-01T02:00"), None),
        "extends": (TaskFilter(extends="line-00-0:1"), None),
        "extends, tag, score": (TaskFilter(extends="line-00-0:1", tag="audited", min_score=0.9), None),
    }
    return {what: partial(registry.tasks, chosen, PAGE, before) for what, (chosen, before) in asked.items()}


def _notice(registry: Registry, location: str, rounds: int) -> Iterator[float]:
    """Seconds from a change until somebody who waits for it, with connections of their own, knows."""
    shuffle = random.Random(0)
    with Registry.open(location) as other, ThreadPoolExecutor(1) as pool:

        def wait(after: int) -> float:
            other.wait(after, timeout_s=10)
            return time.perf_counter()

        for _ in range(rounds):
            waiting = pool.submit(wait, registry.generation)
            time.sleep(0.3 + shuffle.random() / 5)  # it waits by now, and is anywhere in one of its pauses
            registry.note("plain-0", "a change")
            told = time.perf_counter()
            yield max(0.0, waiting.result() - told)
