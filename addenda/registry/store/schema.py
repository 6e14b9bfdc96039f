"""The registry's tables (design, section 6): the columns that `records` names, with their keys and indexes."""

from __future__ import annotations

from typing import Any, get_type_hints

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

from addenda.registry.store.hashing import canonical_json
from addenda.registry.store.records import ROWS, Event, columns_of, defaults

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)


def _columns(rows: type, key: str = "", **points: str) -> list[Column[Any]]:
    """A row's columns by their types; one is the key, or a part of it, and some point at columns of other tables."""
    hints, before = get_type_hints(rows), defaults(rows)
    types: dict[Any, Any] = {str: String, int: Integer, float | None: Float}
    made = []
    for name in columns_of(rows):
        value = before.get(name)
        default = value if value is None or isinstance(value, str) else canonical_json(value)
        points_at = [ForeignKey(points[name])] if name in points else []
        made.append(
            Column(
                name,
                types.get(hints[name], JSON),
                *points_at,
                primary_key=name == key,
                nullable=hints[name] == float | None,
                server_default=default,
            )
        )
    return made


def _id() -> Column[int]:
    """Given out by the registry, under its write lock: no number is left out."""
    return Column("id", Integer, primary_key=True, autoincrement=False)


def _event_id() -> Column[int]:
    """The event that wrote the row; its digest seals it."""
    return Column("event_id", Integer, nullable=False, index=True, server_default="0")


def _task_id(primary_key: bool = False) -> Column[int]:
    return Column("task_id", ForeignKey("task.id"), nullable=False, primary_key=primary_key)


backbone = Table("backbone", metadata, *_columns(ROWS["backbone"], "fingerprint"), _event_id())

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
    *_columns(ROWS["task"], backbone="backbone.fingerprint", artifact="artifact.sha256"),
    _event_id(),
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

retirement = Table("retirement", metadata, _task_id(primary_key=True), *_columns(ROWS["retirement"]), _event_id())

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

event = Table("event", metadata, *_columns(Event, "id"), Index(None, "subject"), sqlite_autoincrement=True)

evaluation = Table(
    "evaluation", metadata, _id(), _task_id(), *_columns(ROWS["evaluation"]), _event_id(), Index(None, "task_id")
)

golden = Table(
    "golden",
    metadata,
    _task_id(primary_key=True),
    *_columns(ROWS["golden"], "numerics_fingerprint"),
    Column("logits", LargeBinary, nullable=False),
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
