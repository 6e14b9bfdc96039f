"""Columns of the registry's rows, defined once for tables, records and bundles."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Stamped:
    """Author and time of a row. The time is ISO 8601 text in UTC: the same on every database, and sortable."""

    created_by: str
    created_at: str


@dataclass(frozen=True, kw_only=True)
class BackboneRow(Stamped):
    """A frozen backbone, as `FrozenBackbone.record` describes it, with author and time."""

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
    """Columns that a task's row and its record share."""

    name: str
    version: int  # number under that name, from 1
    backbone: str  # the backbone's fingerprint
    labels: tuple[str, ...]  # class names
    num_memory_tokens: int  # m, per layer
    num_parameters: int  # parameters added to the backbone
    objective: str  # a key of MEANINGS
    config: dict[str, Any]  # resolved training configuration
    metrics: dict[str, Any]  # measured during training
    # Headline metric on the test split, or else on the validation split; None if neither was measured.
    score: float | None = field(metadata={"default_in_old_rows": None})
    data: dict[str, Any]  # fingerprint, counts and labels of the training data
    code_version: str  # Addenda version that trained the task
    # Versions of Python and of the packages that training depends on.
    packages: dict[str, str] = field(metadata={"default_in_old_rows": {}})
    created_by: str  # author
    created_at: str  # ISO 8601 in UTC


@dataclass(frozen=True, kw_only=True)
class TaskRow(TaskColumns):
    """A task's row; `artifact` is its artifact's sha256."""

    artifact: str


@dataclass(frozen=True, kw_only=True)
class TaskRecord(TaskColumns):
    """One registered version of a task.

    Attributes:
        sha256: the artifact's digest.
        size_bytes: the artifact's size.
        adapter_rank: r, the adapters' rank, 0 without adapters; None if the stored artifact is damaged.
        temperature: of temperature scaling; None if the stored artifact is damaged.
        has_token: whether the task has a class token; None if the stored artifact is damaged.
        num_layer_features: n, the layer features that the head reads, 0 without a layer head; None if the stored
            artifact is damaged.
        statistics_bytes: size of the routing statistics, 0 without.
        extends: references of the parents, in order.
        aliases: aliases that point at this version.
        tags: the version's tags.
        retired: reason of the retirement; None for an active version.
        generation: the registry's generation after the registration.
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
    def grown_from(self) -> str | None:
        """`name:version` of the version that this one was grown from; None for a task learned at once."""
        grown = self.data.get("grown_from")
        return None if grown is None else f"{self.name}:{grown['version']}"

    @property
    def reads(self) -> str:
        """The features that the head reads, in words."""
        if self.has_token is None:
            return "damaged"
        inputs = ["the pooled feature"]
        if self.has_token:
            memory = f"{self.num_memory_tokens} memory token{'' if self.num_memory_tokens == 1 else 's'} in each layer"
            inputs = [f"a class token with {memory}"]
            inputs += [f"adapters of rank {self.adapter_rank}"] if self.adapter_rank else []
        inputs += [f"{self.num_layer_features:,} layer features"] if self.num_layer_features else []
        return ", ".join(inputs)


@dataclass(frozen=True, kw_only=True)
class GoldenRow(Stamped):
    """A golden probe, without its logits; `digest` is their sha256."""

    numerics_fingerprint: str
    numerics: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: metrics of a task on labelled data.

    Attributes:
        data_fingerprint: fingerprint of the images and their labels.
        numerics_fingerprint: fingerprint of the numerics it was computed under.
        metrics: the metrics.
        logits_digest: `2:` and the sha256 of the logits, ordered by image content. Version 0.1 wrote no prefix and
            ordered the logits by file.
    """

    data_fingerprint: str
    numerics_fingerprint: str
    metrics: dict[str, Any]
    logits_digest: str


@dataclass(frozen=True, kw_only=True)
class EvaluationRow(Stamped, Evaluation):
    """An evaluation as recorded; `generation` is that of the registry where it was made."""

    generation: int


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(EvaluationRow):
    """A recorded evaluation with its task and event; an imported evaluation has the event of the import."""

    task: str
    event_id: int


@dataclass(frozen=True, kw_only=True)
class RetirementRow(Stamped):
    """The retirement of a task."""

    reason: str


@dataclass(frozen=True)
class Event:
    """One change of a registry.

    Attributes:
        id: counts from 1 without gaps; the registry's generation after the change.
        kind: backbone, registered, imported, golden, evaluated, alias, tagged, untagged, noted, retired or upgraded.
        subject: the task version, alias or backbone.
        details: further values, by kind.
        created_by: the author.
        created_at: ISO 8601 in UTC.
        digest: sha256 of the attributes above, the rows that the event wrote, and the previous event's digest.
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
"""The rows that event digests cover and bundles contain, by table."""


def columns_of(rows: type) -> list[str]:
    """The names of a row's columns."""
    return [column.name for column in fields(rows)]


def default_of(column: Field[Any]) -> Any:
    """A column's default, or MISSING."""
    return column.default if column.default_factory is MISSING else column.default_factory()


def defaults(rows: type) -> dict[str, Any]:
    """The values that later-added columns have in older rows; event digests and bundles omit them.

    Columns added before bundles existed are always in a bundle: they have `default_in_old_rows` but no default.
    """
    values = {column.name: column.metadata.get("default_in_old_rows", default_of(column)) for column in fields(rows)}
    return {name: value for name, value in values.items() if value is not MISSING}
