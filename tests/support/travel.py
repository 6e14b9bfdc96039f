"""Registries whose tasks are transferred to others, and what must be the same afterwards."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterable
from typing import Any

from addenda.registry import Received, Registry, Task
from tests.support.registries import BACKBONE, a_statistic, a_task, adapters, probe, same_content

FULL = {"adapted:1", "bare:1", "digits:1", "digits:2", "old:1", "strokes:1", "tip:1"}


def add(registry: Registry, task: Task, **options: Any) -> Task:
    return registry.register(task, probe(task), a_statistic(len(task.labels)), **options)


def fill(location: str) -> str:
    """Creates a registry with a row in every table: a chain, a head-only task, adapters, two versions, one retired."""
    with Registry.open(location, user="ada") as registry:
        registry.add_backbone(BACKBONE)
        strokes = add(registry, a_task("strokes", 1))
        measured = {"metrics": {"test": {"accuracy": 0.1 + 0.2}}, "config": {"epochs": 20}, "data": {"count": 12}}
        digits = add(registry, a_task("digits", 2, parents=(strokes,), **measured))
        add(registry, a_task("digits", 3), new_version=True)
        add(registry, a_task("tip", 4, parents=(digits, strokes), temperature=1.5))
        registry.register(bare := a_task("bare", 5, class_token=None, memory=None, pooled_weight=None), probe(bare))
        add(registry, a_task("adapted", 6, adapters=adapters(), labels=("\x1b[31m", "é\n", "🦆")))
        add(registry, a_task("old", 7))
        registry.retire("old", "superseded")
        registry.set_alias("digits", "production", 1)
        registry.tag("digits:1", "site=oslo")
        registry.add_golden("digits:1", dataclasses.replace(probe(digits), numerics_fingerprint="z" * 64))
        for accuracy in (0.5, 1 / 3):
            registry.add_evaluation("digits:1", "d" * 64, "n" * 64, {"accuracy": accuracy}, "l" * 64)
    return location


def states(received: Iterable[Received]) -> dict[str, str]:
    return {each.ref: each.state for each in received}


def assert_same(here: Registry, there: Registry, refs: Iterable[str]) -> None:
    """Asserts that tasks have the same records, content, golden probes, statistics and evaluations in both."""
    for ref in refs:
        mine, theirs = here.record(ref), there.record(ref)
        local = {"generation": 0, "aliases": ()}
        assert dataclasses.replace(mine, **local) == dataclasses.replace(theirs, **local)
        assert same_content(here.get(ref), there.get(ref))
        assert [(g.numerics_fingerprint, g.digest) for g in here.goldens(ref)] == [
            (g.numerics_fingerprint, g.digest) for g in there.goldens(ref)
        ]
        received, sent = here.statistics(ref), there.statistics(ref)
        assert (received and received.data) == (sent and sent.data)
        assert [dataclasses.replace(e, event_id=0) for e in here.evaluations(ref)] == [
            dataclasses.replace(e, event_id=0) for e in there.evaluations(ref)
        ]


def imports(location: str, path: str) -> None:
    with Registry.open(location) as registry:
        registry.import_bundle(path)


def export_and_die(location: str, path: str, when: str) -> None:
    """Kills the export while it writes its file, or just before it renames the file."""
    with Registry.open(location) as registry:
        if when == "unnamed":
            os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        else:
            os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        registry.export(["large"], path)


def merges(location: str, other: str) -> None:
    with Registry.open(location) as here, Registry.open(other) as there:
        here.merge(there)
