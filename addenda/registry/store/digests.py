"""Canonical JSON and sha256 digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from addenda.exceptions import IntegrityError


def digest(data: bytes) -> str:
    """The sha256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal text; raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@contextmanager
def integrity_errors(context: str) -> Iterator[None]:
    """Prefixes the message of an IntegrityError."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(f"{context}: {str(error).rstrip('.')}.") from error
