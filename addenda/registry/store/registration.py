"""Registering a task: its rows and their event."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sqlalchemy import Connection, Row, insert, select

import addenda
from addenda.exceptions import IntegrityError, NameTakenError, RegistryError, RetiredError
from addenda.registry.store import ledger, schema
from addenda.registry.store.digests import digest
from addenda.registry.store.ledger import Writer, next_id
from addenda.registry.store.names import check_labels, check_new_name
from addenda.registry.store.objectives import score_of
from addenda.registry.store.queries import find, ref_of
from addenda.registry.store.records import Evaluation
from addenda.registry.store.task import Golden, Task, check_unwritten, is_finite
from addenda.registry.store.task_reader import FeatureStatistics, load_task


@cache
def packages() -> dict[str, str]:
    """Versions of Python and of the packages that training depends on."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def register(
    writer: Writer,
    task: Task,
    probe: Mapping[str, Any],
    statistics: FeatureStatistics | None,
    new_version: bool,
    evaluations: Sequence[Evaluation],
) -> Task:
    """Registers a checked task, given its golden probe's row; see `Registry.register`."""
    connection = writer.connection
    query = select(schema.task, schema.retirement.c.reason).join(schema.retirement, isouter=True)
    query = query.where(schema.task.c.name == task.name).order_by(schema.task.c.id)
    versions = connection.execute(query).all()
    same = [row for row in versions if row.artifact == task.sha256]
    for row in same:
        if row.reason is None:
            return load_task(connection, row)
    if same and not new_version:
        raise RetiredError(ref_of(same[-1]), same[-1].reason)
    if versions and not new_version:
        raise NameTakenError(task.name, max(row.version for row in versions))
    known = select(schema.backbone.c.name).where(schema.backbone.c.fingerprint == task.backbone)
    if connection.scalar(known) is None:
        raise RegistryError(
            f"The backbone of task {task.name!r} is not registered; call add_backbone(backbone.record()) first."
        )
    columns = {
        **derived(task),
        "name": task.name,
        "version": max((row.version for row in versions), default=0) + 1,
        "artifact": task.sha256,
        "config": dict(task.config),
        "metrics": dict(task.metrics),
        "data": dict(task.data),
        "code_version": addenda.__version__,
        "packages": packages(),
        **writer.stamp,
    }
    insert_task(
        writer,
        "registered",
        columns,
        task.artifact,
        [_parent(connection, task, parent) for parent in task.parents],
        [{**probe, **writer.stamp}],
        None if statistics is None else {"sha256": statistics.sha256, "data": statistics.data},
        [{**vars(evaluation), **writer.stamp} for evaluation in evaluations],
    )
    return load_task(connection, find(connection, f"{task.name}:{columns['version']}"))


def check_new_task(task: Task, golden: Golden, statistics: FeatureStatistics | None) -> dict[str, Any]:
    """Checks that a task may be registered, whatever the registry contains; returns its golden probe's row."""
    check_new_name(task.name)
    if statistics is not None:
        statistics.check(len(task.labels))
        if statistics.excess is not None:
            raise RegistryError(f"Task {task.name!r} was not registered: {statistics.excess}.")
    check_unwritten(task)
    check_bounds(task)
    return golden_row(task, golden)


def insert_task(
    writer: Writer,
    kind: str,
    columns: Mapping[str, Any],
    artifact: bytes,
    parents: Sequence[int],
    goldens: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Any] | None,
    evaluations: Sequence[Mapping[str, Any]],
    **details: Any,
) -> int:
    """Inserts a task and its associated rows, which have no ids yet; returns the event's id."""
    connection, sha256 = writer.connection, columns["artifact"]
    event_id, task_id = ledger.generation(connection) + 1, next_id(connection, schema.task)
    stored = connection.scalar(select(schema.artifact.c.data).where(schema.artifact.c.sha256 == sha256))
    if stored is None:
        connection.execute(insert(schema.artifact).values(sha256=sha256, data=artifact))
    elif stored != artifact:
        raise IntegrityError(f"The stored artifact with sha256 {sha256[:12]}… has changed. See: addenda verify --deep")
    connection.execute(insert(schema.task).values(**columns, id=task_id, event_id=event_id))
    for position, parent in enumerate(parents):
        connection.execute(insert(schema.task_parent).values(task_id=task_id, position=position, parent_id=parent))
    for golden in goldens:
        connection.execute(insert(schema.golden).values(**golden, task_id=task_id, event_id=event_id))
    if statistics is not None:
        connection.execute(insert(schema.statistics).values(**statistics, task_id=task_id))
    for evaluation in evaluations:  # an imported evaluation has the generation of its origin
        ids = {"id": next_id(connection, schema.evaluation), "task_id": task_id, "event_id": event_id}
        connection.execute(insert(schema.evaluation).values({"generation": event_id, **evaluation, **ids}))
    return writer.append(kind, f"{columns['name']}:{columns['version']}", sha256=sha256, **details)


def _parent(connection: Connection, task: Task, parent: Task) -> int:
    row = connection.execute(
        select(schema.task)
        .where(schema.task.c.artifact == parent.sha256)
        .order_by((schema.task.c.name != parent.name) | (schema.task.c.version != parent.version), schema.task.c.id)
    ).first()
    if row is None:
        raise RegistryError(
            f"Task {task.name!r} extends {parent.ref!r}, which is not registered here; register it first."
        )
    if parent.class_token is None:
        raise RegistryError(
            f"Task {task.name!r} extends {parent.ref!r}, a head-only task without a class token; extend another."
        )
    return int(row.id)


def derived(task: Task) -> dict[str, Any]:
    """The columns of a task's row that are derived from its content and metrics."""
    return {
        "backbone": task.backbone,
        "labels": list(task.labels),
        "num_memory_tokens": task.num_memory_tokens,
        "num_parameters": task.num_parameters,
        "objective": task.objective,
        "score": score_of(task.objective, task.metrics),
    }


def add_golden(writer: Writer, row: Row[Any], probe: Mapping[str, Any]) -> None:
    """Adds a golden probe to a task that has none under the same numerics."""
    numerics = probe["numerics_fingerprint"]
    writer.add(schema.golden, {"task_id": row.id, **probe}, "golden", ref_of(row), numerics=numerics)


def golden_row(task: Task, golden: Golden) -> dict[str, Any]:
    """A task's golden probe as a row; raises RegistryError if it does not fit the task or its digest."""
    logits, num_labels = golden.logits.cpu(), len(task.labels)
    if logits.shape[-1] != num_labels:
        raise RegistryError(
            f"Task {task.ref!r} has {num_labels} labels; its golden probe has {logits.shape[-1]} columns."
        )
    if not is_finite(logits, task.objective, task.temperature):
        raise RegistryError(
            f"Task {task.ref!r}: its golden probe has logits or probabilities that are NaN or infinite."
        )
    data = logits.contiguous().numpy().tobytes()
    if digest(data) != golden.digest:
        raise RegistryError(f"Task {task.ref!r}: its golden probe does not match its digest.")
    return {
        "numerics_fingerprint": golden.numerics_fingerprint,
        "numerics": dict(golden.numerics),
        "digest": golden.digest,
        "logits": data,
    }


MAX_MEMORY_TOKENS, MAX_RANK, MAX_ANCESTORS = 1024, 256, 256
"""Limits of one task; the cost of inference grows with each."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


def check_bounds(task: Task) -> None:
    """Raises RegistryError if a task exceeds a limit; tasks that are registered already are not checked."""
    check_labels(task.labels)
    counts = {
        "{:,} memory tokens per layer": (task.num_memory_tokens, MAX_MEMORY_TOKENS),
        "adapters of rank {:,}": (task.adapter_rank, MAX_RANK),
        "{:,} ancestors": (len(task.closure), MAX_ANCESTORS),
    }
    for text, (count, maximum) in counts.items():
        if count > maximum:
            raise RegistryError(f"Task {task.ref!r} has {text.format(count)}; the maximum is {maximum:,}.")
    if not MIN_TEMPERATURE <= task.temperature <= MAX_TEMPERATURE:
        raise RegistryError(
            f"Task {task.ref!r} has temperature {task.temperature:g}; it must be between {MIN_TEMPERATURE:g} and "
            f"{MAX_TEMPERATURE:g}."
        )
