"""Reading an artifact's header without its tensors."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

from sqlalchemy import Connection, Integer, func, literal_column, select

from addenda.registry.store.schema import artifact

_USUAL_SIZE = 16_384  # bytes that contain the header of most artifacts


class ArtifactHeader(NamedTuple):
    """The fields of a record that come from the artifact's header; all None if the header is unreadable."""

    adapter_rank: int | None = None
    temperature: float | None = None
    has_token: bool | None = None
    num_layer_features: int | None = None


def header_size(data: bytes) -> int:
    """The size of an artifact's header, after which its tensors begin."""
    return 8 + int.from_bytes(data[:8], "little")


def parse_header(header: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """A header's manifest and tensor entries; raises KeyError, TypeError or ValueError if it is invalid."""
    entries = json.loads(header[8:])
    return json.loads(entries.pop("__metadata__")["addenda"]), entries


def _fields(header: bytes) -> ArtifactHeader:
    try:
        manifest, entries = parse_header(header)
        rank = int(entries["adapters.q.down"]["shape"][1]) if "adapters.q.down" in entries else 0
        temperature = float(manifest.get("temperature", 1.0))
        layer_weight = entries.get("layer_down") or entries.get("layer_weight")
        num_layer_features = int(layer_weight["shape"][1]) if layer_weight else 0
        fields = ArtifactHeader(rank, temperature, "class_token" in entries, num_layer_features)
        return fields if 0 < temperature < math.inf else ArtifactHeader()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        return ArtifactHeader()


def read_headers(connection: Connection, hashes: Set[str]) -> dict[str, ArtifactHeader]:
    """The headers of stored artifacts, by sha256; reads only the headers from the database."""
    missing = dict.fromkeys(hashes, ArtifactHeader())
    headers = _sqlite_headers if connection.dialect.name == "sqlite" else _postgresql_headers
    return missing | {sha256: _fields(header) for sha256, header in headers(connection, hashes)}


def _sqlite_headers(connection: Connection, hashes: Set[str]) -> Iterator[tuple[str, bytes]]:
    """Reads incrementally: SQLite's substr would read the whole artifact, which may have megabytes."""
    driver: Any = connection.connection.driver_connection
    query = select(artifact.c.sha256, literal_column("rowid", Integer)).where(artifact.c.sha256.in_(hashes))
    for sha256, rowid in connection.execute(query).all():
        try:
            with driver.blobopen("artifact", "data", rowid, readonly=True) as blob:
                size = blob.read(8)
                yield sha256, size + blob.read(min(header_size(size), len(blob)))[: header_size(size) - 8]
        except sqlite3.OperationalError as error:
            if "cannot open value" not in str(error):  # a damaged row without binary data
                raise


def _postgresql_headers(connection: Connection, hashes: Set[str]) -> Iterator[tuple[str, bytes]]:
    data = artifact.c.data
    query = select(artifact.c.sha256, func.substr(data, 1, _USUAL_SIZE), func.length(data))
    for sha256, start, size in connection.execute(query.where(artifact.c.sha256.in_(hashes))).all():
        end = header_size(start)
        if len(start) < end <= size:
            start = connection.scalar(select(func.substr(data, 1, end)).where(artifact.c.sha256 == sha256))
        yield sha256, start[:end]
