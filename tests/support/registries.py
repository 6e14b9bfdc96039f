"""Tasks with tiny tensors, registries with a row in every table, and verification of their ledger."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sqlalchemy import select

from addenda.registry import Evaluation, FeatureStatistics, Golden, LowRank, Registry, Task, digest
from addenda.registry.store import ledger, schema
from addenda.registry.store.database import connect, reading

FINGERPRINT = "b" * 64
BACKBONE = {
    "fingerprint": FINGERPRINT,
    "name": "tiny",
    "source": "hub",
    "precision": "float32",
    "preprocessing": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5]},
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "num_tokens": 17,
    "num_parameters": 1234,
}
HERE = SimpleNamespace(fingerprint=FINGERPRINT)
TENSORS = ("class_token", "memory", "head_weight", "head_bias", "pooled_weight")
EVALUATION = Evaluation("d" * 64, "n" * 64, {"accuracy": 0.75}, "l" * 64)


def a_task(name: str = "digits", seed: int = 0, **changes: Any) -> Task:
    noise = torch.Generator().manual_seed(seed)
    content = {
        "backbone": FINGERPRINT,
        "labels": ("zero", "one", "two"),
        "class_token": torch.randn(8, generator=noise),
        "memory": torch.randn(2, 4, 8, generator=noise),
        "head_weight": torch.randn(3, 8, generator=noise),
        "head_bias": torch.randn(3, generator=noise),
        "pooled_weight": torch.randn(3, 8, generator=noise),
    }
    return Task(name=name, **{**content, **changes})


def a_large_task(name: str = "large", **changes: Any) -> Task:
    """A task of 2.6 MB, more than SQLite buffers before it writes."""
    width = 72_000
    heads = {key: torch.full((3, width), 0.5) for key in ("head_weight", "pooled_weight")}
    return a_task(name, class_token=torch.zeros(width), memory=torch.full((2, 1, width), 0.5), **heads, **changes)


def adapters(width: int = 8, depth: int = 2, rank: int = 3, hidden: int = 12, seed: int = 5) -> dict[str, LowRank]:
    noise = torch.Generator().manual_seed(seed)
    ends = {"q": (width, width), "proj": (width, width), "fc1": (width, hidden), "fc2": (hidden, width)}
    return {
        site: LowRank(
            torch.randn(depth, rank, fan_in, generator=noise), torch.randn(depth, fan_out, rank, generator=noise)
        )
        for site, (fan_in, fan_out) in ends.items()
    }


def probe(task: Task, numerics: str = "n" * 64) -> Golden:
    logits = torch.arange(4.0 * len(task.labels)).view(4, -1)
    return Golden({"torch": "any"}, numerics, logits, digest(logits.numpy().tobytes()))


def a_statistic(num_classes: int = 3, **changes: Any) -> FeatureStatistics:
    noise = torch.Generator().manual_seed(3)
    content = {
        "counts": torch.arange(num_classes) + 4,
        "sums": torch.randn(num_classes, 9, generator=noise),
        "gram": torch.randn(45, generator=noise),
        "sample": torch.randn(6, 8, generator=noise),
        "sample_targets": torch.arange(6) % num_classes,
        "layer_sums": torch.randn(num_classes, 3, generator=noise),
        "layer_gram": torch.randn(6, generator=noise),
        "layer_sample": torch.randn(6, 3, generator=noise),
    }
    return FeatureStatistics(**{**content, **changes})


def keep(registry: Registry, task: Task, new_version: bool = False) -> Task:
    return registry.register(task, probe(task), a_statistic(), new_version)


def fill(registry: Registry) -> None:
    """Adds a row to every table of a registry that has the backbone."""
    parent = keep(registry, a_task("strokes", 1))
    keep(registry, a_task("digits", 2, parents=(parent,), metrics={"test": {"accuracy": 0.9}}))
    keep(registry, a_task("old", 3))
    registry.retire("old", "superseded")
    registry.set_alias("digits", "production", 1)
    registry.add_evaluation("digits", *vars(EVALUATION).values())
    registry.add_golden("digits", probe(parent, "m" * 64))
    registry.tag("digits", "shop")


def same_content(task: Task, other: Task) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else a.numpy().tobytes() == b.numpy().tobytes() and a.shape == b.shape

    def factors(task: Task) -> dict[str, torch.Tensor]:
        updates = (task.adapters or {}).items()
        return {f"{site}.{i}": factor for site, update in updates for i, factor in enumerate(update)}

    return (
        all(equal(getattr(task, name), getattr(other, name)) for name in TENSORS)
        and factors(task).keys() == factors(other).keys()
        and all(equal(factor, factors(other)[name]) for name, factor in factors(task).items())
        and (task.backbone, task.labels, task.objective) == (other.backbone, other.labels, other.objective)
        and task.temperature == other.temperature
        and [parent.sha256 for parent in task.parents] == [parent.sha256 for parent in other.parents]
    )


def verify_ledger(location: str) -> int:
    """Recomputes the digest of every event and returns their number, which is the generation."""
    engine = connect(location, create=False)
    try:
        with reading(engine) as connection:
            last, previous, numbers = ledger.generation(connection), "", []
            written = ledger.written(connection, 1, last)
            for event in connection.execute(select(schema.event).order_by(schema.event.c.id)):
                previous = ledger.seal(previous, event._mapping, written.get(event.id, []))
                assert event.digest == previous, f"event {event.id} ({event.kind} {event.subject}) does not verify"
                numbers.append(event.id)
    finally:
        engine.dispose()
    assert numbers == list(range(1, last + 1)), "events are missing"
    return last
