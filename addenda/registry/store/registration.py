"""Registering a task: its rows, and the event that seals them."""

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

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors")


@cache
def packages() -> dict[str, str]:
    """Versions of Python and of the packages that have a part in learning a task."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def register(
    to: Writer,
    task: Task,
    probe: Mapping[str, Any],
    statistics: FeatureStatistics | None,
    new_version: bool,
    evaluations: Sequence[Evaluation],
) -> Task:
    """Adds a task as `Registry.register` says, with its golden probe's row."""
    connection = to.connection
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
        raise RegistryError(f"Task {task.name!r} was learned on a backbone that is not registered: add_backbone first.")
    version = max((row.version for row in versions), default=0) + 1
    columns = {
        **derived(task),
        "name": task.name,
        "version": version,
        "artifact": task.sha256,
        "config": dict(task.config),
        "metrics": dict(task.metrics),
        "data": dict(task.data),
        "code_version": addenda.__version__,
        "packages": packages(),
        **to.who,
    }
    insert_task(
        to,
        "registered",
        columns,
        task.artifact,
        [_parent(connection, task, parent) for parent in task.parents],
        [{**probe, **to.who}],
        None if statistics is None else {"sha256": statistics.sha256, "data": statistics.data},
        [{**vars(evaluation), **to.who} for evaluation in evaluations],
    )
    return load_task(connection, find(connection, f"{task.name}:{version}"))


def checked(task: Task, golden: Golden, statistics: FeatureStatistics | None) -> dict[str, Any]:
    """A task's golden probe as a row; raises as `Registry.register` does where it may not be registered anywhere."""
    check_new_name(task.name)
    if statistics is not None:
        statistics.check(len(task.labels))
        if statistics.excess is not None:
            raise RegistryError(f"Task {task.name!r} was not registered: {statistics.excess}.")
    check_unwritten(task)
    check_bounds(task)
    return golden_row(task, golden)


def insert_task(
    to: Writer,
    kind: str,
    columns: Mapping[str, Any],
    artifact: bytes,
    parents: Sequence[int],
    goldens: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Any] | None,
    evaluations: Sequence[Mapping[str, Any]],
    **details: Any,
) -> int:
    """Inserts a task and all that belongs to it, rows without this registry's numbers; returns the event's id."""
    connection, sha256 = to.connection, columns["artifact"]
    number, task_id = ledger.generation(connection) + 1, next_id(connection, schema.task)
    kept = connection.scalar(select(schema.artifact.c.data).where(schema.artifact.c.sha256 == sha256))
    if kept is None:
        connection.execute(insert(schema.artifact).values(sha256=sha256, data=artifact))
    elif kept != artifact:
        raise IntegrityError(f"The bytes of sha256 {sha256[:12]}… that are stored already have changed.")
    connection.execute(insert(schema.task).values(**columns, id=task_id, event_id=number))
    for position, parent in enumerate(parents):
        connection.execute(insert(schema.task_parent).values(task_id=task_id, position=position, parent_id=parent))
    for golden in goldens:
        connection.execute(insert(schema.golden).values(**golden, task_id=task_id, event_id=number))
    if statistics is not None:
        connection.execute(insert(schema.statistics).values(**statistics, task_id=task_id))
    for evaluation in evaluations:  # one without a generation is of this event's
        numbers = {"id": next_id(connection, schema.evaluation), "task_id": task_id, "event_id": number}
        connection.execute(insert(schema.evaluation).values({"generation": number, **evaluation, **numbers}))
    return to.append(kind, f"{columns['name']}:{columns['version']}", sha256=sha256, **details)


def _parent(connection: Connection, task: Task, parent: Task) -> int:
    """The id of a task that another extends."""
    row = connection.execute(
        select(schema.task)
        .where(schema.task.c.artifact == parent.sha256)
        .order_by((schema.task.c.name != parent.name) | (schema.task.c.version != parent.version))
    ).first()
    if row is None:
        raise RegistryError(f"Task {task.name!r} extends {parent.ref!r}, which is not registered here.")
    if parent.class_token is None:
        raise RegistryError(f"Task {task.name!r} extends {parent.ref!r}, which is head-only: it has no token.")
    return int(row.id)


def derived(task: Task) -> dict[str, Any]:
    """The columns of a task's row that follow from its content and metrics."""
    return {
        "backbone": task.backbone,
        "labels": list(task.labels),
        "num_memory_tokens": task.num_memory_tokens,
        "num_parameters": task.num_parameters,
        "objective": task.objective,
        "score": score_of(task.objective, task.metrics),
    }


def add_golden(to: Writer, row: Row[Any], probe: Mapping[str, Any]) -> None:
    """Adds a golden probe to a task that has none of its numerics."""
    to.add(schema.golden, {"task_id": row.id, **probe}, "golden", ref_of(row), numerics=probe["numerics_fingerprint"])


def golden_row(task: Task, golden: Golden) -> dict[str, Any]:
    """A task's golden probe as a row; RegistryError where it is of other labels or bytes, or not finite."""
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
        raise RegistryError(f"Task {task.ref!r}: its golden probe does not hash to its digest.")
    return {
        "numerics_fingerprint": golden.numerics_fingerprint,
        "numerics": dict(golden.numerics),
        "digest": golden.digest,
        "logits": data,
    }


MEMORY_TOKENS, RANK, ANCESTORS = 1024, 256, 256
"""Of one task; and how many others it may see: the arithmetic of an answer grows with each."""
TEMPERATURES = (1e-6, 1e6)


def check_bounds(task: Task) -> None:
    """Raises RegistryError where a task is more than one may be; tasks from before stay as they are."""
    check_labels(task.labels)
    found = {
        "memory tokens in a layer": (task.num_memory_tokens, MEMORY_TOKENS),
        "as the rank of its adapters": (task.adapter_rank, RANK),
        "tasks that it sees": (len(task.closure), ANCESTORS),
    }
    for what, (count, most) in found.items():
        if count > most:
            raise RegistryError(f"Task {task.ref!r} has {count:,} {what}; {most:,} is the most.")
    least, most_temperature = TEMPERATURES
    if not least <= task.temperature <= most_temperature:
        raise RegistryError(
            f"Task {task.ref!r} has the temperature {task.temperature:g}; it may be from {least:g} to "
            f"{most_temperature:g}."
        )
