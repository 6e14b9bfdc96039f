"""JSON lines files of results, from which an interrupted run resumes and to which several processes may append."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Reads all lines, without a line truncated by an interruption; a missing file has none."""
    values = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            values.append(json.loads(line))
    return values


def append_line(file: Path, value: Mapping[str, Any]) -> None:
    """Appends a line in a single write, because another process may append too; first ends a truncated line."""
    before = file.read_bytes() if file.exists() else b""
    truncated = bool(before) and not before.endswith(b"\n")
    with file.open("a") as stream:
        stream.write("\n" * truncated + json.dumps(value) + "\n")
