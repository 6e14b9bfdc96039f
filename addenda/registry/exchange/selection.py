"""Gathering what is to travel: tasks and their ancestors, in an order that does not depend on the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from graphlib import TopologicalSorter
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Column, Connection, Row, select

from addenda.exceptions import IntegrityError
from addenda.registry.exchange.manifest import BundledAlias, Contents, Entry, fault
from addenda.registry.store import schema
from addenda.registry.store.digests import digest
from addenda.registry.store.queries import find, ref_of, rows_where, with_ancestors

_OURS = {"id", "task_id", "event_id"}  # numbers of one database
_BELONGING = (schema.golden, schema.statistics, schema.evaluation, schema.retirement, schema.tag)

Read = Callable[[str], bytes]
"""Gives the bytes of a sha256, one at a time; IntegrityError where they do not hash to it."""
Arrived = tuple[Contents, Read, Sequence[BundledAlias]]
"""What has come: tasks, a way to read their bytes, and aliases to be pointed as they point there."""


def gather(connection: Connection, refs: Sequence[str] | None) -> Arrived:
    """What is to travel with some tasks, or, for None, with all and their aliases; its bytes are read when asked."""
    asked = connection.execute(select(schema.task)).all() if refs is None else [find(connection, ref) for ref in refs]
    rows, parents = with_ancestors(connection, asked)
    for child, kin in parents.items():
        if not rows.keys() >= set(kin):
            raise IntegrityError(f"Task {ref_of(rows[child])!r} extends one that is missing.")
    of = {table.name: rows_where(connection, table, "task_id", rows) for table in _BELONGING}
    places: dict[str, tuple[Column[bytes], tuple[Any, ...]]] = {}

    def entry(number: int) -> Entry:
        row = rows[number]
        kin = [rows[parent] for parent in parents[number]]
        belonging = {name: list(map(_plain, grouped[number])) for name, grouped in of.items()}
        places[row.artifact] = schema.artifact.c.data, (row.artifact,)
        for golden in of["golden"][number]:
            places[golden.digest] = schema.golden.c.logits, (number, golden.numerics_fingerprint)
        for statistics in of["statistics"][number]:
            places[statistics.sha256] = schema.statistics.c.data, (number,)
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
    backbones = rows_where(connection, schema.backbone, "fingerprint", {row.backbone for row in rows.values()})
    with _damage("A backbone"):
        named = [_plain(row) for fingerprint in sorted(backbones) for row in backbones[fingerprint]]
        contents = Contents.model_validate({"backbones": named, "tasks": tasks})
    if refs is not None:
        return contents, read, ()
    query = select(schema.alias.c.name, schema.alias.c.alias, schema.task.c.version)
    pointed = connection.execute(query.join_from(schema.alias, schema.task))
    aliases = [BundledAlias.model_validate(row._asdict()) for row in pointed]
    return contents, read, sorted(aliases, key=lambda alias: (alias.name, alias.alias))


@contextmanager
def _damage(what: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise IntegrityError(f"{what} has a damaged record: {fault(error)}.") from error


def _plain(row: Row[Any]) -> dict[str, Any]:
    return {key: value for key, value in row._mapping.items() if key not in _OURS}
