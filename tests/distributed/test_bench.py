"""`addenda bench serving --ray`: every number of replicas is measured, and the cost of a task is recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from addenda import FrozenBackbone
from addenda.benchmarks.serving.serving_timings import run_serving

pytestmark = pytest.mark.ray


def test_replicas_and_tasks_are_measured_and_recorded(
    cluster: tuple[Any, str], glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    figures = run_serving(glyphs, None, tmp_path, counts=(1, 20), seconds=1, rounds=2, ray=cluster[1], replicas=(1,))
    assert all(math.isfinite(figure.measured) for figure in figures)
    for group in ("1 tasks on Ray Serve, 2 CPUs a replica", "20 tasks on Ray Serve, 2 CPUs a replica"):
        measured = {figure.what: figure.measured for figure in figures if figure.group == group}
        assert measured["replicas: 1, 24 clients"] > 1
        assert measured["replicas: 1, failed requests"] == 0
        assert measured["replicas: 1, memory of one"] > 100
    assert [figure.unit for figure in figures if figure.group.startswith("a task more, from 1 to 20")] == ["ms", "kB"]
    written = json.loads((tmp_path / "serving.json").read_text())
    assert [row["what"] for row in written["figures"]] == [figure.what for figure in figures]
