"""The ledger: each row has an event, whose digest covers it; also tags, packages and the score column."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

from addenda.registry.store.digests import canonical_json, digest
from addenda.registry.store.ledger import notify, stamp
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
    _assign_events(connection)
    _score(connection)
    _seal(connection)
    create_triggers(connection)


def _assign_events(connection: sa.Connection) -> None:
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
    golden = sa.table("golden", sa.column("task_id"), sa.column("numerics_fingerprint"), sa.column("event_id"))
    told = sa.text(
        "SELECT e.id, e.details, t.id AS task_id FROM event e JOIN task t ON e.subject = t.name || ':' || t.version "
        "WHERE e.kind = 'golden'"
    ).columns(details=sa.JSON)
    for event in connection.execute(told).all():
        connection.execute(
            golden.update()
            .where(golden.c.task_id == event.task_id, golden.c.numerics_fingerprint == event.details["numerics"])
            .values(event_id=event.id)
        )


def _score(connection: sa.Connection) -> None:
    task = sa.table(
        "task", sa.column("id"), sa.column("objective"), sa.column("metrics", sa.JSON), sa.column("score", sa.Float)
    )
    for row in connection.execute(sa.select(task.c.id, task.c.objective, task.c.metrics)).all():
        score = score_of(row.objective, row.metrics)
        connection.execute(task.update().where(task.c.id == row.id).values(score=score))


def _seal(connection: sa.Connection) -> None:
    """Computes the digests of existing events; backbones had no events and belong to the upgrade's own event.

    This uses the ledger as it was in this version, on reflected tables, so later changes of the schema do not matter.
    """
    tables = sa.MetaData()
    tables.reflect(connection)
    written = _written(connection, tables)
    event, backbone = tables.tables["event"], tables.tables["backbone"]
    before, last = "", 0
    for told in connection.execute(sa.select(event).order_by(event.c.id)).mappings().all():
        before, last = _digest(before, dict(told), written.get(told["id"], [])), told["id"]
        connection.execute(event.update().where(event.c.id == last).values(digest=before))
    if connection.scalar(sa.select(sa.func.count()).select_from(backbone)):
        connection.execute(backbone.update().values(event_id=last + 1))
        upgraded = {"id": last + 1, "kind": "upgraded", "subject": "schema", "details": {"version": revision}}
        upgraded |= stamp()
        rows = _written(connection, tables)[last + 1]
        connection.execute(event.insert().values(**upgraded, digest=_digest(before, upgraded, rows)))
        notify(connection, last + 1)


def _digest(before: str, event: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    columns = {key: event[key] for key in ("id", "kind", "subject", "details", "created_by", "created_at")}
    return digest(canonical_json([before, columns, rows]).encode())


def _written(connection: sa.Connection, tables: sa.MetaData) -> dict[int, list[dict[str, Any]]]:
    """Event id -> the rows that the event wrote."""
    of, task_parent = tables.tables["task"], tables.tables["task_parent"]
    parent = of.alias()

    def of_task(name: str) -> sa.Select[Any]:
        table = tables.tables[name]
        columns = [column for column in table.c if column.name not in ("logits", "data")]
        return sa.select(of.c.name, of.c.version, *columns).join_from(table, of, table.c.task_id == of.c.id)

    queries = {
        "backbone": sa.select(tables.tables["backbone"]),
        "task": sa.select(of),
        "task_parent": sa.select(
            of.c.event_id, of.c.name, of.c.version, task_parent.c.position, parent.c.name.label("parent"),
            parent.c.version.label("parent_version"), parent.c.artifact.label("parent_artifact"),
        )
        .join_from(task_parent, of, task_parent.c.task_id == of.c.id)
        .join(parent, task_parent.c.parent_id == parent.c.id),
        "statistics": of_task("statistics").add_columns(of.c.event_id),
        "golden": of_task("golden"),
        "evaluation": of_task("evaluation"),
        "retirement": of_task("retirement"),
    }  # fmt: skip
    left_out = {"id", "task_id", "parent_id", "event_id"}
    defaults: dict[str, Any] = {"packages": {}, "score": None}
    written: dict[int, list[dict[str, Any]]] = {}
    for name, query in queries.items():
        found = []
        for row in connection.execute(query).mappings():
            kept = {
                key: value
                for key, value in row.items()
                if key not in left_out and not (key in defaults and value == defaults[key])
            }
            found.append((row["event_id"], {"table": name, **kept}))
        for number, kept in sorted(found, key=lambda pair: canonical_json(pair[1])):
            written.setdefault(number, []).append(kept)
    return written
