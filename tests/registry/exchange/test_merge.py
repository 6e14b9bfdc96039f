"""Merging two registries: every task arrives, and all logits of both registries stay bitwise identical."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from addenda.combined import CombinedModel, golden, verify
from addenda.exceptions import IntegrityError, RegistryError
from addenda.registry import Received, Registry, TaskFilter
from addenda.registry.exchange import manifest
from tests.support.databases import raw, refused, rows, tamper, unchanged, without_triggers
from tests.support.models import bits, images
from tests.support.processes import killed_at_each_statement
from tests.support.registries import BACKBONE, a_task, keep, verify_ledger
from tests.support.tasks import random_task
from tests.support.travel import FULL, add, assert_same, fill, merges


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Registry]:
    """A full registry on SQLite."""
    with Registry.open(fill(str(tmp_path / "home.db")), user="ada") as registry:
        yield registry


def test_every_task_of_the_other_arrives_with_its_retirement_and_alias(there, here):
    with unchanged(there):
        received = here.merge(there)
    assert {each.ref: each.state for each in received} == dict.fromkeys({*FULL, "digits@production"}, "added")
    assert_same(here, there, FULL)
    assert here.get("digits@production").version == 1
    assert [record.ref for record in here.tasks(TaskFilter(name="old", retired=True))] == ["old:1"]
    assert here.tasks(TaskFilter(name="old")) == []
    assert verify_ledger(here.location) == here.generation
    assert {event.details["source"] for event in here.events()} == {there.location}


def test_merged_twice_adds_nothing_and_the_generation_stays(home, here):
    here.merge(home)
    with unchanged(here):
        assert {each.state for each in here.merge(home)} == {"there already"}
        assert {each.state for each in here.merge(here)} == {"there already"}


def damaged(received: list[Received]) -> list[str]:
    """The tasks that are reported as damaged."""
    return [each.ref for each in received if "its stored bytes in this registry are DAMAGED" in each.detail]


def test_damaged_bytes_of_existing_tasks_are_reported_and_nothing_is_built_on_them(home, here):
    here.merge(home)
    assert damaged(here.merge(home)) == []
    sha256 = here.get("strokes").sha256
    tamper(here, "artifact", "UPDATE artifact SET data = :data WHERE sha256 = :sha256", data=b"other", sha256=sha256)
    assert damaged(here.merge(home)) == ["strokes:1"]
    with refused(here.location, IntegrityError, match=f"The stored artifact with sha256 {sha256[:12]}… has changed"):
        here.merge(home, renames={"strokes": "lines"})


@pytest.mark.parametrize(("table", "column"), [("statistics", "data"), ("golden", "logits")])
def test_damaged_statistics_or_golden_probes_of_existing_tasks_are_reported(home, here, table, column):
    here.merge(home)
    changed = f"UPDATE {table} SET {column} = :data WHERE task_id = (SELECT id FROM task WHERE name = 'tip')"
    tamper(here, table, changed, data=b"other")
    assert damaged(here.merge(home)) == ["tip:1"]


def test_a_dry_run_returns_what_would_be_done_and_changes_no_row(home, here):
    with unchanged(here):
        planned = here.merge(home, dry_run=True)
    assert here.merge(home) == planned


def test_there_and_back_every_registry_holds_the_same(there, here):
    here.add_backbone(BACKBONE)
    add(here, a_task("birds", 30))
    here.merge(there)
    before = {ref: there.record(ref) for ref in FULL}
    back = {each.ref: each.state for each in there.merge(here)}
    assert back == dict.fromkeys({*FULL, "digits@production"}, "there already") | {"birds:1": "added"}
    assert_same(here, there, [*FULL, "birds:1"])
    assert {ref: there.record(ref) for ref in FULL} == before
    assert verify_ledger(there.location) == there.generation


def test_old_logits_are_the_same_bits_on_both_sides(tiny, database, elsewhere):
    with Registry.open(elsewhere.new()) as there, Registry.open(database.new()) as here:
        before = {}
        for registry, names in ((here, ("birds", "cars")), (there, ("digits", "signs"))):
            registry.add_backbone(tiny.record())
            root = random_task(tiny, names[0], seed=len(names[0]))
            root = registry.register(root, golden(tiny, root))
            child = random_task(tiny, names[1], parents=(root,), seed=40 + len(before), rank=2)
            registry.register(child, golden(tiny, child))
            before |= CombinedModel(tiny, registry.load(tiny))(images())
        before_here = CombinedModel(tiny, here.load(tiny)).tasks
        here.merge(there)
        there.merge(here)
        assert len(before_here) == 2
        for registry in (here, there):
            merged = registry.load(tiny)
            after = CombinedModel(tiny, merged)(images())
            assert {name: bits(logits) for name, logits in after.items()} == {n: bits(x) for n, x in before.items()}
            assert len(after) == 4
            verdicts = verify(tiny, [(task, registry.goldens(task.ref)) for task in merged])
            assert [(verdict.ok, verdict.identical) for verdict in verdicts] == [(True, True)] * 4


def test_all_clashes_are_named_and_nothing_is_merged(home, here):
    here.add_backbone(BACKBONE)
    add(here, a_task("strokes", 20))
    add(here, a_task("tip", 21))
    with refused(here.location, RegistryError, match=r"'strokes:1' \(.* is not .*\), 'tip:1' \(.*--rename OLD=NEW"):
        here.merge(home)
    received = here.merge(home, renames={"strokes": "lines", "tip": "top"})
    assert {each.ref for each in received} == {*FULL, "digits@production"} - {"strokes:1", "tip:1"} | {
        "lines:1", "top:1",
    }  # fmt: skip
    assert here.get("top").extends == ("digits:1", "lines:1")
    assert here.record("strokes").created_by == "bob"


def test_an_alias_that_points_elsewhere_stays_and_is_reported(home, here):
    here.merge(home)
    here.set_alias("digits", "production", 2)
    home.set_alias("digits", "staging", 2)
    before = here.generation
    received = {each.ref: each for each in here.merge(home) if "@" in each.ref}
    assert (received["digits@production"].state, received["digits@production"].detail) == (
        "kept", "points at 'digits:2' here, not at 'digits:1'",
    )  # fmt: skip
    assert (received["digits@staging"].state, received["digits@staging"].generation) == ("added", before + 1)
    assert [here.get(f"digits@{alias}").version for alias in ("production", "staging")] == [2, 2]
    assert here.generation == before + 1


def test_an_alias_follows_its_task_to_another_name(home, here):
    here.merge(home, renames={"digits": "numerals"})
    assert here.get("numerals@production").ref == "numerals:1"


def test_a_task_retired_only_in_the_source_stays_active_and_is_reported(home, here):
    here.merge(home)
    home.retire("bare", "no use")
    with unchanged(here):
        details = {each.ref: each.detail for each in here.merge(home)}
    assert details["bare:1"] == "retired in the source (no use), active here"
    assert details["old:1"] == ""


def test_a_version_that_was_registered_again_arrives_beside_the_retired_one(tmp_path, here):
    with Registry.open(tmp_path / "a.db", user="alice") as there:
        there.add_backbone(BACKBONE)
        keep(there, a_task())
        there.retire("digits:1", "by mistake")
        keep(there, a_task(), new_version=True)
        there.set_alias("digits", "production", 2)
        received = here.merge(there)
        assert [(each.ref, each.state) for each in received] == [
            ("digits:1", "added"), ("digits:2", "added"), ("digits@production", "added"),
        ]  # fmt: skip
        assert here.get("digits").version == 2
        assert {each.state for each in here.merge(there)} == {"there already"}
        here.set_alias("digits", "other", 2)
        there.export(["digits:2"], tmp_path / "second.addenda")
    assert here.import_bundle(tmp_path / "second.addenda")[0].ref == "digits:2"
    assert verify_ledger(here.location) == here.generation


def test_an_active_version_arrives_where_its_content_is_retired(tmp_path, here):
    with Registry.open(tmp_path / "a.db") as there:
        there.add_backbone(BACKBONE)
        keep(there, a_task("other"))
        keep(there, a_task())
        here.merge(there)
        here.retire("digits:1", "old")
        (again,) = [each for each in here.merge(there) if each.ref == "digits:1"]
        assert (again.state, again.detail) == ("there already", "active in the source, retired here")
        there.retire("digits:1", "old")
        keep(there, a_task(), new_version=True)
        there.export(["digits:2"], tmp_path / "second.addenda")
    assert [(each.ref, each.state) for each in here.import_bundle(tmp_path / "second.addenda")] == [
        ("digits:2", "added")
    ]
    assert here.get("digits").version == 2


def test_a_retirement_keeps_its_author_and_time(tmp_path, here):
    with Registry.open(tmp_path / "a.db", user="alice") as there:
        there.add_backbone(BACKBONE)
        keep(there, a_task())
        there.retire("digits", "superseded")
        here.merge(there)
        stamps = [rows(registry.location)["retirement"][0] for registry in (there, here)]
    assert stamps[0][1:4] == stamps[1][1:4]
    assert verify_ledger(here.location) == here.generation
    assert here.check_integrity().ok


def test_a_task_evaluated_every_night_for_years_can_be_merged(tmp_path, here, monkeypatch):
    assert manifest.MAX_EVALUATIONS == 100 * manifest.MAX_ROWS
    monkeypatch.setattr(manifest, "MAX_ROWS", 3)  # of tags and golden probes
    with Registry.open(tmp_path / "a.db") as there:
        there.add_backbone(BACKBONE)
        keep(there, a_task())
        row = {"data_fingerprint": "d" * 64, "numerics_fingerprint": "n" * 64, "logits_digest": "2:00"}
        for _ in range(4):
            there.add_evaluation("digits", metrics={"accuracy": 0.5, "num_images": 4}, **row)
        assert [each.state for each in here.merge(there)] == ["added"]
    assert len(here.evaluations("digits")) == 4


def test_a_task_damaged_there_is_named_and_nothing_is_merged(home, here):
    sql = "UPDATE artifact SET data = :data WHERE sha256 = :sha256"
    tamper(home.location, "artifact", sql, data=b"1234", sha256=home.get("tip").sha256)
    with refused(
        here.location, IntegrityError, match=r"Task 'tip:1' was not imported: its artifact's stored bytes are missing"
    ):
        here.merge(home)


def test_a_row_damaged_there_is_named_and_nothing_is_merged(home, here):
    tamper(home.location, "task", "UPDATE task SET num_parameters = 1 WHERE name = 'tip'")
    with refused(here, IntegrityError, match=r"Task 'tip:1' .* does not match .*: num_parameters"):
        here.merge(home)
    tamper(home.location, "task", "UPDATE task SET created_at = 'then' WHERE name = 'tip'")
    with refused(here, IntegrityError, match=r"Task 'tip:1' has a damaged record: task\.created_at: String"):
        here.merge(home)


def test_a_parent_missing_in_the_source_is_reported_and_nothing_is_merged(home, here):
    with raw(home.location) as connection:
        without_triggers(connection, "task")
        connection.execute(text("DELETE FROM task WHERE name = 'strokes'"))
    with refused(here.location, IntegrityError, match=r"Task '(digits|tip):1' extends a task that is missing"):
        here.merge(home)


@pytest.mark.slow
@pytest.mark.usefixtures("another_interpreter")
def test_a_merge_killed_at_any_statement_leaves_nothing_and_a_retry_is_whole(database, tmp_path):
    with Registry.open(fill(str(tmp_path / "other.db"))) as there, Registry.open(database.new()) as here:
        assert killed_at_each_statement(merges, here.location, there.location) > 100
        assert verify_ledger(here.location) == here.generation
        assert_same(here, there, FULL)
        assert {each.state for each in here.merge(there)} == {"there already"}
