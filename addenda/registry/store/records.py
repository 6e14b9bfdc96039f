"""What the registry keeps and tells: each column of a row once, for the tables, for records, and for bundles."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Stamped:
    """Who made a row, and when: ISO 8601 in UTC, as text, which has one form on every database and sorts."""

    created_by: str
    created_at: str


@dataclass(frozen=True, kw_only=True)
class BackboneRow(Stamped):
    """A frozen backbone; without who and when it is what `FrozenBackbone.record` gives."""

    fingerprint: str
    name: str
    source: str
    precision: str
    preprocessing: dict[str, Any]
    embed_dim: int
    depth: int
    num_heads: int
    num_tokens: int
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class TaskColumns:
    """What a task's row and its record share."""

    name: str
    version: int  # its number under that name, from 1
    backbone: str  # fingerprint of its backbone
    labels: tuple[str, ...]  # class names
    num_memory_tokens: int  # m, of each layer
    num_parameters: int  # numbers that it adds to the backbone
    objective: str  # how its logits are read
    config: dict[str, Any]  # the resolved configuration that made it
    metrics: dict[str, Any]  # what was measured when it was learned
    # Its headline metric on the test images, else on the validation part; None where neither was measured.
    score: float | None = field(metadata={"before": None})
    data: dict[str, Any]  # what it was learned from
    code_version: str  # Addenda's version that learned it
    # Versions of Python and of the packages that had a part in learning it.
    packages: dict[str, str] = field(metadata={"before": {}})
    created_by: str  # who registered it
    created_at: str  # when, ISO 8601 in UTC


@dataclass(frozen=True, kw_only=True)
class TaskRow(TaskColumns):
    """A task's row; `artifact` is a sha256."""

    artifact: str


@dataclass(frozen=True, kw_only=True)
class TaskRecord(TaskColumns):
    """One registered version of a task.

    Attributes:
        sha256: its artifact's digest.
        size_bytes: its artifact's size.
        adapter_rank: r, the rank of its adapters, 0 without; None where the stored artifact is damaged.
        temperature: what its logits are divided by to become probabilities; None likewise.
        has_token: whether it has a class token of its own; None likewise.
        num_layer_features: n, the layer features that its head reads, 0 without a layer head; None likewise.
        statistics_bytes: the size of what a router knows of its images; 0 where it knows nothing.
        extends: references of its parents, in order.
        aliases: the aliases that point at this version.
        tags: its tags.
        retired: why it was retired; None while it is active.
        generation: the registry's generation that began with it.
    """

    sha256: str
    size_bytes: int
    adapter_rank: int | None
    temperature: float | None
    has_token: bool | None
    num_layer_features: int | None
    statistics_bytes: int
    extends: tuple[str, ...]
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    retired: str | None
    generation: int

    @property
    def ref(self) -> str:
        """`name:version`."""
        return f"{self.name}:{self.version}"

    @property
    def reads(self) -> str:
        """What its head reads of the frozen network, in words."""
        if self.has_token is None:
            return "damaged"
        parts = ["the pooled feature"]
        if self.has_token:
            memory = f"{self.num_memory_tokens} memory token{'' if self.num_memory_tokens == 1 else 's'} in each layer"
            parts = [f"a class token with {memory}"]
            parts += [f"adapters of rank {self.adapter_rank}"] if self.adapter_rank else []
        parts += [f"{self.num_layer_features:,} layer features"] if self.num_layer_features else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class GoldenRow(Stamped):
    """A golden probe without its logits, whose sha256 is `digest`."""

    numerics_fingerprint: str
    numerics: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class Evaluation:
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
class EvaluationRow(Stamped, Evaluation):
    """A scoring as it was recorded, at a generation of the registry where it was made."""

    generation: int


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(EvaluationRow):
    """A recorded scoring, of which task, and the event here: an imported one's is the import's."""

    task: str
    event_id: int


@dataclass(frozen=True, kw_only=True)
class RetirementRow(Stamped):
    """Why a task was retired."""

    reason: str


@dataclass(frozen=True)
class Event:
    """One change of a registry.

    Attributes:
        id: its number, from 1 without gaps; the registry's generation after it.
        kind: what was done: backbone, registered, imported, golden, evaluated, alias, tagged, untagged, noted,
            retired, upgraded.
        subject: of which task version, alias or backbone.
        details: more of it, by kind.
        created_by: who did it.
        created_at: when, ISO 8601 in UTC.
        digest: sha256 over all this, the rows that it wrote, and the event before.
    """

    id: int
    kind: str
    subject: str
    details: dict[str, Any]
    created_by: str
    created_at: str
    digest: str


ROWS = {
    "backbone": BackboneRow,
    "task": TaskRow,
    "golden": GoldenRow,
    "evaluation": EvaluationRow,
    "retirement": RetirementRow,
}
"""The rows that events seal and bundles carry, by table."""


def columns_of(rows: type) -> list[str]:
    """The columns of a row."""
    return [column.name for column in fields(rows)]


def default_of(column: Field[Any]) -> Any:
    """A column's default; MISSING where it has none."""
    return column.default if column.default_factory is MISSING else column.default_factory()


def defaults(rows: type) -> dict[str, Any]:
    """What columns that later versions added hold in older rows: so much leaves a seal, or a bundle, as it was.

    Two came before there were bundles, which always carry them: they have no default, and say `before` alone.
    """
    found = {column.name: column.metadata.get("before", default_of(column)) for column in fields(rows)}
    return {name: value for name, value in found.items() if value is not MISSING}
