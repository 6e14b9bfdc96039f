"""Activations: the same bits cached or recomputed, and found again by content."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.exceptions import DataError, TrainingError
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.activations import Activations
from addenda.learner.data import open_images
from addenda.learner.frozen_views import FrozenViews
from tests.support.activations import FILES, ROW_GB, activations, fetched
from tests.support.images import colour_folder
from tests.support.places import ROOT
from tests.support.tasks import random_task
from tests.support.tiny import tiny_vit

VARIED = Augmentation(views=2, color_jitter=0.3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colour_folder(tmp_path / "colours", per_class=4)


@pytest.mark.parametrize("rows", [0, 1, 5, 11, 20, 36])
def test_the_budget_changes_no_bit(tiny: FrozenBackbone, folder: Path, tmp_path: Path, rows: int) -> None:
    parent = random_task(tiny, "parent", memory=3)
    unlimited = activations(tiny, folder, ActivationCache(tmp_path / "unlimited"), VARIED, parents=[parent])
    limited = activations(
        tiny, folder, ActivationCache(tmp_path / "limited", budget_gb=rows * ROW_GB * 1.0001), VARIED, parents=[parent]
    )
    assert int((limited._frozen._cache_rows >= 0).sum()) == rows
    for view in range(3):
        assert torch.equal(fetched(unlimited, view), fetched(limited, view))
    assert torch.equal(unlimited.pooled, limited.pooled)
    assert torch.equal(unlimited.layers, limited.layers)


@pytest.mark.slow
def test_the_budget_changes_no_task(tiny: FrozenBackbone, folder: Path, tmp_path: Path) -> None:
    config = LearnConfig(epochs=2, batch_size=5, augmentation=Augmentation(views=1))
    shas = set()
    for rows in (0, 7, 24):
        cache = ActivationCache(tmp_path / f"cache-{rows}", budget_gb=rows * ROW_GB * 1.0001)
        with Registry.open(tmp_path / f"{rows}.db") as registry:
            shas.add(Learner(tiny, registry, cache).learn("colours", folder, config=config).sha256)
    assert len(shas) == 1


def test_a_second_run_reads_no_image_and_a_grown_dataset_only_the_new_ones(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = FrozenViews._views
    monkeypatch.setattr(FrozenViews, "_views", lambda self, item, rows: read.extend(rows) or original(self, item, rows))
    cache = ActivationCache(tmp_path / "cache")
    first = fetched(activations(tiny, folder, cache))
    assert len(read) == 12
    (folder / "blue" / "0.png").rename(folder / "blue" / "renamed.png")
    again = activations(tiny, folder, ActivationCache(tmp_path / "cache"))
    assert len(read) == 12
    assert torch.equal(fetched(again).sort().values, first.sort().values)
    Image.new("RGB", (40, 40), (9, 9, 9)).save(folder / "blue" / "new.png")
    activations(tiny, folder, cache)
    assert len(read) == 13
    (folder / "blue" / "new.png").unlink()
    activations(tiny, folder, cache)
    assert len(read) == 13


def test_two_files_of_one_content_are_computed_once(tiny: FrozenBackbone, folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "copy.png").write_bytes((folder / "red" / "0.png").read_bytes())
    cache = ActivationCache(tmp_path / "cache")
    assert len(activations(tiny, folder, cache)) == 13
    assert cache.sets()[0].num_images == 12


def test_a_cache_of_another_backbone_or_numerics_is_not_used(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path
) -> None:
    cache = ActivationCache(tmp_path / "cache")
    first = fetched(activations(tiny, folder, cache))
    other = fetched(activations(FrozenBackbone(tiny_vit(seed=1), "other", "hub"), folder, cache))
    assert not torch.equal(first, other)
    torch.set_num_threads(2)
    try:
        activations(tiny, folder, cache)
    finally:
        torch.set_num_threads(1)
    assert len(cache.sets()) == 3


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_entry_is_recomputed_with_a_warning(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    cache = ActivationCache(tmp_path / "cache")
    first = fetched(activations(tiny, folder, cache))
    path = cache.folder / cache.sets()[0].name / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "gone":
        path.unlink()
    else:
        other = colour_folder(tmp_path / "others", per_class=2, seed=5)
        elsewhere = ActivationCache(tmp_path / "elsewhere")
        activations(FrozenBackbone(tiny_vit(seed=1, depth=2), "other", "hub"), other, elsewhere)
        path.write_bytes((elsewhere.folder / elsewhere.sets()[0].name / file).read_bytes())
    with caplog.at_level(logging.WARNING):
        again = fetched(activations(tiny, folder, cache))
    assert torch.equal(first, again)
    assert "Discarding the damaged cache entry" in caplog.text or (file, damage) == ("meta.json", "other")
    assert all(entry.num_done == entry.num_images for entry in cache.sets() if entry.num_images == 12)


@pytest.mark.slow
def test_a_run_killed_while_the_cache_is_filled_resumes(
    tiny: FrozenBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = colour_folder(tmp_path / "many", per_class=40)
    script = (
        "import sys, time, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "from tests.support.tiny import tiny_vit\n"
        "from addenda import FrozenBackbone\n"
        "from addenda.learner import ActivationCache, Augmentation\n"
        "from addenda.learner import frozen_views as f\n"
        "from addenda.learner.activations import Activations\n"
        "from addenda.learner.data import open_images\n"
        "f.FLUSH_S = 0\n"
        "read = f.FrozenViews._views\n"
        "def slowly(self, item, rows):\n"
        "    time.sleep(0.02)\n"
        "    sys.stdout.write(f'{rows[0]}\\n')\n"
        "    sys.stdout.flush()\n"
        "    return read(self, item, rows)\n"
        "f.FrozenViews._views = slowly\n"
        "backbone = FrozenBackbone(tiny_vit(), 'tiny', 'hub')\n"
        "Activations(backbone, open_images(sys.argv[2]), Augmentation(), ActivationCache(sys.argv[3]))\n"
    )
    root = str(ROOT)
    process = subprocess.Popen(
        [sys.executable, "-c", script, root, str(folder), str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 70:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    cache = ActivationCache(tmp_path / "cache")
    survived = cache.sets()[0].num_done
    assert 24 <= survived < 120
    read: list[int] = []
    original = FrozenViews._views
    monkeypatch.setattr(FrozenViews, "_views", lambda self, item, rows: read.extend(rows) or original(self, item, rows))
    resumed = activations(tiny, folder, cache)
    assert len(read) == 120 - survived
    assert torch.equal(fetched(resumed), fetched(activations(tiny, folder, ActivationCache(tmp_path / "fresh"))))


def test_an_image_that_changes_under_a_run_is_noticed(tiny: FrozenBackbone, folder: Path, tmp_path: Path) -> None:
    images = open_images(folder).hashed()
    changed = folder / "green" / "1.png"
    Image.new("RGB", (40, 40), (1, 2, 3)).save(changed)
    with pytest.raises(DataError, match=r"green/1\.png changed during the run"):
        Activations(tiny, images, Augmentation(), ActivationCache(tmp_path / "cache"))


def test_views_differ_repeat_and_depend_on_content_alone(tiny: FrozenBackbone, folder: Path, tmp_path: Path) -> None:
    first = activations(tiny, folder, ActivationCache(tmp_path / "one"), VARIED)
    views = [fetched(first, view) for view in range(5)]
    assert all(not torch.equal(views[i], views[j]) for i in range(5) for j in range(i))
    again = activations(tiny, folder, ActivationCache(tmp_path / "two"), VARIED)
    assert all(torch.equal(view, fetched(again, number)) for number, view in enumerate(views))


def test_random_views_of_tensors_are_refused(tiny: FrozenBackbone, tmp_path: Path) -> None:
    dataset = torch.utils.data.TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 2)
    with pytest.raises(DataError, match="random views require PIL images"):
        Activations(tiny, open_images(dataset), VARIED, ActivationCache(tmp_path / "cache"))


def test_a_budget_below_one_image_is_refused(tiny: FrozenBackbone, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"cannot hold the activations of one image .* Raise the budget, or set"):
        activations(tiny, folder, ActivationCache(tmp_path / "cache", budget_gb=ROW_GB / 2))


def test_a_full_disk_is_reported_with_what_to_do(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    cache = ActivationCache(tmp_path / "cache", budget_gb=1.0)
    with pytest.raises(TrainingError, match=r"cannot hold them \(No space left on device\).*--cache-gb"):
        activations(tiny, folder, cache)
    assert cache.sets() == []


def test_the_least_recently_used_entry_is_evicted(tiny: FrozenBackbone, tmp_path: Path) -> None:
    folders = [colour_folder(tmp_path / f"data-{i}", per_class=4, seed=10 * i) for i in range(3)]
    cache = ActivationCache(tmp_path / "cache", budget_gb=26 * ROW_GB + 2e-5)
    names = []
    for folder in folders:
        activations(tiny, folder, cache)
        names.append(cache.sets()[0].name)
        time.sleep(0.02)
    assert {entry.name for entry in cache.sets()} == set(names[1:])


def test_clearing_returns_the_bytes_freed(tiny: FrozenBackbone, folder: Path, tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache")
    activations(tiny, folder, cache)
    (entry,) = cache.sets()
    assert (entry.backbone, entry.num_images, entry.num_done) == ("tiny", 12, 12)
    assert entry.num_bytes >= 12 * ROW_GB * 1e9
    assert cache.clear([]) == (0, [])
    assert cache.clear() == (entry.num_bytes, [])
    assert cache.sets() == []


def test_cached_activations_are_those_of_the_frozen_stream_in_half_precision(
    tiny: FrozenBackbone, folder: Path, tmp_path: Path
) -> None:
    cached = activations(tiny, folder, ActivationCache(tmp_path / "cache"))
    pixels = open_images(folder).read_all(tiny)
    batch = cached.batch(torch.arange(len(cached)))
    for layer, frozen in enumerate(tiny.stream(pixels)):
        for which, expected in enumerate(frozen):
            values = torch.cat([batch.fetch(layer, which, chunk).clone() for chunk in batch.chunks])
            np.testing.assert_allclose(values, expected, rtol=2e-3, atol=2e-3)
