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
        score: its headline metric on the test images, else on the validation part; None where neither was measured.
        data: what it was learned from.
        extends: references of its parents, in order.
        aliases: the aliases that point at this version.
        tags: its tags.
        retired: why it was retired; None while it is active.
        generation: the registry's generation that began with it.
        code_version: Addenda's version that learned it.
        packages: versions of Python and of the packages that had a part in learning it.
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
    score: float | None
    data: dict[str, Any]
    extends: tuple[str, ...]
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    retired: str | None
    generation: int
    code_version: str
    packages: dict[str, str]
    created_by: str
    created_at: str

    @property
    def ref(self) -> str:
        """`name:version`."""
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class Scoring:
    """One scoring of a task: on what, under which numerics, and what came out.

    Attributes:
        data_fingerprint: of the images and their labels.
        numerics_fingerprint: under which it was made.
        metrics: the figures.
        logits_digest: sha256 over the logits in the order of the images' contents, with `2:` before it; without, of
            version 0.1 and in the order of the files.
    """

    data_fingerprint: str
    numerics_fingerprint: str
    metrics: dict[str, Any]
    logits_digest: str


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Scoring):
    """A scoring as it was recorded: of which task, at which generation, by whom and when.

    An imported one keeps the generation of the registry where it was made; `event_id` is the import's here.
    """

    task: str
    generation: int
    event_id: int
    created_by: str
    created_at: str
