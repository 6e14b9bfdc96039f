"""An artifact's header: what it says of its tensors, read without them."""

from __future__ import annotations

import json
import math
from collections.abc import Set
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, select

from addenda.registry.store.schema import artifact

_USUAL = 16_384
"""Bytes of an artifact that hold the header of most."""


class Inside(NamedTuple):
    """What a record tells of an artifact's inside; None where its header cannot be read."""

    adapter_rank: int | None = None
    temperature: float | None = None


def end(data: bytes) -> int:
    """Where an artifact's tensors begin."""
    return 8 + int.from_bytes(data[:8], "little")


def parts(header: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """A header's manifest and its tensors' places; of what is none it raises KeyError, TypeError or ValueError."""
    places = json.loads(header[8:])
    return json.loads(places.pop("__metadata__")["addenda"]), places


def inside(header: bytes) -> Inside:
    """The rank of a task's adapters and its temperature; of a damaged header neither."""
    try:
        manifest, places = parts(header)
        rank = int(places["adapters.q.down"]["shape"][1]) if "adapters.q.down" in places else 0
        temperature = float(manifest.get("temperature", 1.0))
        return Inside(rank, temperature) if 0 < temperature < math.inf else Inside()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        return Inside()


def insides(connection: Connection, hashes: Set[str]) -> dict[str, Inside]:
    """What stored artifacts say of their inside, by sha256; of most no more is fetched than the beginning."""
    data, found = artifact.c.data, dict.fromkeys(hashes, Inside())
    query = select(artifact.c.sha256, func.substr(data, 1, _USUAL), func.length(data))
    for sha256, start, size in connection.execute(query.where(artifact.c.sha256.in_(hashes))):
        start = bytes(start or b"")
        if len(start) < end(start) <= size:
            longer = select(func.substr(data, 1, end(start))).where(artifact.c.sha256 == sha256)
            start = bytes(connection.scalar(longer) or b"")
        found[sha256] = inside(start[: end(start)])
    return found
