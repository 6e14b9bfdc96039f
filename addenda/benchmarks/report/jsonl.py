"""A file of results, one in each line, that an interrupted run goes on with and two runs may add to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> list[dict[str, Any]]:
    """What a file holds; a line that an interrupted run cut short is left out, and no file is none."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def append_line(file: Path, value: Mapping[str, Any]) -> None:
    """Adds a line in one write, since another process may add its own; one that was cut short is ended first."""
    before = file.read_bytes() if file.exists() else b""
    cut_short = bool(before) and not before.endswith(b"\n")
    with file.open("a") as stream:
        stream.write("\n" * cut_short + json.dumps(value) + "\n")
