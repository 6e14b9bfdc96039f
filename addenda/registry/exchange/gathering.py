"""Gathering what is to travel: tasks and their ancestors, in an order that does not depend on the database."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from graphlib import TopologicalSorter
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Column, Connection, Row, Table, select

from addenda.exceptions import IntegrityError
from addenda.registry.exchange.manifest import Alias, Contents, Entry, fault
from addenda.registry.store import schema
from addenda.registry.store.hashing import digest
from addenda.registry.store.queries import find, ref_of, rows_where, with_ancestors

_OURS = {"id", "task_id", "event_id"}  # numbers of one database
_BELONGING = (schema.golden, schema.statistics, schema.evaluation, schema.retirement, schema.tag)

Read = Callable[[str], bytes]
"""Gives the bytes of a sha256, one at a time; IntegrityError where they do not hash to it."""
Arrived = tuple[Contents, Read, Sequence[Alias]]
"""What has come: tasks, a way to read their bytes, and aliases to be pointed as they point there."""


def gather(connection: Connection, refs: Sequence[str] | None) -> Arrived:
    """What is to travel, without its bytes, and a way to read these, as long as the connection is open.

    Args:
        connection: to read from.
        refs: tasks, which take their ancestors along; None for all there are, with their aliases.
    """
    asked = connection.execute(select(schema.task)).all() if refs is None else [find(connection, ref) for ref in refs]
    rows, parents = with_ancestors(connection, asked)
    for child, kin in parents.items():
        if not rows.keys() >= set(kin):
            raise IntegrityError(f"Task {ref_of(rows[child])!r} extends one that is missing.")
    of = {table.name: _grouped(connection, table, rows) for table in _BELONGING}
    places: dict[str, tuple[Column[bytes], tuple[Any, ...]]] = {}

    def entry(number: int) -> Entry:
        row = rows[number]
        places[row.artifact] = schema.artifact.c.data, (row.artifact,)
        for golden in of["golden"][number]:
            places[golden.digest] = schema.golden.c.logits, (number, golden.numerics_fingerprint)
        for statistics in of["statistics"][number]:
            places[statistics.sha256] = schema.statistics.c.data, (number,)
        kin = [rows[parent] for parent in parents[number]]
        belonging = {name: list(map(_plain, grouped[number])) for name, grouped in of.items()}
        content = {
            "task": _plain(row),
            "parents": [{"name": parent.name, "version": parent.version, "sha256": parent.artifact} for parent in kin],
            "goldens": sorted(belonging["golden"], key=lambda golden: str(golden["numerics_fingerprint"])),
            "statistics": next((statistics["sha256"] for statistics in belonging["statistics"]), None),
            "evaluations": belonging["evaluation"],
            "retirement": next(iter(belonging["retirement"]), None),
            "tags": sorted(carried["tag"] for carried in belonging["tag"]),
        }
        with _damage(f"Task {ref_of(row)!r}"):
            return Entry.model_validate(content)

    def read(sha256: str) -> bytes:
        column, key = places[sha256]
        query = select(column).where(*(c == value for c, value in zip(column.table.primary_key, key, strict=True)))
        data = connection.scalar(query)
        if data is None or digest(data) != sha256:
            raise IntegrityError(f"its {column.table.name}'s stored bytes are missing or have changed")
        return data

    tasks: list[Entry] = []
    sorter = TopologicalSorter({number: parents[number] for number in rows})
    sorter.prepare()
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=lambda number: (rows[number].name, rows[number].version))
        tasks += map(entry, ready)
        sorter.done(*ready)
    backbones = rows_where(connection, schema.backbone.c.fingerprint, {row.backbone for row in rows.values()})
    named = sorted((_plain(row) for row in backbones), key=lambda backbone: str(backbone["fingerprint"]))
    with _damage("A backbone"):
        contents = Contents.model_validate({"backbones": named, "tasks": tasks})
    return contents, read, _aliases(connection) if refs is None else ()


def _aliases(connection: Connection) -> list[Alias]:
    """Every alias, with the version that it points at."""
    query = select(schema.alias.c.name, schema.alias.c.alias, schema.task.c.version).join_from(
        schema.alias, schema.task
    )
    pointed = [Alias.model_validate(dict(row._mapping)) for row in connection.execute(query)]
    return sorted(pointed, key=lambda alias: (alias.name, alias.alias))


@contextmanager
def _damage(what: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise IntegrityError(f"{what} has a damaged record: {fault(error)}.") from error


def _grouped(connection: Connection, table: Table, task_ids: Collection[int]) -> dict[int, list[Row[Any]]]:
    groups = defaultdict(list)
    for row in rows_where(connection, table.c.task_id, task_ids):
        groups[row.task_id].append(row)
    return groups


def _plain(row: Row[Any]) -> dict[str, Any]:
    return {key: value for key, value in row._mapping.items() if key not in _OURS}
