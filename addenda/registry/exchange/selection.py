"""Selecting tasks and their ancestors for export or merge, in an order that does not depend on the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from graphlib import TopologicalSorter
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Column, Connection, Row, select

from addenda.exceptions import IntegrityError
from addenda.registry.exchange.manifest import BundledAlias, Contents, Entry, first_error
from addenda.registry.store import schema
from addenda.registry.store.digests import digest
from addenda.registry.store.ledger import INTERNAL
from addenda.registry.store.queries import find, ref_of, rows_where, with_ancestors

_ASSOCIATED = (schema.golden, schema.statistics, schema.evaluation, schema.retirement, schema.tag)

ReadBlob = Callable[[str], bytes]
"""Reads one blob by its sha256; raises IntegrityError if the digest does not match."""
Transfer = tuple[Contents, ReadBlob, Sequence[BundledAlias]]
"""Tasks in transit, a function that reads their blobs, and the aliases to set."""


def gather(connection: Connection, refs: Sequence[str] | None) -> Transfer:
    """Gathers tasks and their ancestors, or for None all tasks and aliases; blobs are read on demand."""
    selected = connection.execute(select(schema.task)).all() if refs is None else [find(connection, r) for r in refs]
    rows, parents = with_ancestors(connection, selected)
    for child, parent_ids in parents.items():
        if not rows.keys() >= set(parent_ids):
            raise IntegrityError(f"Task {ref_of(rows[child])!r} extends a task that is missing.")
    associated = {table.name: rows_where(connection, table, "task_id", rows) for table in _ASSOCIATED}
    blobs: dict[str, tuple[Column[bytes], tuple[Any, ...]]] = {}

    def entry(task_id: int) -> Entry:
        row = rows[task_id]
        parent_rows = [rows[parent] for parent in parents[task_id]]
        portable = {name: list(map(_portable, grouped[task_id])) for name, grouped in associated.items()}
        blobs[row.artifact] = schema.artifact.c.data, (row.artifact,)
        for golden in associated["golden"][task_id]:
            blobs[golden.digest] = schema.golden.c.logits, (task_id, golden.numerics_fingerprint)
        for statistics in associated["statistics"][task_id]:
            blobs[statistics.sha256] = schema.statistics.c.data, (task_id,)
        content = {
            "task": _portable(row),
            "parents": [{"name": p.name, "version": p.version, "sha256": p.artifact} for p in parent_rows],
            "goldens": sorted(portable["golden"], key=lambda golden: str(golden["numerics_fingerprint"])),
            "statistics": next((statistics["sha256"] for statistics in portable["statistics"]), None),
            "evaluations": portable["evaluation"],
            "retirement": next(iter(portable["retirement"]), None),
            "tags": sorted(tag["tag"] for tag in portable["tag"]),
        }
        with _validation_errors(f"Task {ref_of(row)!r}"):
            return Entry.model_validate(content)

    def read(sha256: str) -> bytes:
        column, key = blobs[sha256]
        query = select(column).where(*(c == value for c, value in zip(column.table.primary_key, key, strict=True)))
        data = connection.scalar(query)
        if data is None or digest(data) != sha256:
            raise IntegrityError(f"its {column.table.name}'s stored bytes are missing or have changed")
        return data

    tasks: list[Entry] = []
    sorter = TopologicalSorter({task_id: parents[task_id] for task_id in rows})
    sorter.prepare()
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=lambda task_id: (rows[task_id].name, rows[task_id].version))
        tasks += map(entry, ready)
        sorter.done(*ready)
    backbones = rows_where(connection, schema.backbone, "fingerprint", {row.backbone for row in rows.values()})
    with _validation_errors("A backbone"):
        records = [_portable(row) for fingerprint in sorted(backbones) for row in backbones[fingerprint]]
        contents = Contents.model_validate({"backbones": records, "tasks": tasks})
    if refs is not None:
        return contents, read, ()
    query = select(schema.alias.c.name, schema.alias.c.alias, schema.task.c.version)
    alias_rows = connection.execute(query.join_from(schema.alias, schema.task))
    aliases = [BundledAlias.model_validate(row._asdict()) for row in alias_rows]
    return contents, read, sorted(aliases, key=lambda alias: (alias.name, alias.alias))


@contextmanager
def _validation_errors(what: str) -> Iterator[None]:
    """Turns ValidationError into IntegrityError."""
    try:
        yield
    except ValidationError as error:
        raise IntegrityError(f"{what} has a damaged record: {first_error(error)}.") from error


def _portable(row: Row[Any]) -> dict[str, Any]:
    """A row without the ids of its database."""
    return {key: value for key, value in row._mapping.items() if key not in INTERNAL}
