"""The registry commands: queries, changes, transfers, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from sqlalchemy.engine import make_url

from addenda import FrozenBackbone, Registry, load_backbone
from addenda.combined import golden
from tests.support.commands import Run
from tests.support.databases import Database, Postgres, address, tamper
from tests.support.registries import BACKBONE, a_task, keep, probe
from tests.support.tasks import random_task


@pytest.fixture
def location(full_book: Registry, monkeypatch: pytest.MonkeyPatch, run: Run) -> str:
    """The URL of a registry with a row in every table, set as the default of the commands."""
    monkeypatch.setenv("ADDENDA_REGISTRY", address(full_book))
    return address(full_book)


def test_tasks_are_filtered(run: Run, location: str) -> None:
    listed = run("tasks", "list").out
    assert "2 tasks in" in listed
    assert "@production #shop extends strokes:1" in listed
    assert [record["ref"] for record in json.loads(run("tasks", "list", "--json").out)] == ["strokes:1", "digits:1"]
    assert "old:1 (retired)" in run("tasks", "list", "--retired").out
    for query in (("digits",), ("d*s",), ("--tag", "shop"), ("--min-score", "0.9"), ("--extends", "strokes")):
        records = json.loads(run("tasks", "list", *query, "--json").out)
        assert [record["name"] for record in records] == ["digits"], query
    assert run("tasks", "list", "--min-score", "0.91").out.startswith("0 tasks in")
    assert run("tasks", "list", "--until", "2020-01-01").out.startswith("0 tasks in")
    assert "'soon' is not an ISO 8601 time" in run("tasks", "list", "--since", "soon").err


def test_a_long_list_is_read_in_pages(run: Run, location: str) -> None:
    first = run("tasks", "list", "--limit", "1").out
    assert "digits:1" in first
    assert "Older tasks: --before digits:1" in first
    second = run("tasks", "list", "--limit", "1", "--before", "digits:1").out
    assert "strokes:1" in second
    assert "Older tasks" not in second


def test_an_alias_moves_only_from_where_it_is_expected(run: Run, location: str) -> None:
    with Registry.open(location) as book:
        keep(book, a_task("digits", 7), new_version=True)
    refused = run("tasks", "alias", "digits:2", "production", "--expect", "2")
    assert refused.code == 2
    assert "'digits@production' points at 'digits:1', not at 'digits:2' as expected" in refused.err
    assert (
        run("tasks", "alias", "digits:2", "production", "--expect", "1").out
        == "digits@production points at digits:2.\n"
    )
    event = json.loads(run("db", "log", "digits", "--limit", "1", "--json").out)[0]
    assert event["details"] == {"before": 1, "version": 2}
    assert run("tasks", "alias", "digits", "production", "--remove").out == "Removed digits@production.\n"
    assert "There is no alias 'digits@production'" in run("tasks", "alias", "digits", "production", "--remove").err


def test_tags_and_notes_are_in_the_log(run: Run, location: str) -> None:
    assert run("tasks", "tag", "digits", "team=a", "b").out == "Tags of digits:1: b, shop, team=a.\n"
    assert run("tasks", "tag", "digits", "shop", "b", "--remove").out == "Tags of digits:1: team=a.\n"
    assert "does not have the tag 'b'" in run("tasks", "tag", "digits", "b", "--remove").err
    assert "is not a valid tag" in run("tasks", "tag", "digits", "no good").err
    assert "Added a note to digits:1" in run("tasks", "note", "digits", "for the shop").out
    log = run("db", "log", "digits").out
    assert "for the shop" in log
    assert "team=a" in log
    events = json.loads(run("db", "log", "--json", "--limit", "3").out)
    assert [event["kind"] for event in events] == ["untagged", "untagged", "noted"]


def test_a_parent_is_retired_with_all_its_children_or_not_at_all(run: Run, location: str) -> None:
    assert "active tasks extend it (digits:1)" in run("tasks", "retire", "strokes").err
    pointed = run("tasks", "retire", "strokes", "--with", "digits").err
    assert "'digits@production' points at 'digits:1', which would be retired" in pointed
    assert "addenda tasks alias digits production --remove" in pointed
    run("tasks", "alias", "digits", "production", "--remove")
    retired = run("tasks", "retire", "strokes", "--with", "digits", "--reason", "done")
    assert retired.out == "Retired: digits:1, strokes:1. They stay in the registry.\n"


def test_a_history_explains_changes_and_an_unexplained_change_fails(run: Run, location: str) -> None:
    with Registry.open(location) as book:
        evaluation = ("d" * 64, "n" * 64, {"accuracy": 0.75})
        book.add_evaluation("digits", *evaluation, "l" * 64)
        unchanged = run("tasks", "history", "digits")
        assert unchanged.code == 0
        assert "equal: the same metrics; logits bitwise identical" in unchanged.out
        book.add_evaluation("digits", *evaluation, "x" * 64)
    changed = run("tasks", "history", "digits")
    assert changed.code == 1
    assert "unexplained: other logits under the same numerics" in changed.out
    assert [entry["verdict"] for entry in json.loads(run("tasks", "history", "digits", "--json").out)] == [
        "first", "equal", "unexplained",
    ]  # fmt: skip


def test_two_versions_are_compared(run: Run, location: str) -> None:
    with Registry.open(location) as book:
        metrics = {"test": {"accuracy": 0.8}, "candidates": [{"num_memory_tokens": 1}, {"num_memory_tokens": 5}]}
        keep(book, a_task("digits", 7, metrics=metrics), new_version=True)
    table = run("tasks", "compare", "digits:1", "digits:2").out
    assert "0.9" in table
    assert "0.8" in table
    assert "2 (all: --json)" in table
    differences = json.loads(run("tasks", "compare", "digits:1", "digits:2", "--json").out)
    assert {"section": "metrics", "key": "test.accuracy", "one": 0.9, "other": 0.8} in differences


def test_a_lineage_is_a_tree(run: Run, location: str) -> None:
    assert run("tasks", "lineage", "digits").out == (
        "digits:1 extends\n└── strokes:1\ndigits:1 is extended by nothing\n"
    )
    assert json.loads(run("tasks", "lineage", "strokes", "--json").out)["extended_by"]["kin"][0]["ref"] == "digits:1"


def test_a_bundle_is_exported_and_imported(run: Run, location: str, elsewhere: Database, tmp_path: Path) -> None:
    bundle, target = tmp_path / "two.addenda", elsewhere.new()
    assert f"{bundle}: strokes:1, digits:1; " in run("tasks", "export", "digits", "-o", bundle).out
    for command in (("tasks", "import", bundle), ("db", "merge", location)):
        dry = run(*command, "--dry-run", "--registry", target)
        assert dry.code == 2
        assert "no registry" in dry.err
        assert run("tasks", "list", "--registry", target).code == 2, "a dry run created a registry"
    with Registry.open(target):
        pass
    dry = run("tasks", "import", bundle, "--dry-run", "--registry", target)
    assert "2 tasks would be added, nothing was changed" in dry.out
    assert "0 tasks in" in run("tasks", "list", "--registry", target).out
    assert "2 tasks were added" in run("tasks", "import", bundle, "--registry", target).out
    assert "0 tasks were added" in run("tasks", "import", bundle, "--registry", target).out
    renamed = run("tasks", "import", bundle, "--rename", "digits=numbers", "--json", "--registry", target)
    assert [row["ref"] for row in json.loads(renamed.out)] == ["strokes:1", "numbers:1"]
    assert "--rename must be OLD=NEW, not 'digits='" in run("tasks", "import", bundle, "--rename", "digits=").err


def test_a_merge_lists_every_conflict_and_a_new_name_resolves_it(run: Run, location: str, elsewhere: Database) -> None:
    other = elsewhere.new()
    with Registry.open(other) as source:
        source.add_backbone(BACKBONE)
        for name in ("digits", "strokes"):
            keep(source, a_task(name, 11))
    conflict = run("db", "merge", other)
    assert conflict.code == 2
    assert "digits:1" in conflict.err
    assert "strokes:1" in conflict.err
    assert "2 tasks were added" in run("db", "merge", other, "--rename", "digits=d2", "--rename", "strokes=s2").out


def test_a_merge_from_a_missing_registry_creates_none(run: Run, tmp_path: Path) -> None:
    refused = run("db", "merge", tmp_path / "absent.db", "--registry", tmp_path / "new.db")
    assert refused.code == 2
    assert f"There is no registry at '{tmp_path / 'absent.db'}'; check the path." in refused.err
    assert not (tmp_path / "new.db").exists()


def test_a_merged_alias_is_not_counted_as_a_task(run: Run, location: str, elsewhere: Database) -> None:
    merged = run("db", "merge", location, "--registry", elsewhere.new())
    assert "3 tasks were added" in merged.out
    assert "digits@production" in merged.out


def test_a_password_in_a_url_is_not_printed(run: Run, tmp_path: Path, postgres: str) -> None:
    server = Postgres(postgres)
    url = make_url(server.new()).set(password="secret").render_as_string(hide_password=False)
    with Registry.open(url) as book:
        book.add_backbone(load_backbone("glyphs", device="cpu").record())
    refused = run("predict", *small_image(tmp_path), "--registry", url)
    server.close()
    assert "holds no active task" in refused.err
    assert "secret" not in refused.err + refused.out


def small_image(folder: Path) -> list[Path]:
    Image.new("RGB", (32, 32)).save(folder / "one.png")
    return [folder / "one.png"]


def test_a_backup_restores_into_an_empty_registry_only(
    run: Run, location: str, elsewhere: Database, tmp_path: Path
) -> None:
    backup, target = run("db", "backup", tmp_path / "copy.db"), elsewhere.new()
    digest = backup.out.split("digest ")[1].strip(" .\n")
    assert len(digest) == 64
    assert f"digest {digest}" in run("db", "restore", tmp_path / "copy.db", "--registry", target).out
    assert (
        "is not empty; restore into an empty one"
        in run("db", "restore", tmp_path / "copy.db", "--registry", target).err
    )
    assert "a backup does not overwrite" in run("db", "backup", tmp_path / "copy.db").err


def test_a_schema_is_checked(run: Run, location: str) -> None:
    assert "schema 0003, no faults." in run("db", "check").out
    assert "schema 0003, generation" in run("db", "upgrade").out
    tamper(location, "task", "UPDATE task SET created_by = 'nobody' WHERE name = 'digits'")
    altered = run("db", "check")
    assert altered.code == 1
    assert "trigger: task_no_" in altered.err


@pytest.mark.slow
def test_a_deep_check_detects_altered_and_removed_history(run: Run, tmp_path: Path, glyphs: FrozenBackbone) -> None:
    location = str(tmp_path / "tasks.db")
    with Registry.open(location) as book:
        book.add_backbone(glyphs.record())
        for seed, name in enumerate(("ones", "twos")):
            task = random_task(glyphs, name, seed=seed)
            book.register(task, golden(glyphs, task))
    intact = run("verify", "--deep")
    assert intact.code == 0, intact.err
    assert "2 versions and 3 events hashed: none was altered." in intact.out
    head = intact.out.split("digest:")[1].strip()
    assert run("verify", "--head", head).code == 0
    for wrong in ("0" * 64, ""):
        assert "has no event with digest" in run("verify", "--head", wrong).out
    tamper(location, "task", "UPDATE task SET created_by = 'nobody' WHERE name = 'twos'")
    altered = run("verify", "--deep")
    assert altered.code == 1
    assert "twos:1" in altered.out.partition("Integrity findings")[2]
    assert "ones:1" not in altered.out.partition("Integrity findings")[2]
    assert "Failed: the registry." in altered.err


@pytest.mark.parametrize("damage", ["UPDATE task SET metrics = '{damaged'", "DELETE FROM backbone"])
def test_a_deep_check_reports_damage_that_keeps_the_rest_from_being_read(
    run: Run, tmp_path: Path, glyphs: FrozenBackbone, damage: str
) -> None:
    with Registry.open(tmp_path / "tasks.db") as book:
        book.add_backbone(glyphs.record())
        task = random_task(glyphs, "ones")
        book.register(task, golden(glyphs, task))
    tamper(str(tmp_path / "tasks.db"), damage.split()[1 if "UPDATE" in damage else 2], damage)
    result = run("verify", "--deep")
    assert result.code == 1
    assert "Integrity findings" in result.out
    assert "Failed: golden probes, the registry." in result.err
    assert run("verify", "--deep", "nosuch").code == 2


def test_a_version_is_no_name_where_names_are_asked_for(run: Run, location: str) -> None:
    for command in (("tasks", "history", "digits:1"), ("db", "log", "digits:1")):
        result = run(*command)
        assert result.code == 2
        assert "a name has no ':', '@' or '*'" in result.err


def test_an_evaluation_without_counts_is_shown(run: Run, location: str, full_book: Registry) -> None:
    full_book.add_evaluation("digits", "d" * 64, "n" * 64, {"accuracy": 0.75}, "2:00")
    result = run("tasks", "show", "digits")
    assert result.code == 0, result.err
    assert "75.0" in result.out


def test_several_tags_are_added_and_removed_or_none_is(run: Run, location: str) -> None:
    assert run("tasks", "tag", "digits", "good", "bad tag").code == 2
    assert "good" not in run("tasks", "tag", "digits", "fine").out
    assert run("tasks", "tag", "digits", "fine", "absent", "--remove").code == 2
    assert "fine" in run("tasks", "tag", "digits", "more").out


def test_what_cannot_be_meant_is_refused_and_creates_nothing(run: Run, tmp_path: Path) -> None:
    assert run("tasks", "import", tmp_path / "nosuch.addenda").code == 2
    assert not (tmp_path / "tasks.db").exists()
    for command, message in (
        (("tasks", "list", "--registry", "~nosuchuser/a.db"), "there is no user with this home folder"),
        (("tasks", "import", tmp_path / "nosuch.addenda", "--registry", tmp_path / "none.db"), "No such file"),
    ):
        result = run(*command)
        assert result.code == 2
        assert message in result.err


def test_a_name_is_given_one_new_name(run: Run, location: str, elsewhere: Database) -> None:
    with Registry.open(elsewhere.new()) as other:
        result = run("db", "merge", address(other), "--rename", "digits=x", "--rename", "digits=y")
    assert result.code == 2
    assert "gives 'digits' two new names" in result.err


@pytest.mark.parametrize("time", ["0001-01-01T00:00+05:00", "9999-12-31T23:59:59-23:00"])
def test_a_time_outside_the_calendar_is_refused(run: Run, location: str, time: str) -> None:
    result = run("tasks", "list", "--since", time)
    assert result.code == 2
    assert "is not an ISO 8601 time" in result.err


def test_a_golden_probe_of_other_numerics_is_logged(run: Run, location: str) -> None:
    with Registry.open(location) as book:
        book.add_golden("strokes", probe(a_task("strokes", 1), "q" * 64))
    assert "numerics qqqqqqqqqqqq…" in run("db", "log", "strokes").out
