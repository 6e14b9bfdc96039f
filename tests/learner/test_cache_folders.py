"""Folders of the activation cache: damaged rows are recomputed, and files of others are never touched."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.exceptions import TrainingError
from addenda.learner import ActivationCache, Augmentation, context
from addenda.learner.activation_cache import NAME
from addenda.learner.context import Checkpoint
from tests.support.activations import ROW_GB, activations, fetched
from tests.support.images import colour_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colour_folder(tmp_path / "colours", per_class=4)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if NAME not in path.parts
    }


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder full of the user's own files, some of which look like cache entries."""
    folder = tmp_path / "everything"
    for name in ("photos/2019", "thesis", "runs/1", "0123456789abcdef", ".lock-me"):
        (folder / name).mkdir(parents=True)
    (folder / "photos" / "2019" / "a.jpg").write_bytes(b"a picture")
    (folder / "thesis" / "meta.json").write_text('{"format": 1}')
    (folder / "runs" / "1" / "sweep.safetensors").write_bytes(b"somebody's own run")
    (folder / "0123456789abcdef" / "keys.npy").write_bytes(b"keys of a house")
    (folder / "notes.unfinished").write_text("a novel")
    (folder / ".lock").write_text("mine")
    return folder


def test_a_folder_full_of_other_things_survives_every_use(
    tiny: FrozenBackbone, folder: Path, shared: Path, tmp_path: Path
) -> None:
    before = tree(shared)
    cache = ActivationCache(shared, budget_gb=15 * ROW_GB)
    with Registry.open(tmp_path / "tasks.db") as registry:
        Learner(tiny, registry, cache).learn(
            "colours", folder, config=LearnConfig(epochs=1, augmentation=Augmentation())
        )
    activations(tiny, colour_folder(tmp_path / "more", per_class=4, seed=9), cache)
    (entry,) = cache.sets()
    (cache.folder / entry.name / "keys.npy").write_bytes(b"")
    activations(tiny, colour_folder(tmp_path / "last", per_class=4, seed=19), cache)
    cache.clear()
    assert cache.sets() == []
    assert tree(shared) == before


def test_files_that_are_no_entry_are_left_alone_and_named_once(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ActivationCache(tmp_path / "cache", budget_gb=15 * ROW_GB)
    activations(tiny, folder, cache)
    (entry,) = cache.sets()
    strangers = [cache.folder / name for name in ("thesis", "fedcba9876543210")]
    for stranger in strangers:
        stranger.mkdir()
        (stranger / "keys.npy").write_bytes(b"somebody's")
    (cache.folder / entry.name / "diary.txt").write_text("within an entry")
    with caplog.at_level(logging.WARNING):
        for seed in (9, 19):
            activations(tiny, colour_folder(tmp_path / str(seed), per_class=4, seed=seed), cache)
        cache.clear()
    assert all((stranger / "keys.npy").read_bytes() == b"somebody's" for stranger in strangers)
    entry_folder = cache.folder / entry.name
    assert {path.name for path in entry_folder.iterdir()} == {"diary.txt", "addenda-entry"}
    assert (entry_folder / "diary.txt").read_text() == "within an entry"
    first = fetched(activations(tiny, folder, ActivationCache(tmp_path / "other")))
    assert torch.equal(first, fetched(activations(tiny, folder, cache)))  # the entry can be created again beside it
    assert (entry_folder / "keys.npy").exists()
    assert (entry_folder / "diary.txt").read_text() == "within an entry"
    for stranger in (*strangers, cache.folder / entry.name / "diary.txt"):
        assert caplog.text.count(f"{stranger} was not created by Addenda and is left alone") == 1


def test_no_link_is_followed(tiny: FrozenBackbone, folder: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "keys.npy").write_bytes(b"mine")
    cache = ActivationCache(tmp_path / "cache")
    activations(tiny, folder, cache)
    (entry,) = cache.sets()
    (cache.folder / "00112233445566aa").symlink_to(thesis)
    features = cache.folder / entry.name / "features.npy"
    features.rename(thesis / "features.npy")
    features.symlink_to(thesis / "features.npy")
    before = tree(thesis)
    cache.clear()
    assert tree(thesis) == before
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / NAME).symlink_to(thesis)
    with pytest.raises(TrainingError, match="is a link or a file, not a folder"):
        activations(tiny, folder, ActivationCache(linked))
    assert tree(thesis) == before


def test_a_folder_of_its_name_that_is_not_its_own_is_refused(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "cache" / NAME
    taken.mkdir(parents=True)
    (taken / "novel.txt").write_text("chapter one")
    with pytest.raises(TrainingError, match="holds files that are not Addenda's"):
        activations(tiny, folder, ActivationCache(tmp_path / "cache"))
    assert [path.name for path in taken.iterdir()] == ["novel.txt"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
def test_a_folder_that_others_may_write_to_is_refused(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ActivationCache(tmp_path / "cache")
    activations(tiny, folder, cache)
    (entry,) = cache.sets()
    for path in (cache.folder, cache.folder / entry.name):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        path.chmod(0o777)
        with pytest.raises(TrainingError, match="is writable by its group or others"):
            activations(tiny, folder, cache)
        path.chmod(0o700)
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(TrainingError, match="belongs to another user"):
        activations(tiny, folder, cache)


def swap(rows: np.ndarray) -> None:
    rows[[0, 1]] = rows[[1, 0]]


def flip(rows: np.ndarray) -> None:
    rows.view(np.uint8).reshape(-1)[7] ^= 1


@pytest.mark.parametrize("file", ["key_values.npy", "features.npy", "digests.npy"])
@pytest.mark.parametrize("harm", [swap, flip])
def test_rows_that_were_exchanged_or_damaged_are_recomputed(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    file: str, harm: Callable[[np.ndarray], None],
) -> None:  # fmt: skip
    cache = ActivationCache(tmp_path / "cache")
    first = fetched(activations(tiny, folder, cache))
    rows = np.load(cache.folder / cache.sets()[0].name / file, mmap_mode="r+")
    harm(rows)
    rows.flush()
    with caplog.at_level(logging.WARNING):
        again = fetched(activations(tiny, folder, cache))
    assert torch.equal(first, again)
    assert "cached rows whose digests do not match." in caplog.text


def test_rows_that_were_exchanged_with_their_digests_are_recomputed(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path
) -> None:
    cache = ActivationCache(tmp_path / "cache")
    first = fetched(activations(tiny, folder, cache))
    for file in ("key_values.npy", "features.npy", "digests.npy"):
        rows = np.load(cache.folder / cache.sets()[0].name / file, mmap_mode="r+")
        swap(rows)
        rows.flush()
    assert torch.equal(first, fetched(activations(tiny, folder, cache)))


def test_two_runs_on_one_entry_preserve_each_others_rows(tiny: FrozenBackbone, tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache")
    keys = [f"{number:064x}" for number in range(6)]
    first, second = cache.open(tiny, keys), cache.open(tiny, keys)
    row = torch.ones(1, *first.key_values.shape[1:], dtype=torch.float16)
    for number in range(6):
        (first if number % 2 else second).put([number], number * row, torch.zeros(1, first.features.shape[1]))
    first.flush()
    second.flush()
    assert cache.sets()[0].num_done == 6
    again = cache.open(tiny, keys)
    assert again.valid_rows(range(6)) == set(range(6))
    assert all((again.key_values[number] == number).all() for number in range(6))


def test_an_entry_that_a_run_has_open_is_neither_evicted_nor_cleared(tiny: FrozenBackbone, tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", budget_gb=8 * ROW_GB)
    keys = [f"{number:064x}" for number in range(12)]
    first = cache.open(tiny, keys[:6])
    (name,) = [entry.name for entry in cache.sets()]
    second = cache.open(tiny, keys[6:])
    assert name in [entry.name for entry in cache.sets()]
    freed, in_use = cache.clear()
    assert (freed, len(in_use)) == (0, 2)
    del first, second
    freed, in_use = cache.clear()
    assert freed > 0
    assert in_use == cache.sets() == []


def test_an_entry_in_use_counts_for_the_budget(tiny: FrozenBackbone, tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", budget_gb=20 * ROW_GB)
    keys = [f"{number:064x}" for number in range(40)]
    in_use = cache.open(tiny, keys[:12])
    cache.open(tiny, keys[12:18])
    cache.open(tiny, keys[18:26])  # does not fit beside both, and only the second entry can be evicted
    assert sorted(entry.num_images for entry in cache.sets()) == [8, 12]
    assert in_use.row_of


def test_clearing_does_not_delete_the_checkpoints_of_a_running_run(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache")
    runs = [Checkpoint(cache.runs / f"{number:016x}", cache.claim) for number in range(2)]
    for run in runs:
        run.within("0123456789abcdef").save("sweep", {"a": torch.ones(2)}, {"epoch": 1})
    runs[1]._hold.close()  # as if its process had been killed
    cache.clear()
    assert [path.name for path in cache.runs.iterdir()] == [f"{0:016x}"]
    assert runs[0].within("0123456789abcdef").load("sweep") is not None
    runs[1].save("refit", {"a": torch.ones(2)}, {"epoch": 2})  # its folder is gone
    assert runs[1].load("refit") is not None
    for run in runs:
        run.clear()
    assert list(cache.runs.iterdir()) == []


def test_a_full_disk_ends_checkpoints_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Checkpoint(tmp_path / "run")
    run.save("sweep", {"a": torch.ones(2)}, {"epoch": 1})

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(context, "written", full)
    run.save("sweep", {"a": torch.ones(2)}, {"epoch": 2})
    run.within("inner").save("sweep", {"a": torch.ones(2)}, {"epoch": 1})
    assert [record.getMessage() for record in caplog.records] == [
        f"No checkpoint can be saved in {tmp_path / 'run'}: No space left on device. If this run is interrupted, it "
        "starts over."
    ]
    assert run.load("sweep")[1] == {"epoch": 1}


def test_a_budget_of_zero_writes_no_cache(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path, registry: Registry
) -> None:
    (tmp_path / "file").write_text("no folder can be made here")
    cache = ActivationCache(tmp_path / "file", budget_gb=0)
    task = Learner(tiny, registry, cache).learn("colours", folder, config=LearnConfig(head_only=True))
    assert task.ref == "colours:1"


def test_the_cache_works_where_files_cannot_be_reserved(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has no posix_fallocate, and some file systems do not support it."""
    expected = fetched(activations(tiny, folder, ActivationCache(tmp_path / "cache")))

    def unknown(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", unknown)
    assert torch.equal(expected, fetched(activations(tiny, folder, ActivationCache(tmp_path / "other"))))
    monkeypatch.delattr("os.posix_fallocate")
    assert torch.equal(expected, fetched(activations(tiny, folder, ActivationCache(tmp_path / "mac"))))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(TrainingError, match=r"cannot hold them \(No space left on device\)"):
        activations(tiny, folder, ActivationCache(tmp_path / "full", budget_gb=1.0))
