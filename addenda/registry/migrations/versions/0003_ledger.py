"""The ledger: each row has an event, whose digest covers it; also tags, packages and the score column."""

import sqlalchemy as sa
from alembic import op

from addenda.registry.store.ledger import notify, seal, stamp, written
from addenda.registry.store.objectives import score_of
from addenda.registry.store.schema import create_triggers, drop_triggers

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SEALED = ("backbone", "task", "retirement", "golden", "evaluation")


def upgrade() -> None:
    connection = op.get_bind()
    drop_triggers(connection)
    for table in SEALED:
        op.add_column(table, sa.Column("event_id", sa.Integer(), nullable=False, server_default="0"))
        op.create_index(op.f(f"ix_{table}_event_id"), table, ["event_id"])
    op.add_column("task", sa.Column("packages", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("task", sa.Column("score", sa.Float(), nullable=True))
    op.add_column("event", sa.Column("digest", sa.String(), nullable=False, server_default=""))
    op.drop_index(op.f("ix_task_backbone"), "task")
    op.create_index(op.f("ix_task_page"), "task", ["id", "name", "backbone", "score", "created_at"])
    op.create_index(op.f("ix_task_backbone_page"), "task", ["backbone", "id", "name", "score", "created_at"])
    op.drop_index(op.f("ix_task_parent_parent_id"), "task_parent")
    op.create_index(op.f("ix_task_parent_parent_id_task_id"), "task_parent", ["parent_id", "task_id"])
    op.create_index(op.f("ix_event_subject"), "event", ["subject"])
    op.create_table(
        "tag",
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("tag", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name=op.f("fk_tag_task_id")),
        sa.PrimaryKeyConstraint("task_id", "tag", name=op.f("pk_tag")),
    )
    op.create_index(op.f("ix_tag_tag_task_id"), "tag", ["tag", "task_id"])
    if connection.dialect.name == "postgresql":  # no compression: it takes long and hardly shrinks floats
        for table in ("artifact", "statistics"):
            op.execute(f"ALTER TABLE {table} ALTER COLUMN data SET STORAGE EXTERNAL")
    tables = sa.MetaData()
    tables.reflect(connection)  # so that later changes of the schema do not matter
    _assign_events(connection, tables)
    task = tables.tables["task"]
    for row in connection.execute(sa.select(task.c.id, task.c.objective, task.c.metrics)).all():
        score = score_of(row.objective, row.metrics)
        connection.execute(task.update().where(task.c.id == row.id).values(score=score))
    _seal(connection, tables)
    create_triggers(connection)


def _assign_events(connection: sa.Connection, tables: sa.MetaData) -> None:
    """Assigns each row the event that wrote it, where the events record it."""
    of_task = "(SELECT name || ':' || version FROM task WHERE id = {table}.task_id)"
    last = "coalesce((SELECT max(e.id) FROM event e WHERE e.kind = '{kind}' AND e.subject = {subject}), 0)"
    subjects = {
        ("task", "registered"): "task.name || ':' || task.version",
        ("retirement", "retired"): of_task.format(table="retirement"),
        ("golden", "registered"): of_task.format(table="golden"),
    }
    for (table, kind), subject in subjects.items():
        found = last.format(kind=kind, subject=subject)
        connection.execute(sa.text(f"UPDATE {table} SET event_id = {found}"))
    connection.execute(sa.text("UPDATE evaluation SET event_id = generation"))
    golden = tables.tables["golden"]
    events = sa.text(
        "SELECT e.id, e.details, t.id AS task_id FROM event e JOIN task t ON e.subject = t.name || ':' || t.version "
        "WHERE e.kind = 'golden'"
    ).columns(details=sa.JSON)
    for event in connection.execute(events).all():
        connection.execute(
            golden.update()
            .where(golden.c.task_id == event.task_id, golden.c.numerics_fingerprint == event.details["numerics"])
            .values(event_id=event.id)
        )


def _seal(connection: sa.Connection, tables: sa.MetaData) -> None:
    """Computes the digests of existing events; backbones had no events and belong to the upgrade's own event.

    The ledger reads the rows as it must read every registry that was sealed by this version.
    """
    event, backbone = tables.tables["event"], tables.tables["backbone"]
    events = connection.execute(sa.select(event).order_by(event.c.id)).mappings().all()
    before, last = "", events[-1]["id"] if events else 0
    rows = written(connection, 1, last, tables)
    for columns in events:
        before = seal(before, dict(columns), rows.get(columns["id"], []))
        connection.execute(event.update().where(event.c.id == columns["id"]).values(digest=before))
    if connection.scalar(sa.select(sa.func.count()).select_from(backbone)):
        connection.execute(backbone.update().values(event_id=last + 1))
        upgraded = {
            "id": last + 1,
            "kind": "upgraded",
            "subject": "schema",
            "details": {"version": revision},
            **stamp(),
        }
        rows = written(connection, last + 1, last + 1, tables)
        connection.execute(event.insert().values(**upgraded, digest=seal(before, upgraded, rows[last + 1])))
        notify(connection, last + 1)
