"""Filling a registry with many small tasks, and weighing it: for the benchmark, and for tests of the queries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import addenda
from addenda.registry import Registry, Task
from addenda.registry.store import ledger, schema
from addenda.registry.store.database import database_errors, reading, writing
from addenda.registry.store.registration import derived, packages

if TYPE_CHECKING:
    from sqlalchemy import Connection

_BATCH = 1000


def fill(registry: Registry, template: Task, backbones: Sequence[str], count: int) -> None:
    """Adds tasks as `register` would, sealed too, but without golden probes and statistics, a thousand at a time.

    Their names are `line-00-0` to `line-99-N`, of two versions each, on 20 backbones at most, in turn. Their scores are
    spread over 0 to 1; their times are a minute apart, from 2020 on. Every tenth is tagged `audited`, every thousandth
    `pilot`; every twentieth extends the first; every hundredth is retired.
    """
    with database_errors("The registry was not filled"), writing(registry._engine) as connection:
        offset = ledger.next_id(connection, schema.task)
        for start in range(0, count, _BATCH):
            _add(connection, template, backbones, range(start, min(start + _BATCH, count)), offset)
    if registry._engine.dialect.name == "postgresql":  # as its autovacuum does of itself, some time later
        with registry._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")


def disk_bytes(registry: Registry) -> int:
    """What a registry's database takes on disk, without its log."""
    sizes = {
        "sqlite": "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()",
        "postgresql": "SELECT pg_database_size(current_database())",
    }
    with reading(registry._engine) as connection:
        return int(connection.exec_driver_sql(sizes[connection.dialect.name]).scalar_one())


def _add(connection: Connection, template: Task, backbones: Sequence[str], indexes: range, offset: int) -> None:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    events: list[dict[str, Any]] = []
    first = ledger.generation(connection) + 1

    def event(kind: str, subject: str, **details: str) -> int:
        events.append({"id": first + len(events), "kind": kind, "subject": subject, "details": details, **stamp})
        return first + len(events) - 1

    for index in indexes:
        task_id, name, version = offset + index, f"line-{index // 2 % 100:02}-{index // 200}", 1 + index % 2
        made = replace(
            template, name=name, backbone=backbones[index % len(backbones)], head_bias=template.head_bias + index,
            parents=(replace(template, backbone=backbones[0]),) if index and index % 20 == 0 else (),
        )  # fmt: skip
        ref, time = f"{name}:{version}", datetime(2020, 1, 1, tzinfo=UTC) + timedelta(minutes=index)
        stamp = {"created_by": "filler", "created_at": time.isoformat(timespec="microseconds")}
        rows["artifact"].append({"sha256": made.sha256, "data": made.artifact})
        rows["task"].append({
            **derived(made), "id": task_id, "name": name, "version": version, "artifact": made.sha256,
            "config": dict(made.config), "metrics": dict(made.metrics), "data": dict(made.data),
            "score": index * 7919 % 10_000 / 10_000,  # a prime, so that neighbours have scores far apart
            "code_version": addenda.__version__, "packages": packages(),
            "event_id": event("registered", ref, sha256=made.sha256), **stamp,
        })  # fmt: skip
        if made.parents:
            rows["task_parent"].append({"task_id": task_id, "position": 0, "parent_id": offset})
        for tag, every in (("audited", 10), ("pilot", 1000)):
            if index % every == 3:
                rows["tag"].append({"task_id": task_id, "tag": tag})
                event("tagged", ref, tag=tag)
        if index % 100 == 7:
            number = event("retired", ref, reason="")
            rows["retirement"].append({"task_id": task_id, "reason": "", **stamp, "event_id": number})
    for table in schema.metadata.sorted_tables:
        if table.name in rows:
            connection.execute(table.insert(), rows[table.name])
    written = ledger.written(connection, first, first + len(events) - 1)
    latest = connection.execute(schema.event.select().where(schema.event.c.id == first - 1)).one_or_none()
    before = latest.digest if latest else ""
    for one in events:
        before = one["digest"] = ledger.seal(before, one, written.get(one["id"], []))
    connection.execute(schema.event.insert(), events)
