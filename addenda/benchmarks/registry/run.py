"""`addenda bench registry`: what a registry takes to register, load, list and tell of a change, on each database."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.cost.interleaving import Run, interleave
from addenda.benchmarks.registry.filling import database_version, disk_bytes, fill
from addenda.benchmarks.report.measured import Figure, write
from addenda.combined import feature_statistics, numerics, numerics_fingerprint, tensor_digest
from addenda.combined.probes import NUM_PROBES
from addenda.exceptions import RegistryError
from addenda.files import output_folder
from addenda.learner import LearnConfig
from addenda.learner.metrics import score
from addenda.registry import FeatureStatistics, Golden, Registry, Task, TaskFilter
from addenda.terminal import progress

MEMORY, IMAGES, PAGE = 5, 500, 100
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
    described, figures = numerics(backbone), []
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
            rounds = 5 if quick else 20
            figures += _measure(registry, place, backbone, described, num_tasks, num_listed, rounds, report)
    details = {
        "command": f"addenda bench registry --tasks {num_tasks} --listed {num_listed}"
        + " --registry URL" * len(locations),
        "backbone": backbone.name,
        "device": described["device"],
        "num_tasks": num_tasks,
        "num_listed": num_listed,
    }
    title = f"{num_tasks:,} tasks of {backbone.name}, {num_listed:,} more listed; {described['device']}"
    write("registry", title, figures, details, out)
    return figures


def _measure(
    registry: Registry,
    location: str,
    backbone: FrozenBackbone,
    described: dict[str, Any],
    num_tasks: int,
    num_listed: int,
    rounds: int,
    report: Report,
) -> list[Figure]:
    name, record = database_version(registry), backbone.record()
    others = [f"{number:064x}" for number in range(1, 5)]
    for fingerprint in (backbone.fingerprint, *others):
        registry.add_backbone({**record, "fingerprint": fingerprint})
    noise, figures = torch.Generator().manual_seed(0), []
    sums = feature_statistics(
        torch.randn(IMAGES, backbone.embed_dim, generator=noise, dtype=torch.float32, device="cpu"),
        torch.arange(IMAGES, dtype=torch.int64, device="cpu") % len(LABELS),
        len(LABELS),
    )
    for kept in (None, sums):
        before, seconds = disk_bytes(registry), []
        for number in range(num_tasks // 2):
            seconds.append(_register(registry, backbone, described, number, kept, noise))
            report(f"{name}: registering, statistics {kept is not None}", number + 1, num_tasks // 2)
        what = "registered without statistics" if kept is None else "registered with statistics"
        weight = (disk_bytes(registry) - before) / len(seconds) / 1000
        size = -(-len(seconds) // CHUNKS)
        chunks = [seconds[start : start + size] for start in range(0, len(seconds), size)]
        rates = [len(chunk) / sum(chunk) for chunk in chunks]
        figures += [
            Figure.of_rounds(name, what, "per s", rates, REGISTER_PER_S, more=True),
            Figure(name, f"a task {what}, on disk", "kB", weight),
        ]
        if "://" not in location:  # what no database can beat that logs each change before it makes it
            rates = _disk_alone(Path(location).parent, int(1000 * weight))
            figures.append(Figure.of_rounds(name, "these bytes twice, the disk alone", "per s", rates, None))
    report(f"{name}: filling the list", 0, 1)
    fill(registry, _small_task(), others, num_listed)
    report(f"{name}: filling the list", 1, 1)
    loads = interleave({"load": lambda: registry.load(backbone)}, max(3, rounds // 4), torch.device("cpu"))["load"]
    target = LOAD_MS_EACH * num_tasks / 1000
    figures.append(Figure.of_rounds(name, f"{num_tasks:,} tasks read and hashed", "s", loads, target))
    pages = interleave(_pages(registry, others[1], num_listed), rounds, torch.device("cpu"))
    figures += [
        Figure.of_rounds(name, f"page: {what}", "ms", [1000 * value for value in seconds], PAGE_MS)
        for what, seconds in pages.items()
    ]
    report(f"{name}: waiting for changes", 0, 1)
    noticed = [1000 * value for value in _notice(registry, location, rounds)]
    report(f"{name}: waiting for changes", 1, 1)
    return [*figures, Figure.of_rounds(name, "a change noticed by wait()", "ms", noticed, None)]


def _register(
    registry: Registry,
    backbone: FrozenBackbone,
    described: dict[str, Any],
    number: int,
    kept: FeatureStatistics | None,
    noise: torch.Generator,
) -> float:
    """Seconds that one registration takes, of content that nothing was computed of before."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float32, device="cpu")

    count, width = len(LABELS), backbone.embed_dim
    logits = normal(NUM_PROBES, count)
    probe = Golden(described, numerics_fingerprint(described), logits, tensor_digest(logits))
    statistics = None if kept is None else replace(kept, sums=normal(*kept.sums.shape))
    task = Task(
        name=f"{'plain' if kept is None else 'known'}-{number}",
        backbone=backbone.fingerprint,
        labels=LABELS,
        class_token=normal(width),
        memory=normal(backbone.depth, MEMORY, width),
        head_weight=normal(count, width),
        head_bias=normal(count),
        pooled_weight=normal(count, width),
        **_told(),
    )
    start = time.perf_counter()
    registry.register(task, probe, statistics)
    return time.perf_counter() - start


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
    noise = torch.Generator().manual_seed(0)
    logits, targets = (
        torch.randn(IMAGES, len(LABELS), generator=noise, dtype=torch.float32, device="cpu"),
        torch.arange(IMAGES, dtype=torch.int64, device="cpu") % len(LABELS),
    )
    measured = score(logits, targets, LABELS, "single-label")
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
