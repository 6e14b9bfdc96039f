"""Files are written completely or not at all, and Addenda deletes only files that it created."""

from __future__ import annotations

import logging
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from addenda import files
from addenda.exceptions import DataError
from addenda.files import Hold, claim, discard, is_claimed, output_folder, permissions, written

PACKAGE = Path(files.__file__).parent


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "part"
    with written(path) as unfinished:
        unfinished.write_text("one")
        assert not path.exists()
    for error in (KeyboardInterrupt, OSError, RuntimeError):
        with suppress(error), written(path) as unfinished:
            unfinished.write_text("half of another")
            raise error
    assert contents(tmp_path) == {"part": "one"}
    with written(path) as unfinished:
        unfinished.write_text("two")
    assert contents(tmp_path) == {"part": "two"}


def test_a_file_that_comes_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.addenda"
    for _ in range(2):
        with pytest.raises(FileExistsError):
            write_late(path)
        assert contents(tmp_path) == {"a.addenda": "somebody else's"}
        monkeypatch.setattr("os.link", no_links)  # as on a file system without hard links
    path.unlink()
    with written(path, replace=False) as unfinished:
        unfinished.write_text("ours")
    assert contents(tmp_path) == {"a.addenda": "ours"}


def write_late(path: Path) -> None:
    """Writes a file while another process creates one with the same name."""
    with written(path, replace=False) as unfinished:
        unfinished.write_text("ours")
        path.write_text("somebody else's")


def no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("asked", [0o600, 0o640, 0o666])
def test_a_file_is_never_more_open_than_it_will_be(tmp_path: Path, asked: int) -> None:
    before = os.umask(0o022)
    try:
        with written(tmp_path / "a", mode=asked) as unfinished:
            unfinished.write_text("secret")
            assert mode(unfinished) == asked & ~0o022
    finally:
        os.umask(before)
    assert permissions(tmp_path / "a") == asked & ~0o022


def test_a_long_name_is_written_too(tmp_path: Path) -> None:
    for name in ("x" * 250, "\u5b57" * 80):
        path = tmp_path / name
        with written(path) as unfinished:
            unfinished.write_text("long")
        assert contents(tmp_path) == {name: "long"}
        path.unlink()


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    with written(path) as unfinished:
        unfinished.write_text("new")
    assert mode(path) == 0o600


def test_only_what_matches_is_discarded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = tmp_path / "run"
    (ours / "0011").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_text("far away")
    for path in (ours / "sweep", ours / "0011" / "sweep", ours / "0011" / f".sweep.{'a' * 16}.unfinished"):
        path.write_text("ours")
    (ours / "0011" / "poem").write_text("somebody's")
    (ours / "0022").symlink_to(tmp_path)
    (ours / "0033").symlink_to(outside)
    with caplog.at_level(logging.WARNING):
        assert not discard(ours, r"sweep|[0-9]{4}")
        assert not discard(ours, r"sweep|[0-9]{4}")
    assert sorted(path.name for path in ours.rglob("*")) == ["0011", "0022", "0033", "poem"]
    assert outside.read_text() == "far away"
    assert caplog.text.count("poem was not created by Addenda and is left alone.") == 1
    (ours / "0011" / "poem").unlink()
    (ours / "0022").unlink()
    (ours / "0033").unlink()
    assert discard(ours, r"sweep|[0-9]{4}")
    assert discard(ours, r"sweep|[0-9]{4}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside"]


def test_a_marker_stays_as_long_as_anything_else_does(tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    claim(folder, "MARKER", "ours")
    for name in ("keys", ".DS_Store"):
        (folder / name).touch()
    assert not discard(folder, "keys", "MARKER")
    assert sorted(path.name for path in folder.iterdir()) == [".DS_Store", "MARKER"]
    claim(folder, "MARKER", "ours")
    (folder / ".DS_Store").unlink()
    assert discard(folder, "keys", "MARKER")
    assert not folder.exists()


def test_a_folder_is_claimed_once_and_known_again(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    for _ in range(2):
        claim(folder, "MARKER", "ours")
        assert is_claimed(folder, "MARKER", "ours")
        assert mode(folder) == 0o700
    assert not is_claimed(folder, "MARKER", "another's")
    (tmp_path / "link").symlink_to(folder)
    assert not is_claimed(tmp_path / "link", "MARKER", "ours")
    with pytest.raises(PermissionError, match="is a link or a file"):
        claim(tmp_path / "link", "MARKER", "ours")
    with pytest.raises(FileExistsError, match="holds files that are not Addenda's"):
        claim(folder, "OTHER", "ours")


def test_a_folder_that_is_held_is_seen_to_be(tmp_path: Path) -> None:
    path = tmp_path / "marker"
    path.touch()
    one, other = Hold(path, shared=True), Hold(path, shared=True)
    for held in (one, other):
        with pytest.raises(BlockingIOError):
            Hold(path, shared=False)
        held.close()
    with Hold(path, shared=False), pytest.raises(BlockingIOError):
        Hold(path, shared=True)


def test_a_report_replaces_no_file_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("the year in numbers")
    with pytest.raises(DataError, match="is not the output folder of a benchmark"):
        output_folder(tmp_path)
    assert contents(tmp_path) == {"report.md": "the year in numbers"}
    output_folder(tmp_path / "new")
    (tmp_path / "new" / "report.md").write_text("ours")
    output_folder(tmp_path / "new")
    with pytest.raises(DataError, match="cannot be used"):
        output_folder(tmp_path / "report.md")


LOOKED_AT = {
    "files.py": "implements `written`",
    "registry/exchange/backup.py": "the marker of its own folder",
    "registry/exchange/bundle.py": "a path from `written`",
    "serving/keys.py": "a path from `written`",
    "exporting/export.py": "a path from `written`",
    "distributed/prediction.py": "a path from `written`; deletes its own unfinished files",
    "learner/store.py": "in its own cache entry",
    "learner/context.py": "a path from `written`",
    "benchmarks/paper/paper_report.py": "in an output_folder",
    "benchmarks/cost.py": "in an output_folder",
    "benchmarks/continual/report.py": "in an output_folder",
    "benchmarks/report/tables.py": "in an output_folder",
    "benchmarks/report/output.py": "a path from `written`; appends results in an output_folder",
    "benchmarks/demo.py": "in a temporary folder",
    "benchmarks/serving/serving_timings.py": "in a temporary folder",
    "serving/routes.py": "a bundle, in the temporary folder of its request",
}
"""Modules that write or delete files, each reviewed: the files are Addenda's own, complete, and no link's target."""

TOUCHES = re.compile(
    r"\.unlink\(|os\.remove\(|\.rmdir\(|write_text\(|write_bytes\(|os\.rename|mkdtemp\(|os\.link\(|"
    r"open\([^)]*[\"'](w|wb|a|x|r\+b|w\+)[\"']"
)


def test_whatever_writes_or_deletes_a_file_was_looked_at() -> None:
    sources = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {name for name, source in sources.items() if TOUCHES.search(source)} == set(LOOKED_AT)
    assert [name for name, source in sources.items() if "rmtree" in source] == []
