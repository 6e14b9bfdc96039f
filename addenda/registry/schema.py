"""The registry's tables (design, section 6)."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Column,
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
    return Column("id", Integer, primary_key=True, autoincrement=True)


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
    UniqueConstraint("name", "version"),
    Index(None, "backbone"),
    Index(None, "artifact"),
)

task_parent = Table(
    "task_parent",
    metadata,
    _task_id(primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("parent_id", ForeignKey("task.id"), nullable=False, index=True),
)

retirement = Table(
    "retirement",
    metadata,
    _task_id(primary_key=True),
    Column("reason", String, nullable=False),
    *_who_and_when(),
)

alias = Table(
    "alias",
    metadata,
    Column("name", String, primary_key=True),
    Column("alias", String, primary_key=True),
    _task_id(),
)

event = Table(
    "event",
    metadata,
    _id(),
    Column("kind", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("details", JSON, nullable=False),
    *_who_and_when(),
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
)

statistics = Table(
    "statistics",
    metadata,
    _task_id(primary_key=True),
    Column("sha256", String, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

IMMUTABLE = (backbone, artifact, task, task_parent, retirement, event, evaluation, golden, statistics)
"""Tables whose rows are written once. An alias may move; its history is in the events."""
