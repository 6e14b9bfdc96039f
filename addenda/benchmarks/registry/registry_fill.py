"""Fills a registry with many small tasks and measures its size, for the benchmark and for tests of queries."""

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
    """Adds tasks with sealed events as `register` does, in batches, but without golden probes and routing statistics.

    The names are `line-00-0` to `line-99-N` with two versions each. The backbones (at most 20) are used in rotation;
    scores are spread over 0 to 1, and creation times are a minute apart from 2020 on. Every tenth task is tagged
    `audited`, every thousandth `pilot`; every twentieth extends the first; every hundredth is retired.
    """
    with database_errors("The registry was not filled"), writing(registry._engine) as connection:
        offset = ledger.next_id(connection, schema.task)
        for start in range(0, count, _BATCH):
            _add(connection, template, backbones, range(start, min(start + _BATCH, count)), offset)
    if registry._engine.dialect.name == "postgresql":  # as autovacuum would do some time later
        with registry._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")


def disk_bytes(registry: Registry) -> int:
    """Size of a registry's database on disk, without its write-ahead log."""
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
        task = replace(
            template, name=name, backbone=backbones[index % len(backbones)], head_bias=template.head_bias + index,
            parents=(replace(template, backbone=backbones[0]),) if index and index % 20 == 0 else (),
        )  # fmt: skip
        ref, time = f"{name}:{version}", datetime(2020, 1, 1, tzinfo=UTC) + timedelta(minutes=index)
        stamp = {"created_by": "filler", "created_at": time.isoformat(timespec="microseconds")}
        rows["artifact"].append({"sha256": task.sha256, "data": task.artifact})
        rows["task"].append({
            **derived(task), "id": task_id, "name": name, "version": version, "artifact": task.sha256,
            "config": dict(task.config), "metrics": dict(task.metrics), "data": dict(task.data),
            "score": index * 7919 % 10_000 / 10_000,  # a prime factor, so that neighbours have distant scores
            "code_version": addenda.__version__, "packages": packages(),
            "event_id": event("registered", ref, sha256=task.sha256), **stamp,
        })  # fmt: skip
        if task.parents:
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
    digest = latest.digest if latest else ""
    for row in events:
        digest = row["digest"] = ledger.seal(digest, row, written.get(row["id"], []))
    connection.execute(schema.event.insert(), events)
