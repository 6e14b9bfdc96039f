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
from addenda.benchmarks.cost import Run, interleave, random_task
from addenda.benchmarks.registry.registry_fill import disk_bytes, fill
from addenda.benchmarks.report.tables import Figure, write
from addenda.combined import feature_statistics, numerics, numerics_fingerprint, tensor_digest
from addenda.combined.probe_inputs import NUM_PROBES
from addenda.exceptions import RegistryError
from addenda.files import output_folder
from addenda.learner import LearnConfig
from addenda.learner.objectives import SingleLabel
from addenda.registry import FeatureStatistics, Golden, Registry, Task, TaskFilter
from addenda.terminal import progress

CPU = torch.device("cpu")
IMAGES, PAGE = 500, 100
LABELS = tuple(f"class {number}" for number in range(10))
TARGETS = torch.arange(IMAGES, dtype=torch.int64, device="cpu") % len(LABELS)
REGISTER_PER_S, LOAD_MS_EACH, PAGE_MS = 100, 2, 50
CHUNKS = 20
"""Parts of a series of registrations, each of which gives a rate."""


def run_registry(
    backbone: FrozenBackbone,
    locations: Sequence[str] = (),
    out: Path | None = None,
    quick: bool = False,
    num_tasks: int = 1000,
    num_listed: int = 100_000,
) -> list[Figure]:
    """Measures a new SQLite file, then the empty databases given, which stay filled, and prints a table.

    Half of the `num_tasks`, 40 at least, have statistics. The SQLite file lies in `out` while it is measured, else
    where temporary files do, which may be no disk.
    """
    if quick:
        num_tasks, num_listed = min(num_tasks, 100), min(num_listed, 5000)
    if out is not None:
        output_folder(out)
    figures: list[Figure] = []
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
            figures += _measure(registry, place, backbone, num_tasks, num_listed, 5 if quick else 20, report)
    device = numerics(backbone)["device"]
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


def _measure(
    registry: Registry,
    location: str,
    backbone: FrozenBackbone,
    num_tasks: int,
    num_listed: int,
    rounds: int,
    report: Callable[[str, int, int], None],
) -> Iterator[Figure]:
    """All of one database, in order: the tasks registered first are those that are loaded and listed."""
    dialect = registry._engine.dialect
    group = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}[dialect.name]
    group = f"{group} {'.'.join(map(str, dialect.server_version_info or ()))}"
    figure, count = partial(Figure.of_rounds, group), num_tasks // 2
    others = [f"{number:064x}" for number in range(1, 5)]
    for fingerprint in (backbone.fingerprint, *others):
        registry.add_backbone({**backbone.record(), "fingerprint": fingerprint})
    sums = feature_statistics(_normal(0, IMAGES, backbone.embed_dim), TARGETS, len(LABELS))
    for what, kept in (("registered without statistics", None), ("registered with statistics", sums)):
        before, seconds = disk_bytes(registry), []
        for done, new in enumerate(_new(backbone, count, kept), 1):
            start = time.perf_counter()
            registry.register(*new)
            seconds.append(time.perf_counter() - start)
            report(f"{group}: registering, statistics {kept is not None}", done, count)
        weight = (disk_bytes(registry) - before) / count / 1000
        size = -(-count // CHUNKS)
        chunks = [seconds[start : start + size] for start in range(0, count, size)]
        yield figure(what, "per s", [len(chunk) / sum(chunk) for chunk in chunks], REGISTER_PER_S, more=True)
        yield Figure(group, f"a task {what}, on disk", "kB", weight)
        if "://" not in location:  # what no database can beat that logs each change before it makes it
            rates = _disk_alone(Path(location).parent, int(1000 * weight))
            yield figure("these bytes twice, the disk alone", "per s", rates)
    report(f"{group}: filling the list", 0, 1)
    fill(registry, _small_task(), others, num_listed)
    report(f"{group}: filling the list", 1, 1)
    loads = interleave({"load": lambda: registry.load(backbone)}, max(3, rounds // 4), CPU)["load"]
    yield figure(f"{num_tasks:,} tasks read and hashed", "s", loads, LOAD_MS_EACH * num_tasks / 1000)
    for page, seconds in interleave(_pages(registry, others[1], num_listed), rounds, CPU).items():
        yield figure(f"page: {page}", "ms", [1000 * value for value in seconds], PAGE_MS)
    report(f"{group}: waiting for changes", 0, 1)
    noticed = [1000 * value for value in _notice(registry, location, rounds)]
    report(f"{group}: waiting for changes", 1, 1)
    yield figure("a change noticed by wait()", "ms", noticed)


def _new(
    backbone: FrozenBackbone, count: int, kept: FeatureStatistics | None
) -> Iterator[tuple[Task, Golden, FeatureStatistics | None]]:
    """What `register` takes of tasks, of content that nothing was computed of before."""
    described = numerics(backbone)
    under = numerics_fingerprint(described)
    for number in range(count):
        name, seed = (f"plain-{number}", number) if kept is None else (f"known-{number}", 2 * count + number)
        task = replace(random_task(backbone, seed), name=name, labels=LABELS, **_told())
        logits = _normal(seed, NUM_PROBES, len(LABELS))
        statistics = None if kept is None else replace(kept, sums=_normal(seed, *kept.sums.shape))
        yield task, Golden(described, under, logits, tensor_digest(logits)), statistics


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
    measured = SingleLabel().score(_normal(0, IMAGES, len(LABELS)), TARGETS, LABELS)
    both = {"validation": measured, "test": measured}
    return {
        "config": LearnConfig().to_json(),
        "metrics": dict.fromkeys(("linear_probe", "layer_probe"), both) | both,
        "data": {"num_images": IMAGES, "counts": dict.fromkeys(LABELS, IMAGES // len(LABELS)), "skipped": []},
    }


def _small_task() -> Task:
    """Of few numbers, since a list reads none of them."""
    weight, bias, token, memory = (
        _normal(0, len(LABELS), 8),
        _normal(0, len(LABELS)),
        _normal(0, 8),
        _normal(0, 1, 1, 8),
    )
    return Task("line", "", LABELS, weight, bias, token, memory, **_told())


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
