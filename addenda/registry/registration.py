"""Writing a task's rows, with the event that seals them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sqlalchemy import Connection, Table, func, insert, select

from addenda.exceptions import IntegrityError, RegistryError
from addenda.registry import ledger, schema
from addenda.registry.artifact import digest
from addenda.registry.bounds import is_finite
from addenda.registry.objectives import score_of
from addenda.registry.task import Golden, Task

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors")


@cache
def packages() -> dict[str, str]:
    """Versions of Python and of the packages that have a part in learning a task."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def insert_task(
    connection: Connection,
    kind: str,
    columns: Mapping[str, Any],
    artifact: bytes,
    parents: Sequence[int],
    goldens: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Any] | None,
    evaluations: Sequence[Mapping[str, Any]],
    who: Mapping[str, str],
    **details: Any,
) -> int:
    """Inserts a task and all that belongs to it, and the event of that, inside a write transaction.

    Args:
        connection: of the transaction.
        kind: of the event.
        columns: the task's, without id and event_id.
        artifact: its bytes.
        parents: ids of the tasks that it extends, in order.
        goldens: rows of golden probes.
        statistics: sha256 and data of what a router knows of its images.
        evaluations: rows of scorings; without a generation they are of this event's.
        who: who does it, and when.
        details: more for the event.

    Returns:
        The event's id.

    Raises:
        IntegrityError: the same content is stored already, and its bytes have changed.
    """
    number, task_id = ledger.generation(connection) + 1, next_id(connection, schema.task)
    sha256 = columns["artifact"]
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
    for evaluation in evaluations:
        values = {"generation": number, **evaluation, "event_id": number}
        connection.execute(
            insert(schema.evaluation).values(**values, id=next_id(connection, schema.evaluation), task_id=task_id)
        )
    return ledger.append(connection, kind, f"{columns['name']}:{columns['version']}", who, sha256=sha256, **details)


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


def next_id(connection: Connection, table: Table) -> int:
    """The first free number of a table; the write lock keeps it free."""
    return (connection.scalar(select(func.max(table.c.id))) or 0) + 1


def golden_row(task: Task, golden: Golden) -> dict[str, Any]:
    """A task's golden probe as a row.

    Raises:
        RegistryError: it has other columns than the task has labels, does not hash to its digest, or is not finite.
    """
    name, num_labels = task.ref, len(task.labels)
    if golden.logits.shape[-1] != num_labels:
        raise RegistryError(
            f"Task {name!r} has {num_labels} labels; its golden probe has {golden.logits.shape[-1]} columns."
        )
    if not is_finite(golden.logits.cpu(), task.objective, task.temperature):
        raise RegistryError(f"Task {name!r}: its golden probe has logits or probabilities that are NaN or infinite.")
    data = golden.logits.cpu().contiguous().numpy().tobytes()
    if digest(data) != golden.digest:
        raise RegistryError(f"Task {name!r}: its golden probe does not hash to its digest.")
    return {
        "numerics_fingerprint": golden.numerics_fingerprint,
        "numerics": dict(golden.numerics),
        "digest": golden.digest,
        "logits": data,
    }
