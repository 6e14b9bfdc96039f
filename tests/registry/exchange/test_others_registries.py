"""Registries of version 0.1, untrusted registries, and permissions and leftovers of copies."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from addenda.combined import CombinedModel, numerics, numerics_fingerprint, recorded_backbone, verify
from addenda.exceptions import RegistryError
from addenda.exporting.export import export_model
from addenda.registry import Registry, Task, restore
from addenda.registry.exchange.backup import remains
from tests.support.commands import Run
from tests.support.models import bits
from tests.support.old_registries import Rows, as_it_was_told, make_old
from tests.support.places import DATA
from tests.support.registries import BACKBONE, a_task, keep
from tests.support.travel import fill

OF_0_1 = DATA / "registry-0.1.db"
"""Written by version 0.1 on the glyphs, on one thread: tasks with memory, without memory, extending two others, with
adapters of rank 3, and head-only in two versions, one of them retired; single- and multi-label; with statistics, an
alias, a tag and a note."""
FIVE = DATA / "five-tasks.db"
"""Learned from the digits on one thread by the code of commit 324dbee: with token and memory, extending another,
head-only, with adapters of rank 4, and multi-label."""


@pytest.fixture
def old(tmp_path: Path) -> Registry:
    with Registry.open(shutil.copy(OF_0_1, tmp_path / "old.db"), create=False) as registry:
        yield registry


def mode(path: str | Path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


# --- of earlier code ------------------------------------------------------------------------------------------------


def test_tasks_of_version_0_1_verify_bit_for_bit(old: Registry) -> None:
    """Bitwise on the machine that wrote it; elsewhere within the tolerance, with other numerics reported."""
    backbone = recorded_backbone(old, None, "cpu")
    tasks = [old.get(record.ref) for record in old.tasks()]
    assert [task.ref for task in tasks] == ["zero-one:1", "plain:1", "child:1", "adapted:1", "head:2"]
    assert {task.adapter_rank for task in tasks} == {0, 3}
    assert old.get("child").extends == ("zero-one:1", "plain:1")
    verdicts = verify(backbone, [(task, old.goldens(task.ref)) for task in tasks])
    (recorded,) = {probe.numerics_fingerprint for task in tasks for probe in old.goldens(task.ref)}
    same_numerics = recorded == numerics_fingerprint(numerics(backbone))
    assert [verdict.ok for verdict in verdicts] == [True] * 5
    assert [verdict.same_numerics for verdict in verdicts] == [same_numerics] * 5
    if same_numerics:
        assert [verdict.identical for verdict in verdicts] == [True] * 5
    assert old.check_integrity().ok
    assert old.get("head:1").sha256 != old.get("head:2").sha256


def test_five_tasks_of_earlier_code_verify_bit_for_bit(tmp_path: Path) -> None:
    """Bitwise on a machine of the same kind, even if only the digest of the arithmetic's probe differs."""
    with Registry.open(shutil.copy(FIVE, tmp_path / "five.db"), create=False) as registry:
        backbone = recorded_backbone(registry, None, "cpu")
        recorded = [(registry.get(record.ref), registry.goldens(record.ref)) for record in registry.tasks()]
        assert registry.check_integrity().ok
    verdicts, current = verify(backbone, recorded), numerics(backbone)
    assert [verdict.task for verdict in verdicts] == ["ones:1", "fours:1", "sevens:1", "adapted:1", "traits:1"]
    assert [verdict.ok for verdict in verdicts] == [True] * 5
    ((probe,), *_) = (probes for _, probes in recorded)
    if dict(probe.numerics) | {"probe": None} == current | {"probe": None}:
        assert [(verdict.same_numerics, verdict.identical) for verdict in verdicts] == [(True, True)] * 5


@pytest.mark.slow
def test_tasks_of_version_0_1_predict_and_are_exported(old: Registry, tmp_path: Path) -> None:
    backbone = recorded_backbone(old, None, "cpu")
    pictures = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = CombinedModel(backbone, old.load(backbone))(pictures)
    old.export([record.ref for record in old.tasks()], tmp_path / "all.addenda")
    with Registry.open(tmp_path / "new.db") as new:
        new.import_bundle(tmp_path / "all.addenda")
        logits_of = CombinedModel(backbone, new.load(backbone))(pictures)
        assert {name: bits(logits) for name, logits in logits_of.items()} == {
            name: bits(logits) for name, logits in expected.items()
        }
        stored = [{record.ref: record.sha256 for record in registry.tasks()} for registry in (new, old)]
        assert stored[0] == stored[1]


def test_a_stored_task_keeps_its_sha256_whatever_safetensors_would_write_now(
    registered: Callable[..., Task], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = registered("task", rank=2).ref
    stored = registry.record(ref).sha256
    monkeypatch.setattr("addenda.registry.store.artifact.save", lambda tensors, metadata: b"another format altogether")
    task = registry.get(ref)
    assert task.sha256 == stored
    assert registry.register(task, registry.goldens(ref)[0]).ref == ref


# --- untrusted registries ---------------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A full registry, closed, in a folder without other files."""
    (tmp_path / "theirs").mkdir()
    return Path(fill(str(tmp_path / "theirs" / "tasks.db")))


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_merge_touches_no_file_of_the_other(theirs: Path, run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    Registry.open(tmp_path / "tasks.db").close()
    before = everything(theirs.parent)
    result = run("db", "merge", theirs, *options)
    assert result.code == 0, result.err
    assert "digits:1" in result.out
    assert everything(theirs.parent) == before


def test_a_merge_reads_what_a_writer_has_not_yet_checkpointed(theirs: Path, tmp_path: Path) -> None:
    with Registry.open(theirs) as writer, Registry.open(tmp_path / "tasks.db") as here:
        keep(writer, a_task("fresh", 8))
        with Registry.open(theirs, read_only=True) as other:
            assert "fresh:1" in {received.ref for received in here.merge(other)}


def test_a_registry_is_read_while_writers_come_and_go(theirs: Path) -> None:
    with Registry.open(theirs, read_only=True) as reader:
        for number in range(8, 14):
            with Registry.open(theirs) as writer:
                keep(writer, a_task(f"fresh-{number}", number))
            assert reader.get(f"fresh-{number}").version == 1
    assert [path.name for path in theirs.parent.iterdir()] == ["tasks.db"]


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_an_older_registry_is_refused_and_not_upgraded(
    theirs: Path, run: Run, tmp_path: Path, options: tuple[str, ...]
) -> None:
    present: Rows = as_it_was_told(str(theirs))
    (tmp_path / "old").mkdir()
    make_old(str(tmp_path / "old" / "tasks.db"), "0002", present)
    Registry.open(tmp_path / "tasks.db").close()
    before = everything(tmp_path / "old")
    result = run("db", "merge", tmp_path / "old" / "tasks.db", *options)
    assert result.code == 2
    assert "has schema '0002', this version of Addenda reads" in result.err
    assert "Copy it, and upgrade the copy with `addenda db upgrade`." in result.err
    assert everything(tmp_path / "old") == before


FOREIGN = {
    "view": "CREATE VIEW task_list AS SELECT name FROM task",
    "trigger": "CREATE TRIGGER task_spy AFTER INSERT ON event BEGIN DELETE FROM tag; END",
    "own trigger": "DROP TRIGGER task_no_update; CREATE TRIGGER other AFTER INSERT ON tag BEGIN DELETE FROM tag; END",
    "virtual": "CREATE VIRTUAL TABLE words USING fts5(word)",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_schema_with_foreign_views_or_triggers_is_not_read(theirs: Path, registry: Registry, kind: str) -> None:
    with sqlite3.connect(theirs) as connection:
        connection.executescript(FOREIGN[kind])
    connection.close()
    with pytest.raises(RegistryError, match="that is not part of a registry; it is not read"):
        Registry.open(theirs, read_only=True)


def test_a_view_in_the_place_of_a_table_runs_nothing(theirs: Path) -> None:
    with sqlite3.connect(theirs) as connection:
        connection.executescript("ALTER TABLE tag RENAME TO tag_of_old; CREATE VIEW tag AS SELECT load_extension('x');")
    connection.close()
    with pytest.raises(RegistryError, match="contains 'tag', a view, virtual table or trigger"):
        Registry.open(theirs, read_only=True)


def test_a_read_only_registry_refuses_every_change(theirs: Path) -> None:
    with Registry.open(theirs, read_only=True) as registry:
        assert registry.get("digits:1").ref == "digits:1"
        for change in (
            lambda: registry.tag("digits:1", "mine"),
            lambda: registry.add_backbone({**BACKBONE, "fingerprint": "other"}),
            lambda: registry.retire("old:1"),
        ):
            with pytest.raises(RegistryError):
                change()


def test_another_programs_database_is_left_as_it_is(tmp_path: Path) -> None:
    """Opening a file must not turn its journal into a write-ahead log."""
    (tmp_path / "app").mkdir()
    path = tmp_path / "app" / "bookmarks.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
        connection.execute("INSERT INTO bookmarks VALUES ('https://example.org')")
    connection.close()
    before = everything(path.parent)
    for open_it in (
        lambda: Registry.open(path),
        lambda: Registry.open(path, read_only=True),
        lambda: restore(path, tmp_path / "x.db"),
    ):
        with pytest.raises(RegistryError, match=r"another program's database|There is no registry at"):
            open_it()
        assert everything(path.parent) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_registry_on_a_read_only_medium_is_read(theirs: Path) -> None:
    theirs.parent.chmod(0o500)
    try:
        with Registry.open(theirs, read_only=True) as registry:
            assert registry.get("digits:1")
    finally:
        theirs.parent.chmod(0o700)


# --- permissions of copies --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o644])
def test_copies_have_the_registrys_permissions(old: Registry, tmp_path: Path, permissions: int) -> None:
    Path(old.location).chmod(permissions)
    old.backup(tmp_path / "safe.db")
    old.export(["zero-one"], tmp_path / "a.addenda")
    backbone = recorded_backbone(old, None, "cpu")
    export_model(old, backbone, [old.get("zero-one")], tmp_path / "a.pt2")
    restore(tmp_path / "safe.db", tmp_path / "restored.db")
    for name in ("safe.db", "a.addenda", "a.pt2", "restored.db"):
        assert mode(tmp_path / name) == permissions, name


def test_a_backup_replaces_no_file(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "safe.db"
    target.symlink_to(tmp_path / "nowhere")
    with Registry.open(theirs) as registry:
        with pytest.raises(RegistryError, match="exists; a backup does not overwrite"):
            registry.backup(target)
        assert target.is_symlink()
        late = tmp_path / "late.db"
        link = os.link

        def create_it_first(*paths: Path) -> None:
            late.write_text("theirs")
            link(*paths)

        monkeypatch.setattr("os.link", create_it_first)
        with pytest.raises(RegistryError, match="exists; a backup does not overwrite"):
            registry.backup(late)
    assert late.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".backup")] == []


# --- leftovers of interrupted backups ---------------------------------------------------------------------------------


def test_remains_are_named_by_check_and_removed_by_the_next_backup(
    theirs: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = theirs.parent
    for name in (".backup-mine", ".backup-0123abcd-beef"):
        (folder / name).mkdir()
        (folder / name / "copy.db").write_text("of somebody else")
    with Registry.open(theirs) as registry:
        before = set(folder.glob(".backup-*"))
        with monkeypatch.context() as patch:
            patch.setattr("addenda.registry.exchange.backup.discard", lambda *_: False)
            patch.setattr("addenda.registry.exchange.backup.put", lambda *_, **__: None)
            registry.backup(folder / "unnamed.db")
        (left,) = set(folder.glob(".backup-*")) - before
        assert mode(left) == 0o700
        assert registry.remains() == [left]
    result = run("db", "check", "--registry", theirs)
    assert (result.code, result.err.count(str(left))) == (0, 1)
    assert "A killed backup left" in result.err
    (left / "note.txt").write_text("put there by a person")
    with Registry.open(theirs) as registry:
        registry.backup(folder / "safe.db")
        assert {path.name for path in left.iterdir()} == {"note.txt", "addenda-backup"}
        (left / "note.txt").unlink()
        registry.backup(folder / "safer.db")
        assert not left.exists()
        assert remains(registry._engine, tmp_path) == []
    assert {path.name for path in folder.glob(".backup-*")} >= {".backup-mine", ".backup-0123abcd-beef"}
    assert (folder / ".backup-mine" / "copy.db").read_text() == "of somebody else"


@pytest.mark.slow
def test_backups_that_run_at_once_do_not_disturb_each_other(theirs: Path) -> None:
    def back_up(number: int) -> None:
        with Registry.open(theirs) as registry:
            for turn in range(4):
                registry.backup(theirs.parent / f"{number}-{turn}.db")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(back_up, range(4))) == [None] * 4
    assert len(list(theirs.parent.glob("*-*.db"))) == 16
    assert list(theirs.parent.glob(".backup-*")) == []


def test_the_folder_of_a_running_backup_is_not_reported(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Path]] = []
    with Registry.open(theirs) as registry:
        monkeypatch.setattr(
            "addenda.registry.exchange.backup.put",
            lambda staged, target, replace: (seen.append(registry.remains()), staged.rename(target)),
        )
        registry.backup(theirs.parent / "safe.db")
    assert seen == [[]]
