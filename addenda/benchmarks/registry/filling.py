"""Filling a registry with many small tasks, and weighing it: for the benchmark, and for tests of the queries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import addenda
from addenda.registry import Registry, Task, ledger, schema
from addenda.registry.database import database_errors, reading, writing
from addenda.registry.registration import next_id, packages

if TYPE_CHECKING:
    from sqlalchemy import Connection

_BATCH = 1000


def fill(registry: Registry, template: Task, backbones: Sequence[str], count: int) -> None:
    """Adds tasks as `register` would, sealed too, but without golden probes and statistics, a thousand at a time.

    Their names are `line-00-0` to `line-99-N`, of two versions each. Their scores are spread over 0 to 1; their times
    are a minute apart, from 2020 on. Every tenth is tagged `audited`, every thousandth `pilot`; every twentieth extends
    the first; every hundredth is retired.

    Args:
        registry: where.
        template: what they are but for name, backbone, bias, score and time.
        backbones: fingerprints of registered backbones, 20 at most, taken in turn.
        count: how many.

    Raises:
        RegistryError: the database refused.
    """
    with database_errors("The registry was not filled"), writing(registry._engine) as connection:
        offset = next_id(connection, schema.task)
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


def database_version(registry: Registry) -> str:
    """The database's name and version."""
    dialect = registry._engine.dialect
    name = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}[dialect.name]
    return f"{name} {'.'.join(map(str, dialect.server_version_info or ()))}"


def _add(connection: Connection, template: Task, backbones: Sequence[str], indexes: range, offset: int) -> None:
    last = ledger.generation(connection)
    first = replace(template, backbone=backbones[0])
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    events: list[dict[str, Any]] = []

    def event(kind: str, subject: str, **details: str) -> int:
        events.append({"id": last + len(events) + 1, "kind": kind, "subject": subject, "details": details, **stamp})
        return last + len(events)

    for index in indexes:
        task_id, name, version = offset + index, f"line-{index // 2 % 100:02}-{index // 200}", 1 + index % 2
        made = replace(
            template,
            name=name,
            backbone=backbones[index % len(backbones)],
            head_bias=template.head_bias + index,
            parents=(first,) if index and index % 20 == 0 else (),
        )
        ref, time = f"{name}:{version}", datetime(2020, 1, 1, tzinfo=UTC) + timedelta(minutes=index)
        stamp = {"created_by": "filler", "created_at": time.isoformat(timespec="microseconds")}
        rows["artifact"].append({"sha256": made.sha256, "data": made.artifact})
        rows["task"].append(
            {
                "id": task_id,
                "name": name,
                "version": version,
                "backbone": made.backbone,
                "artifact": made.sha256,
                "labels": list(made.labels),
                "num_memory_tokens": made.num_memory_tokens,
                "num_parameters": made.num_parameters,
                "objective": made.objective,
                "config": dict(made.config),
                "metrics": dict(made.metrics),
                "score": index * 7919 % 10_000 / 10_000,  # a prime, so that neighbours have scores far apart
                "data": dict(made.data),
                "code_version": addenda.__version__,
                "packages": packages(),
                "event_id": event("registered", ref, sha256=made.sha256),
                **stamp,
            }
        )
        if made.parents:
            rows["task_parent"].append({"task_id": task_id, "position": 0, "parent_id": offset})
        for tag, every in (("audited", 10), ("pilot", 1000)):
            if index % every == 3:
                rows["tag"].append({"task_id": task_id, "tag": tag})
                event("tagged", ref, tag=tag)
        if index % 100 == 7:
            rows["retirement"].append(
                {"task_id": task_id, "reason": "", **stamp, "event_id": event("retired", ref, reason="")}
            )
    for table in schema.metadata.sorted_tables:
        if table.name in rows:
            connection.execute(table.insert(), rows[table.name])
    _seal(connection, events)


def _seal(connection: Connection, events: Sequence[dict[str, Any]]) -> None:
    """Adds the events of rows that are written."""
    first, last = events[0]["id"], events[-1]["id"]
    written = ledger.written(connection, first, last)
    latest = connection.execute(schema.event.select().where(schema.event.c.id == first - 1)).one_or_none()
    before = latest.digest if latest else ""
    for event in events:
        before = event["digest"] = ledger.seal(before, event, written.get(event["id"], []))
    connection.execute(schema.event.insert(), events)
