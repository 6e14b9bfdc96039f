"""Bundles: tasks are imported bit for bit, completely or not at all, and existing tasks are not altered."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from addenda.combined import CombinedModel, golden
from addenda.exceptions import IntegrityError, RegistryError, UnknownTaskError
from addenda.registry import Registry, digest
from tests.support.databases import refused, tamper, unchanged
from tests.support.models import bits, images
from tests.support.processes import KILLED, exit_code, killed_at_each_statement
from tests.support.registries import BACKBONE, HERE, a_large_task, a_task, probe, verify_ledger
from tests.support.tasks import random_task
from tests.support.travel import FULL, add, assert_same, export_and_die, imports, states


@pytest.fixture
def home(sent: Path, tmp_path: Path) -> Iterator[Registry]:
    """A copy, on SQLite, of the registry that the bundle `sent` was exported from."""
    with Registry.open(shutil.copy(sent.with_name("tasks.db"), tmp_path), user="ada") as registry:
        yield registry


# -- contents ----------------------------------------------------------------------------------------------------------


def test_every_task_arrives_bit_for_bit(there, here, tmp_path):
    assert set(there.export(sorted(FULL), tmp_path / "all.addenda")) == FULL
    assert states(here.import_bundle(tmp_path / "all.addenda")) == dict.fromkeys(FULL, "added")
    assert_same(here, there, FULL)
    assert here.backbones() == there.backbones() == [BACKBONE]
    assert verify_ledger(here.location) == here.generation


@pytest.mark.slow
def test_a_task_on_a_backbone_of_billions_of_parameters_is_imported(tmp_path):
    large = BACKBONE | {"num_parameters": 6_716_000_000}  # of a DINOv3 ViT-7B
    for name in ("here.db", "there.db"):
        Registry.open(tmp_path / name).close()
    with Registry.open(tmp_path / "there.db") as there, Registry.open(tmp_path / "here.db") as here:
        there.add_backbone(large)
        there.register(a_task("digits"), probe(a_task("digits")))
        there.export(["digits"], tmp_path / "one.addenda")
        here.import_bundle(tmp_path / "one.addenda")
        assert here.backbones() == [large]


def test_author_and_time_are_imported_and_the_event_records_the_import(here, sent):
    received = {each.ref: each for each in here.import_bundle(sent)}
    record = here.record("digits:1")
    assert (record.created_by, record.generation) == ("ada", received["digits:1"].generation)
    event = next(event for event in here.events("digits") if event.id == record.generation)
    assert (event.kind, event.subject, event.created_by) == ("imported", "digits:1", "bob")
    assert event.created_at > record.created_at
    with safe_open(sent, "numpy") as file:
        manifest = file.metadata()["addenda"]
    assert event.details == {"sha256": record.sha256, "origin": "digits:1", "source": f"bundle:{manifest}"}


def test_evaluations_keep_the_generation_where_they_were_made(home, here, tmp_path):
    home.export(["digits:1"], tmp_path / "one.addenda")
    here.import_bundle(tmp_path / "one.addenda")
    generation = here.record("digits:1").generation
    imported, original = here.evaluations("digits:1"), home.evaluations("digits:1")
    assert [(e.generation, e.metrics) for e in imported] == [(e.generation, e.metrics) for e in original]
    assert {e.event_id for e in imported} == {generation} != {e.event_id for e in original}


def test_a_task_is_exported_with_its_ancestors_only(home, here, tmp_path):
    assert home.export(["tip"], tmp_path / "tip.addenda") == ["strokes:1", "digits:1", "tip:1"]
    received = here.import_bundle(tmp_path / "tip.addenda")
    assert [(each.ref, each.generation) for each in received] == [("strokes:1", 2), ("digits:1", 3), ("tip:1", 5)]
    assert here.get("tip").extends == ("digits:1", "strokes:1")
    assert {record.ref for record in here.tasks()} == {"strokes:1", "digits:1", "tip:1"}


def test_a_retired_task_travels_when_it_is_named_and_stays_retired(home, here, tmp_path):
    home.export(["old:1"], tmp_path / "old.addenda")
    [received] = here.import_bundle(tmp_path / "old.addenda")
    assert (received.state, received.detail) == ("added", "retired: superseded")
    assert (here.record("old:1").retired, here.tasks()) == ("superseded", [])
    [event] = [event for event in here.events("old") if event.kind == "retired"]
    assert (event.created_by, event.details["reason"]) == ("bob", "superseded")


def test_tags_are_exported_and_aliases_are_not(home, here, tmp_path):
    home.export(["digits@production"], tmp_path / "one.addenda")
    here.import_bundle(tmp_path / "one.addenda")
    assert (here.record("digits:1").aliases, here.record("digits:1").tags) == ((), ("site=oslo",))
    assert ("tagged", "site=oslo") in [(event.kind, event.details.get("tag")) for event in here.events()]


def test_the_same_tasks_give_the_same_bytes_from_every_registry(there, here, tmp_path):
    one, two, three = (tmp_path / f"{number}.addenda" for number in range(3))
    active = sorted(FULL - {"old:1"})
    there.export(active, one)
    there.export([*reversed(active), "tip"], two)
    there.export(["tip"], tmp_path / "tip.addenda")
    here.import_bundle(tmp_path / "tip.addenda")  # so that tasks are not registered in the same order here
    here.import_bundle(one)
    here.export(active, three)
    assert one.read_bytes() == two.read_bytes() == three.read_bytes()


def test_logits_are_the_same_bits_on_arrival(tiny, database, elsewhere, tmp_path):
    with Registry.open(elsewhere.new()) as there, Registry.open(database.new()) as here:
        there.add_backbone(tiny.record())
        known: dict[str, Any] = {}
        for name, parents, options in (("root", (), {}), ("child", ("root",), {}), ("lora", (), {"rank": 3})):
            task = random_task(tiny, name, parents=tuple(known[p] for p in parents), seed=len(known), **options)
            known[name] = there.register(task, golden(tiny, task))
        before = CombinedModel(tiny, there.load(tiny))(images())
        there.export(["child", "lora"], tmp_path / "all.addenda")
        here.import_bundle(tmp_path / "all.addenda")
        after = CombinedModel(tiny, here.load(tiny))(images())
        assert {name: bits(logits) for name, logits in after.items()} == {n: bits(x) for n, x in before.items()}


# -- existing tasks ----------------------------------------------------------------------------------------------------


def test_importing_twice_adds_nothing(here, sent):
    here.import_bundle(sent)
    with unchanged(here):
        again = here.import_bundle(sent)
    assert states(again) == dict.fromkeys(FULL, "there already")
    assert {each.generation for each in again} == {None}


def test_a_dry_run_returns_what_would_be_done_and_changes_no_row(here, sent):
    with unchanged(here):
        planned = here.import_bundle(sent, dry_run=True)
    assert here.import_bundle(sent) == planned


def test_content_that_exists_under_another_version_is_not_imported_again(here, home, tmp_path):
    here.add_backbone(BACKBONE)
    add(here, a_task("digits", 9))
    add(here, a_task("digits", 3), new_version=True)
    add(here, a_task("digits", 8), new_version=True)
    home.export(["digits:2"], tmp_path / "two.addenda")
    with unchanged(here):
        [received] = here.import_bundle(tmp_path / "two.addenda")
    assert (received.ref, received.origin, received.state) == ("digits:2", "digits:2", "there already")
    [renamed] = here.import_bundle(tmp_path / "two.addenda", renames={"digits": "numerals"})
    assert (renamed.ref, renamed.origin, renamed.state) == ("numerals:2", "digits:2", "added")


def test_an_existing_task_gains_missing_golden_probes_and_tags(here, home, tmp_path):
    home.export(["digits:1"], tmp_path / "one.addenda")
    here.add_backbone(BACKBONE)
    add(here, a_task("digits", 2, parents=(add(here, a_task("strokes", 1)),)))
    first = here.record("digits")
    received = {each.ref: each for each in here.import_bundle(tmp_path / "one.addenda")}
    assert (received["digits:1"].state, received["strokes:1"].detail) == ("there already", "")
    assert received["digits:1"].detail == "golden probe added (numerics zzzzzzzzzzzz…); tagged 'site=oslo'"
    assert {probe.numerics_fingerprint[0] for probe in here.goldens("digits")} == {"n", "z"}
    assert here.record("digits") == replace(first, tags=("site=oslo",))
    assert [event.kind for event in here.events()] == ["backbone", "registered", "registered", "golden", "tagged"]
    assert verify_ledger(here.location) == 5


def test_golden_probes_that_differ_under_the_same_numerics_are_reported(here, home, tmp_path):
    home.export(["strokes"], tmp_path / "one.addenda")
    here.add_backbone(BACKBONE)
    task, other = a_task("strokes", 1), torch.ones(4, 3)
    here.register(task, replace(probe(task), logits=other, digest=digest(other.numpy().tobytes())))
    with unchanged(here):
        [received] = here.import_bundle(tmp_path / "one.addenda")
    assert received.detail == "golden probes DIFFER under the same numerics (nnnnnnnnnnnn…); see: addenda verify"


def test_an_older_version_that_arrives_later_is_not_the_newest(here, home, tmp_path):
    for version in (2, 1):
        home.export([f"digits:{version}"], tmp_path / f"{version}.addenda")
        here.import_bundle(tmp_path / f"{version}.addenda")
    loaded = here.load(HERE)
    assert here.get("digits").version == 2
    assert [task.ref for task in loaded] == ["digits:2", "strokes:1"]


# -- names -------------------------------------------------------------------------------------------------------------


def test_all_conflicts_are_named_and_nothing_is_imported(here, sent):
    here.add_backbone(BACKBONE)
    for seed, name in ((20, "strokes"), (21, "digits"), (22, "bare")):
        add(here, a_task(name, seed))
    here.retire("bare:1")
    with refused(here, RegistryError, match=r"Nothing was changed.*--rename OLD=NEW") as refusal:
        here.import_bundle(sent)
    assert [f"'{name}:1'" in str(refusal.value) for name in ("bare", "digits", "strokes")] == [True] * 3
    assert "tip" not in str(refusal.value)
    assert "digits:2" not in str(refusal.value)


def test_renamed_tasks_arrive_with_their_children(here, home, sent):
    here.add_backbone(BACKBONE)
    mine = add(here, a_task("strokes", 20))
    received = here.import_bundle(sent, renames={"strokes": "lines", "tip": "top"})
    assert {each.origin: each.ref for each in received if each.ref != each.origin} == {
        "strokes:1": "lines:1",
        "tip:1": "top:1",
    }
    assert here.get("top").extends == ("digits:1", "lines:1")
    assert here.get("top").sha256 == home.get("tip").sha256
    assert here.get("strokes").sha256 == mine.sha256
    assert verify_ledger(here.location) == here.generation


@pytest.mark.parametrize(
    ("renames", "message"),
    [
        ({"cats": "dogs"}, "There is no task 'cats' to rename. Tasks: adapted, bare, digits, old, strokes, tip"),
        ({"tip": "Tip"}, "'Tip' is not a valid name"),
        ({"tip": "../tip"}, "'../tip' is not a valid name"),
        (
            {"tip": "digits"},
            r"'digits:1' \(.*… is not .*…\)\. Nothing was changed; import the tasks under another name",
        ),
    ],
)
def test_impossible_renames_are_refused(here, sent, renames, message):
    with refused(here.location, RegistryError, match=message):
        here.import_bundle(sent, renames)


def test_two_names_of_one_content_can_become_one(here, home, tmp_path):
    home.register(a_task("lines", 1), probe(a_task("lines", 1)))
    home.export(["lines", "strokes"], tmp_path / "two.addenda")
    received = here.import_bundle(tmp_path / "two.addenda", renames={"lines": "strokes"})
    assert [(each.origin, each.ref, each.state) for each in received] == [
        ("lines:1", "strokes:1", "added"),
        ("strokes:1", "strokes:1", "there already"),
    ]


# -- files -------------------------------------------------------------------------------------------------------------


def test_an_export_overwrites_nothing(home, tmp_path):
    path = tmp_path / "dear"
    path.write_text("dear")
    with pytest.raises(RegistryError, match="dear' exists; choose another name"):
        home.export(["tip"], path)
    assert path.read_text() == "dear"


def test_an_export_that_fails_leaves_no_file(home, tmp_path):
    with pytest.raises(UnknownTaskError, match="'cats'"):
        home.export(["tip", "cats"], tmp_path / "a.addenda")
    with pytest.raises(RegistryError, match=r"was not written: No such file or directory"):
        home.export(["tip"], tmp_path / "no" / "a.addenda")
    sql = "UPDATE artifact SET data = :data WHERE sha256 = (SELECT artifact FROM task WHERE name = 'tip')"
    tamper(home.location, "artifact", sql, data=b"1234")
    with pytest.raises(
        IntegrityError, match=r"Task 'tip:1' cannot be exported: its artifact's stored bytes are missing"
    ):
        home.export(["tip"], tmp_path / "a.addenda")
    assert list(tmp_path.glob("*.addenda*")) == []


def test_an_export_to_a_full_disk_leaves_no_file(registry, tmp_path):
    registry.add_backbone(BACKBONE)
    add(registry, a_large_task())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(RegistryError, match=r"was not written: File too large"):
            registry.export(["large"], tmp_path / "a.addenda")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.glob("*.addenda*")) == []
    assert registry.export(["large"], tmp_path / "a.addenda") == ["large:1"]


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("another_interpreter")
def test_an_import_killed_at_any_statement_leaves_nothing_and_a_retry_is_whole(database, sent):
    with Registry.open(location := database.new()) as here:
        assert killed_at_each_statement(imports, location, str(sent)) > 100
        assert verify_ledger(location) == here.generation
        with Registry.open(sent.with_name("tasks.db")) as there:
            assert_same(here, there, FULL)
        assert states(here.import_bundle(sent)) == dict.fromkeys(FULL, "there already")


@pytest.mark.usefixtures("another_interpreter")
@pytest.mark.parametrize("when", ["unwritten", "unnamed"])
def test_a_killed_export_leaves_no_bundle(tmp_path, when):
    with Registry.open(tmp_path / "tasks.db") as registry:
        registry.add_backbone(BACKBONE)
        add(registry, a_large_task())
        path = tmp_path / "a.addenda"
        assert exit_code(export_and_die, registry.location, str(path), when) == KILLED
        assert not path.exists()
        assert registry.export(["large"], path) == ["large:1"]
