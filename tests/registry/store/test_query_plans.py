"""Query plans: every filter of a task listing is answered by an index."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Select, select
from sqlalchemy.dialects import postgresql, sqlite

from addenda.registry import Registry, TaskFilter
from addenda.registry.store import schema
from addenda.registry.store.queries import listing
from tests.support.databases import Database, raw
from tests.support.filled import BACKBONES, fill_registry

pytestmark = pytest.mark.slow

DIALECTS = {"sqlite": sqlite.dialect(), "postgresql": postgresql.dialect()}

FILTERS = {
    "first page": (TaskFilter(), None),
    "deep page": (TaskFilter(), "line-02-5:1"),
    "retired too": (TaskFilter(retired=True), None),
    "name": (TaskFilter(name="line-07-3"), None),
    "name pattern": (TaskFilter(name="*-07-*"), None),
    "tag": (TaskFilter(tag="audited"), None),
    "rare tag": (TaskFilter(tag="pilot"), None),
    "few scores": (TaskFilter(min_score=0.999), None),
    "most scores": (TaskFilter(min_score=0.1), None),
    "backbone": (TaskFilter(backbone="vit_1"), None),
    "fingerprint and score": (TaskFilter(backbone=BACKBONES[2], min_score=0.9), None),
    "since": (TaskFilter(since="2020-01-04"), None),
    "until": (TaskFilter(until="2020-01-01T03"), None),
    "extends": (TaskFilter(extends="line-00-0:1"), None),
    "tag and score": (TaskFilter(tag="audited", min_score=0.9), None),
}


@pytest.fixture(scope="module")
def full(database: Database) -> str:
    """8,000 task versions. PostgreSQL collects planner statistics by itself, SQLite only on ANALYZE."""
    return fill_registry(database.new(), 8000)


def plan(location: str, query: Select, kind: str) -> list[str]:
    """The lines of a query plan as the database prints it."""
    sql = str(query.compile(dialect=DIALECTS[kind], compile_kwargs={"literal_binds": True}))
    with raw(location) as connection:
        rows = connection.exec_driver_sql(f"EXPLAIN{' QUERY PLAN' * (kind == 'sqlite')} {sql.replace('%', '%%')}")
        return [row[-1].strip() for row in rows]


def reads(lines: list[str], kind: str, table: str = "task") -> list[str]:
    """The lines of a plan that read a table's rows."""
    if kind == "sqlite":  # SCAN task; SCAN task USING COVERING INDEX ...; SEARCH task USING ...
        return [line for line in lines if line.split()[:2] in (["SCAN", table], ["SEARCH", table])]
    return [line for line in lines if f" on {table} " in line or " on ix_" in line]


def by_index(line: str) -> bool:
    """Whether a line uses an index: PostgreSQL prints `Seq Scan` if not, SQLite SCAN without an index name."""
    return "Seq Scan" not in line and ("USING" in line or " using " in line or "Bitmap" in line)


def check_page(location: str, kind: str, what: str) -> None:
    chosen, before = FILTERS[what]
    with raw(location) as connection:
        query = listing(connection, chosen, 100, before)
    lines = plan(location, query, kind)
    read_lines = reads(lines, kind)
    assert len(read_lines) >= 2, lines
    assert all(by_index(line) for line in read_lines), lines


@pytest.mark.parametrize("what", FILTERS)
def test_a_page_of_any_filter_is_found_by_an_index(full: str, database: Database, what: str) -> None:
    check_page(full, database.kind, what)


def test_statistics_lead_sqlite_to_no_worse_plan(full: str, tmp_path: Path) -> None:
    if "://" in full:
        pytest.skip("PostgreSQL always has planner statistics")
    with raw(full) as connection:
        connection.exec_driver_sql("VACUUM INTO ?", (str(tmp_path / "copy.db"),))
    with raw(str(tmp_path / "copy.db")) as connection:
        connection.exec_driver_sql("ANALYZE")
    for what in FILTERS:
        check_page(str(tmp_path / "copy.db"), "sqlite", what)


def test_a_scan_without_an_index_would_be_seen(full: str, database: Database) -> None:
    query = select(schema.task.c.labels).where(schema.task.c.num_memory_tokens == 7)
    (line,) = reads(plan(full, query, database.kind), database.kind)
    assert not by_index(line)


def test_a_filled_registry_has_the_expected_contents(full: str) -> None:
    def count(**conditions: object) -> int:
        return len(registry.tasks(TaskFilter(**conditions)))

    registry = Registry.open(full)
    assert count(retired=True) == 8000
    assert count() == 8000 - 80
    assert count(tag="audited", retired=True) == 800
    assert count(tag="pilot", retired=True) == 8
    assert count(extends="line-00-0:1", retired=True) == 399
    assert count(backbone="vit_2", retired=True) == 2000
    assert count(min_score=0.5, retired=True) == pytest.approx(4000, rel=0.1)
    assert registry.get("line-10-0:1").extends == ("line-00-0:1",)
    assert len(registry.load(SimpleNamespace(fingerprint=BACKBONES[0]))) == 2000
    registry.close()
