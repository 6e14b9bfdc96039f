"""What a value is known by: one text for it, and the sha256 of its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from addenda.exceptions import IntegrityError


def digest(data: bytes) -> str:
    """The sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Has an IntegrityError begin with what cannot be done, or trusted."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(f"{what}: {str(error).rstrip('.')}.") from error
