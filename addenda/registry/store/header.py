"""An artifact's header: what it says of its tensors, read without them."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

from sqlalchemy import Connection, Integer, func, literal_column, select

from addenda.registry.store.schema import artifact

_USUAL = 16_384
"""Bytes that hold the header of most artifacts."""


class Inside(NamedTuple):
    """What a record tells of an artifact's inside; None where its header cannot be read."""

    adapter_rank: int | None = None
    temperature: float | None = None
    has_token: bool | None = None
    num_layer_features: int | None = None


def end(data: bytes) -> int:
    """Where an artifact's tensors begin."""
    return 8 + int.from_bytes(data[:8], "little")


def parts(header: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """A header's manifest and its tensors' places; of what is none it raises KeyError, TypeError or ValueError."""
    places = json.loads(header[8:])
    return json.loads(places.pop("__metadata__")["addenda"]), places


def inside(header: bytes) -> Inside:
    """What a header says of its task; of a damaged one nothing."""
    try:
        manifest, places = parts(header)
        rank = int(places["adapters.q.down"]["shape"][1]) if "adapters.q.down" in places else 0
        temperature = float(manifest.get("temperature", 1.0))
        read = places.get("layer_down") or places.get("layer_weight")
        num_layer_features = int(read["shape"][1]) if read else 0
        found = Inside(rank, temperature, "class_token" in places, num_layer_features)
        return found if 0 < temperature < math.inf else Inside()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        return Inside()


def insides(connection: Connection, hashes: Set[str]) -> dict[str, Inside]:
    """What stored artifacts say of their inside, by sha256; the database reads no more of them than their headers."""
    found = dict.fromkeys(hashes, Inside())
    headers = _of_sqlite if connection.dialect.name == "sqlite" else _of_postgresql
    return found | {sha256: inside(header) for sha256, header in headers(connection, hashes)}


def _of_sqlite(connection: Connection, hashes: Set[str]) -> Iterator[tuple[str, bytes]]:
    """By incremental reads: SQLite's substr would read all of an artifact, which may have megabytes."""
    driver: Any = connection.connection.driver_connection
    query = select(artifact.c.sha256, literal_column("rowid", Integer)).where(artifact.c.sha256.in_(hashes))
    for sha256, rowid in connection.execute(query).all():
        try:
            with driver.blobopen("artifact", "data", rowid, readonly=True) as blob:
                size = blob.read(8)
                yield sha256, size + blob.read(min(end(size), len(blob)))[: end(size) - 8]
        except sqlite3.OperationalError as error:
            if "cannot open value" not in str(error):  # damage: no bytes stand there
                raise


def _of_postgresql(connection: Connection, hashes: Set[str]) -> Iterator[tuple[str, bytes]]:
    data = artifact.c.data
    query = select(artifact.c.sha256, func.substr(data, 1, _USUAL), func.length(data))
    for sha256, start, size in connection.execute(query.where(artifact.c.sha256.in_(hashes))).all():
        if len(start) < end(start) <= size:
            start = connection.scalar(select(func.substr(data, 1, end(start))).where(artifact.c.sha256 == sha256))
        yield sha256, start[: end(start)]
