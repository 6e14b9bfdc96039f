"""Routing statistics."""

import sqlalchemy as sa
from alembic import op

from addenda.registry.store.schema import create_triggers

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "statistics",
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name=op.f("fk_statistics_task_id")),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_statistics")),
    )
    create_triggers(op.get_bind())
