"""What the registry tells about a task without loading its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskRecord:
    """One registered version of a task.

    Attributes:
        name: its name.
        version: its number under that name, from 1.
        backbone: fingerprint of its backbone.
        sha256: its artifact's digest.
        size_bytes: its artifact's size.
        statistics_bytes: the size of what a router knows of its images; 0 where it knows nothing.
        labels: class names.
        num_memory_tokens: m.
        num_parameters: numbers that it adds to the backbone.
        objective: how its logits are read.
        config: the resolved configuration that made it.
        metrics: what was measured when it was learned.
        data: what it was learned from.
        extends: references of its parents, in order.
        aliases: the aliases that point at this version.
        retired: why it was retired; None while it is active.
        created_by: who registered it.
        created_at: when, ISO 8601 in UTC.
    """

    name: str
    version: int
    backbone: str
    sha256: str
    size_bytes: int
    statistics_bytes: int
    labels: tuple[str, ...]
    num_memory_tokens: int
    num_parameters: int
    objective: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    data: dict[str, Any]
    extends: tuple[str, ...]
    aliases: tuple[str, ...]
    retired: str | None
    created_by: str
    created_at: str

    @property
    def ref(self) -> str:
        """`name:version`."""
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class EvaluationRecord:
    """One scoring of a task: on what, at which generation, under which numerics, and what came out."""

    task: str
    data_fingerprint: str
    generation: int
    numerics_fingerprint: str
    metrics: dict[str, Any]
    logits_digest: str
    created_by: str
    created_at: str
