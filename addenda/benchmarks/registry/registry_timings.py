"""`addenda bench registry`: time to register, load and list tasks and to notice a change, on each database."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import addenda
from addenda.backbones import FrozenBackbone
from addenda.benchmarks.cost import Run, interleave, random_task
from addenda.benchmarks.report.tables import Figure, write
from addenda.combined import feature_statistics, numerics, numerics_fingerprint, tensor_digest
from addenda.combined.probe_inputs import NUM_PROBES
from addenda.exceptions import RegistryError
from addenda.files import output_folder
from addenda.learner import LearnConfig
from addenda.learner.context import Report
from addenda.learner.objectives import SingleLabel
from addenda.registry import FeatureStatistics, Golden, Registry, Task, TaskFilter
from addenda.registry.store import ledger, schema
from addenda.registry.store.database import database_errors, reading, writing
from addenda.registry.store.registration import derived, packages
from addenda.terminal import progress

if TYPE_CHECKING:
    from sqlalchemy import Connection

CPU = torch.device("cpu")
IMAGES, PAGE = 500, 100
LABELS = tuple(f"class {number}" for number in range(10))
TARGETS = torch.arange(IMAGES, dtype=torch.int64, device="cpu") % len(LABELS)
REGISTER_PER_S, LOAD_MS_EACH, PAGE_MS = 100, 2, 50
"""Targets."""
CHUNKS = 20
"""Number of chunks of a series of registrations; the rate of each chunk is one measurement."""
BATCH = 1000
"""Number of tasks that `fill` writes at once."""


def run_registry(
    backbone: FrozenBackbone,
    locations: Sequence[str] = (),
    out: Path | None = None,
    quick: bool = False,
    num_tasks: int = 1000,
    num_listed: int = 100_000,
) -> list[Figure]:
    """Measures a new SQLite file and the given empty databases, which remain filled, and prints a table.

    Half of the `num_tasks` (at least 40) have routing statistics. The SQLite file is created in `out`, or else in the
    folder for temporary files, which may not be on a disk.
    """
    if quick:
        num_tasks, num_listed = min(num_tasks, 100), min(num_listed, 5000)
    if out is not None:
        output_folder(out)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=out) as folder, ExitStack() as stack, progress() as report:
        all_locations = [f"{folder}/registry.db", *locations]
        registries = [stack.enter_context(Registry.open(location)) for location in all_locations]
        for registry in registries:
            if registry.generation:
                raise RegistryError(
                    f"{registry.location!r} has a registry at generation {registry.generation}, and the benchmark "
                    "would fill it; give an empty database."
                )
        for registry, location in zip(registries, all_locations, strict=True):
            figures += _measure(registry, location, backbone, num_tasks, num_listed, 5 if quick else 20, report)
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
    report: Report,
) -> Iterator[Figure]:
    """All measurements of one database, in this order: the tasks registered first are then loaded and listed."""
    dialect = registry._engine.dialect
    kind = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}[dialect.name]
    group = f"{kind} {'.'.join(map(str, dialect.server_version_info or ()))}"
    figure, count = partial(Figure.of_rounds, group), num_tasks // 2
    others = [f"{number:064x}" for number in range(1, 5)]
    for fingerprint in (backbone.fingerprint, *others):
        registry.add_backbone({**backbone.record(), "fingerprint": fingerprint})
    routing = feature_statistics(_normal(0, IMAGES, backbone.embed_dim), TARGETS, len(LABELS))
    for what, statistics in (("registered without statistics", None), ("registered with statistics", routing)):
        before, seconds = _disk_bytes(registry), []
        for done, arguments in enumerate(_registrations(backbone, count, statistics), 1):
            start = time.perf_counter()
            registry.register(*arguments)
            seconds.append(time.perf_counter() - start)
            report(f"{group}: tasks {what}", done, count)
        task_kb = (_disk_bytes(registry) - before) / count / 1000
        size = -(-count // CHUNKS)
        chunks = [seconds[start : start + size] for start in range(0, count, size)]
        yield figure(what, "per s", [len(chunk) / sum(chunk) for chunk in chunks], REGISTER_PER_S, more=True)
        yield Figure(group, f"a task {what}, on disk", "kB", task_kb)
        if "://" not in location:  # an upper bound for any database with a write-ahead log
            rates = _disk_rates(Path(location).parent, int(1000 * task_kb))
            yield figure("these bytes twice, the disk alone", "per s", rates)
    report(f"{group}: filling the list", 0, 1)
    head = _normal(0, len(LABELS), 8), _normal(0, len(LABELS))
    small = Task("line", "", LABELS, *head, _normal(0, 8), _normal(0, 1, 1, 8), **_details())  # no tensors are listed
    fill(registry, small, others, num_listed)
    report(f"{group}: filling the list", 1, 1)
    loads = interleave({"load": lambda: registry.load(backbone)}, max(3, rounds // 4), CPU)["load"]
    yield figure(f"{num_tasks:,} tasks read and hashed", "s", loads, LOAD_MS_EACH * num_tasks / 1000)
    for page, seconds in interleave(_pages(registry, others[1], num_listed), rounds, CPU).items():
        yield figure(f"page: {page}", "ms", [1000 * value for value in seconds], PAGE_MS)
    report(f"{group}: waiting for changes", 0, 1)
    delays = [1000 * value for value in _notice_delays(registry, location, rounds)]
    report(f"{group}: waiting for changes", 1, 1)
    yield figure("a change noticed by wait()", "ms", delays)


def _registrations(
    backbone: FrozenBackbone, count: int, statistics: FeatureStatistics | None
) -> Iterator[tuple[Task, Golden, FeatureStatistics | None]]:
    """Arguments of `register` for new tasks, whose digests are not cached yet."""
    described = numerics(backbone)
    for number in range(count):
        name, seed = (f"plain-{number}", number) if statistics is None else (f"known-{number}", 2 * count + number)
        task = replace(random_task(backbone, seed), name=name, labels=LABELS, **_details())
        logits = _normal(seed, NUM_PROBES, len(LABELS))
        golden = Golden(described, numerics_fingerprint(described), logits, tensor_digest(logits))
        yield task, golden, statistics and replace(statistics, sums=_normal(seed, *statistics.sums.shape))


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def _disk_rates(folder: Path, num_bytes: int) -> list[float]:
    """How many times per second `num_bytes` can be written to two files and synced to disk."""
    data, rates = random.Random(0).randbytes(num_bytes), []
    with tempfile.TemporaryFile(dir=folder) as log, tempfile.TemporaryFile(dir=folder) as database:
        for _ in range(CHUNKS):
            start = time.perf_counter()
            for file in (log, database):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            rates.append(1 / (time.perf_counter() - start))
    return rates


def _details() -> dict[str, Any]:
    """Config, metrics and data of a task, of the size that they have for a learned task."""
    metrics = SingleLabel().score(_normal(0, IMAGES, len(LABELS)), TARGETS, LABELS)
    splits = {"validation": metrics, "test": metrics}
    return {
        "config": LearnConfig().to_json(),
        "metrics": dict.fromkeys(("linear_probe", "layer_probe"), splits) | splits,
        "data": {"num_images": IMAGES, "counts": dict.fromkeys(LABELS, IMAGES // len(LABELS)), "skipped": []},
    }


def _pages(registry: Registry, fingerprint: str, num_listed: int) -> dict[str, Run]:
    """Queries for a page of the list that `fill` makes, by filter; some match many tasks, others few or none."""
    middle = f"line-00-{num_listed // 400}:1"
    queries = {
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
    return {name: partial(registry.tasks, chosen, PAGE, before) for name, (chosen, before) in queries.items()}


def _notice_delays(registry: Registry, location: str, rounds: int) -> Iterator[float]:
    """Seconds from a change until `wait` returns in another registry object with its own connections."""
    noise = random.Random(0)
    with Registry.open(location) as other, ThreadPoolExecutor(1) as pool:

        def wait(after: int) -> float:
            other.wait(after, timeout_s=10)
            return time.perf_counter()

        for _ in range(rounds):
            waiting = pool.submit(wait, registry.generation)
            time.sleep(0.3 + noise.random() / 5)  # by now it waits, at a random point of its polling interval
            registry.note("plain-0", "a change")
            changed = time.perf_counter()
            yield max(0.0, waiting.result() - changed)


def fill(registry: Registry, template: Task, backbones: Sequence[str], count: int) -> None:
    """Adds tasks with sealed events as `register` does, in batches, but without golden probes and routing statistics.

    The names are `line-00-0` to `line-99-N` with two versions each. The backbones (at most 20) are used in rotation;
    scores are spread over 0 to 1, and creation times are a minute apart from 2020 on. Every tenth task is tagged
    `audited`, every thousandth `pilot`; every twentieth extends the first; every hundredth is retired.
    """
    with database_errors("The registry was not filled"), writing(registry._engine) as connection:
        offset = ledger.next_id(connection, schema.task)
        for start in range(0, count, BATCH):
            _add(connection, template, backbones, range(start, min(start + BATCH, count)), offset)
    if registry._engine.dialect.name == "postgresql":  # as autovacuum would do some time later
        with registry._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")


def _disk_bytes(registry: Registry) -> int:
    """Size of a registry's database on disk, without its write-ahead log."""
    sizes = {
        "sqlite": "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()",
        "postgresql": "SELECT pg_database_size(current_database())",
    }
    with reading(registry._engine) as connection:
        return int(connection.exec_driver_sql(sizes[connection.dialect.name]).scalar_one())


def _add(connection: Connection, template: Task, backbones: Sequence[str], indexes: range, offset: int) -> None:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    events: list[dict[str, Any]] = []
    first = ledger.generation(connection) + 1

    def event(kind: str, subject: str, **details: str) -> int:
        events.append({"id": first + len(events), "kind": kind, "subject": subject, "details": details, **stamp})
        return first + len(events) - 1

    for index in indexes:
        task_id, name, version = offset + index, f"line-{index // 2 % 100:02}-{index // 200}", 1 + index % 2
        task = replace(
            template, name=name, backbone=backbones[index % len(backbones)], head_bias=template.head_bias + index,
            parents=(replace(template, backbone=backbones[0]),) if index and index % 20 == 0 else (),
        )  # fmt: skip
        ref, time = f"{name}:{version}", datetime(2020, 1, 1, tzinfo=UTC) + timedelta(minutes=index)
        stamp = {"created_by": "filler", "created_at": time.isoformat(timespec="microseconds")}
        rows["artifact"].append({"sha256": task.sha256, "data": task.artifact})
        rows["task"].append({
            **derived(task), "id": task_id, "name": name, "version": version, "artifact": task.sha256,
            "config": dict(task.config), "metrics": dict(task.metrics), "data": dict(task.data),
            "score": index * 7919 % 10_000 / 10_000,  # a prime factor, so that neighbours have distant scores
            "code_version": addenda.__version__, "packages": packages(),
            "event_id": event("registered", ref, sha256=task.sha256), **stamp,
        })  # fmt: skip
        if task.parents:
            rows["task_parent"].append({"task_id": task_id, "position": 0, "parent_id": offset})
        for tag, every in (("audited", 10), ("pilot", 1000)):
            if index % every == 3:
                rows["tag"].append({"task_id": task_id, "tag": tag})
                event("tagged", ref, tag=tag)
        if index % 100 == 7:
            number = event("retired", ref, reason="")
            rows["retirement"].append({"task_id": task_id, "reason": "", **stamp, "event_id": number})
    for table in schema.metadata.sorted_tables:
        if table.name in rows:
            connection.execute(table.insert(), rows[table.name])
    written = ledger.written(connection, first, first + len(events) - 1)
    latest = connection.execute(schema.event.select().where(schema.event.c.id == first - 1)).one_or_none()
    digest = latest.digest if latest else ""
    for row in events:
        digest = row["digest"] = ledger.seal(digest, row, written.get(row["id"], []))
    connection.execute(schema.event.insert(), events)
