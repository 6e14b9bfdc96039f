"""The first schema."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from addenda.registry.store.schema import create_triggers

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STAMP = ("created_by", "created_at")
SIZES = ("embed_dim", "depth", "num_heads", "num_tokens", "num_parameters")
COLUMNS = {
    "artifact": ("sha256", "data"),
    "backbone": ("fingerprint", "name", "source", "precision", "preprocessing", *SIZES, *STAMP),
    "event": ("id", "kind", "subject", "details", *STAMP),
    "task": (
        "id", "name", "version", "backbone", "artifact", "labels", "num_memory_tokens", "num_parameters", "objective",
        "config", "metrics", "data", "code_version", *STAMP,
    ),
    "alias": ("name", "alias", "task_id"),
    "evaluation": (
        "id", "task_id", "data_fingerprint", "generation", "numerics_fingerprint", "metrics", "logits_digest", *STAMP,
    ),
    "golden": ("task_id", "numerics_fingerprint", "numerics", "digest", "logits", *STAMP),
    "retirement": ("task_id", "reason", *STAMP),
    "task_parent": ("task_id", "position", "parent_id"),
}  # fmt: skip
TYPES: dict[str, Any] = {
    **dict.fromkeys(
        ("id", "task_id", "parent_id", "position", "version", "generation", "num_memory_tokens", *SIZES), sa.Integer
    ),
    **dict.fromkeys(("preprocessing", "details", "labels", "config", "metrics", "data", "numerics"), sa.JSON),
    **dict.fromkeys(("artifact.data", "logits"), sa.LargeBinary),
}
"""Types of columns that are not text, by the column's name, alone or after its table's."""


def upgrade() -> None:
    _create_table("artifact", ["sha256"])
    _create_table("backbone", ["fingerprint"])
    _create_table("event", ["id"], sqlite_autoincrement=True)
    task_references = {"artifact": "artifact.sha256", "backbone": "backbone.fingerprint"}
    _create_table("task", ["id"], task_references, unique=["name", "version"])
    _create_table("alias", ["name", "alias"], {"task_id": "task.id"})
    _create_table("evaluation", ["id"], {"task_id": "task.id"})
    _create_table("golden", ["task_id", "numerics_fingerprint"], {"task_id": "task.id"})
    _create_table("retirement", ["task_id"], {"task_id": "task.id"})
    _create_table("task_parent", ["task_id", "position"], {"parent_id": "task.id", "task_id": "task.id"})
    for table, column in (
        ("task", "artifact"), ("task", "backbone"), ("evaluation", "task_id"), ("task_parent", "parent_id")
    ):  # fmt: skip
        op.create_index(op.f(f"ix_{table}_{column}"), table, [column])
    create_triggers(op.get_bind())


def _create_table(
    name: str, key: list[str], foreign: dict[str, str] | None = None, unique: list[str] | None = None, **options: Any
) -> None:
    types = {column: TYPES.get(f"{name}.{column}", TYPES.get(column, sa.String)) for column in COLUMNS[name]}
    columns = [sa.Column(column, type_(), nullable=False) for column, type_ in types.items()]
    constraints: list[sa.Constraint] = [sa.PrimaryKeyConstraint(*key, name=op.f(f"pk_{name}"))]
    for column, target in (foreign or {}).items():
        constraints.append(sa.ForeignKeyConstraint([column], [target], name=op.f(f"fk_{name}_{column}")))
    if unique is not None:
        constraints.append(sa.UniqueConstraint(*unique, name=op.f(f"uq_{name}_{'_'.join(unique)}")))
    op.create_table(name, *columns, *constraints, **options)
