"""The registry's tables (design, section 6)."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)


def _id() -> Column[int]:
    """Given out by the registry, under its write lock: no number is left out."""
    return Column("id", Integer, primary_key=True, autoincrement=False)


def _event_id() -> Column[int]:
    """The event that wrote the row; its digest seals it."""
    return Column("event_id", Integer, nullable=False, index=True, server_default="0")


def _who_and_when() -> list[Column[str]]:
    """Times are ISO 8601 in UTC, as text: one form on every database, in the right order."""
    return [Column("created_by", String, nullable=False), Column("created_at", String, nullable=False)]


def _task_id(primary_key: bool = False) -> Column[int]:
    return Column("task_id", ForeignKey("task.id"), nullable=False, primary_key=primary_key)


backbone = Table(
    "backbone",
    metadata,
    Column("fingerprint", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("source", String, nullable=False),
    Column("precision", String, nullable=False),
    Column("preprocessing", JSON, nullable=False),
    Column("embed_dim", Integer, nullable=False),
    Column("depth", Integer, nullable=False),
    Column("num_heads", Integer, nullable=False),
    Column("num_tokens", Integer, nullable=False),
    Column("num_parameters", Integer, nullable=False),
    *_who_and_when(),
    _event_id(),
)

artifact = Table(
    "artifact",
    metadata,
    Column("sha256", String, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)

task = Table(
    "task",
    metadata,
    _id(),
    Column("name", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("backbone", ForeignKey("backbone.fingerprint"), nullable=False),
    Column("artifact", ForeignKey("artifact.sha256"), nullable=False),
    Column("labels", JSON, nullable=False),
    Column("num_memory_tokens", Integer, nullable=False),
    Column("num_parameters", Integer, nullable=False),
    Column("objective", String, nullable=False),
    Column("config", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("data", JSON, nullable=False),
    Column("code_version", String, nullable=False),
    *_who_and_when(),
    _event_id(),
    Column("packages", JSON, nullable=False, server_default="{}"),
    Column("score", Float),
    UniqueConstraint("name", "version"),
    Index(None, "artifact"),
    # All that a page is chosen by, newest first: whatever is asked, no row is read but those of the page.
    Index("ix_task_page", "id", "name", "backbone", "score", "created_at"),
    Index("ix_task_backbone_page", "backbone", "id", "name", "score", "created_at"),
)

task_parent = Table(
    "task_parent",
    metadata,
    _task_id(primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("parent_id", ForeignKey("task.id"), nullable=False),
    Index(None, "parent_id", "task_id"),
)

retirement = Table(
    "retirement",
    metadata,
    _task_id(primary_key=True),
    Column("reason", String, nullable=False),
    *_who_and_when(),
    _event_id(),
)

alias = Table(
    "alias",
    metadata,
    Column("name", String, primary_key=True),
    Column("alias", String, primary_key=True),
    _task_id(),
)

tag = Table(
    "tag",
    metadata,
    _task_id(primary_key=True),
    Column("tag", String, primary_key=True),
    Index(None, "tag", "task_id"),
)

event = Table(
    "event",
    metadata,
    _id(),
    Column("kind", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("details", JSON, nullable=False),
    *_who_and_when(),
    Column("digest", String, nullable=False, server_default=""),
    Index(None, "subject"),
    sqlite_autoincrement=True,
)

evaluation = Table(
    "evaluation",
    metadata,
    _id(),
    _task_id(),
    Column("data_fingerprint", String, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("numerics_fingerprint", String, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("logits_digest", String, nullable=False),
    *_who_and_when(),
    _event_id(),
    Index(None, "task_id"),
)

golden = Table(
    "golden",
    metadata,
    _task_id(primary_key=True),
    Column("numerics_fingerprint", String, primary_key=True),
    Column("numerics", JSON, nullable=False),
    Column("digest", String, nullable=False),
    Column("logits", LargeBinary, nullable=False),
    *_who_and_when(),
    _event_id(),
)

statistics = Table(
    "statistics",
    metadata,
    _task_id(primary_key=True),
    Column("sha256", String, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

IMMUTABLE = (backbone, artifact, task, task_parent, retirement, event, evaluation, golden, statistics)
"""Tables whose rows are written once. Aliases and tags may change; their history is in the events."""
