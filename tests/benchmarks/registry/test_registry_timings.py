"""`addenda bench registry` measures a SQLite file and the given databases, and records the results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from addenda import FrozenBackbone, Registry
from addenda.benchmarks.registry.registry_timings import run_registry
from addenda.benchmarks.report.tables import Figure
from addenda.exceptions import RegistryError
from addenda.registry import TaskFilter
from tests.support.databases import Database, Postgres


@pytest.fixture
def server(postgres: str) -> Iterator[str]:
    """An empty PostgreSQL database."""
    database = Postgres(postgres)
    yield database.new()
    database.close()


@pytest.mark.slow
def test_bench_registry_measures_and_records(tiny: FrozenBackbone, server: str, tmp_path: Path) -> None:
    figures = run_registry(tiny, [server], tmp_path, quick=True, num_tasks=40, num_listed=800)
    groups = {name: [figure for figure in figures if name in figure.group] for name in ("SQLite", "PostgreSQL")}
    by_name = {name: {figure.what: figure for figure in group} for name, group in groups.items()}
    assert len(groups["SQLite"]) + len(groups["PostgreSQL"]) == len(figures)
    assert len(groups["PostgreSQL"]) > 15
    assert set(by_name["SQLite"]) - set(by_name["PostgreSQL"]) == {"these bytes twice, the disk alone"}
    for figure in figures:
        assert figure.measured >= 0
        assert figure.low is None or figure.low <= figure.measured <= figure.high
    for measured in by_name.values():
        assert measured["40 tasks read and hashed"].target == 0.08
        assert measured["page: first"].target == 50
        assert measured["registered with statistics"].target == 100
    written = json.loads((tmp_path / "registry.json").read_text())
    assert [row["what"] for row in written["figures"]] == [figure.what for figure in figures]
    assert {row["met"] for row in written["figures"]} <= {True, False, None}
    table = (tmp_path / "registry.md").read_text()
    assert all(f"**{name}" in table for name in ("SQLite", "PostgreSQL"))
    assert "| page: first |" in table
    assert server not in table
    assert sorted(path.name for path in tmp_path.iterdir()) == [".addenda-output", "registry.json", "registry.md"]
    with Registry.open(server) as registry:
        assert len(registry.load(tiny)) == 40
        assert registry.statistics("known-0") is not None
        assert registry.statistics("plain-0") is None
        assert len(registry.goldens("known-19")) == 1
        assert len(registry.tasks(TaskFilter(retired=True))) == 840


def test_a_registry_in_use_is_not_filled(tiny: FrozenBackbone, database: Database) -> None:
    location = database.new()
    with Registry.open(location) as registry:
        registry.add_backbone(tiny.record())
        with pytest.raises(RegistryError, match=r"has a registry at generation 1, .* give an empty database"):
            run_registry(tiny, [location], quick=True, num_tasks=40, num_listed=800)
        assert registry.generation == 1


def test_a_target_is_a_minimum_or_a_maximum() -> None:
    assert Figure("any", "rate", "per s", 100, target=100, more=True).met
    assert not Figure("any", "rate", "per s", 99, target=100, more=True).met
    assert Figure("any", "page", "ms", 50, target=50).met
    assert not Figure("any", "page", "ms", 51, target=50).met
    assert Figure("any", "size", "kB", 51).met is None
