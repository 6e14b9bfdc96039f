"""Messy files: they are read as intended, left out and reported, or refused with a clear error."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import ConcatDataset, TensorDataset
from torchvision.datasets import ImageFolder

from addenda import Augmentation, FrozenBackbone, Learner, Registry, load_backbone
from addenda.backbones import read_image
from addenda.exceptions import BackboneError, DataError, UnsteadyError
from addenda.learner.data import open_images
from addenda.learner.data.dataset_objects import Items
from addenda.learner.data.labelled import LabelledImages
from tests.support.commands import Run
from tests.support.images import colour_folder
from tests.support.messy import HEAD_ONLY, LEARN, TWO, Pictures, with_splits
from tests.support.places import DATA
from tests.support.tiny import tiny_vit

# --- which files are images -------------------------------------------------------------------------------------------


def test_every_file_that_pillow_reads_is_an_image_and_others_are_reported(folder: Path, run: Run) -> None:
    picture = Image.open(folder / "red" / "0.png")
    for name in ("a.jfif", "b.jpe", "c.pgm", "d.TIF", "e.avif", "f.jp2"):
        picture.convert("L" if name.endswith("pgm") else "RGB").save(folder / "red" / name)
    picture.save(folder / "red" / "no suffix", format="PNG")
    picture.save(folder / "red" / "odd.dat", format="JPEG")
    (folder / "red" / "notes.txt").write_text("P1 is the first patient")
    (folder / "blue" / "labels.csv").write_text("a,b")
    (folder / "readme.md").write_text("about")
    picture.save(folder / "loose.png")
    assert len(open_images(folder)) == 16
    learned = run("learn", "any", folder, *LEARN, "--json")
    assert json.loads(learned.out)["left_out"] == {"not_images": 3, "beside_classes": 1}
    assert "3 files that Pillow does not read as images (readme.md, blue/labels.csv, red/notes.txt)" in learned.err
    predicted = run("predict", folder / "red", folder / "blue", "--json")
    assert len(json.loads(predicted.out)["images"]) == 16
    assert json.loads(predicted.out)["left_out"] == {"not_images": 2}
    assert "left out of" in predicted.err
    metrics = json.loads(run("evaluate", "any", folder, "--json").out)["metrics"]
    assert (metrics["num_images"], metrics["left_out"]) == (16, {"not_images": 3, "beside_classes": 1})


def test_photos_in_heic_are_images_and_without_the_extra_left_out_by_name(folder: Path, monkeypatch) -> None:
    for name in ("IMG_1.HEIC", "IMG_2.heif"):
        shutil.copy(DATA / "photo.heic", folder / "red" / name)
    assert open_images(folder).counts == [4, 6]
    monkeypatch.delitem(Image.OPEN, "HEIF")
    images = open_images(folder)
    assert (images.counts, list(images.left_out)) == ([4, 4], ["heic"])
    expected = "2 HEIC images, which require pip install 'addenda[heic]' (red/IMG_1.HEIC, red/IMG_2.heif)"
    assert expected in images.remarks


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", ".AppleDouble"])
def test_system_folders_are_neither_images_nor_classes(folder: Path, name: str) -> None:
    for parent in (folder, folder / "red", folder / "red" / "deeper"):
        (parent / name / "0.png").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(parent / name / "copy.png")
    Image.new("RGB", (8, 8)).save(folder / "blue" / "._0.png")
    (folder / "blue" / "Thumbs.db").write_bytes(b"\xd0\xcf")
    images = open_images(folder)
    assert images.labels == ("blue", "red")
    assert images.counts == [4, 4]
    assert {kind: len(paths) for kind, paths in images.left_out.items()} == {"hidden": 5}


def test_links_to_files_are_followed_and_links_to_folders_reported(folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "linked.png").symlink_to(folder / "blue" / "0.png")
    (folder / "red" / "more").symlink_to(folder / "blue")
    (folder / "red" / "round").symlink_to(folder)
    images = open_images(folder)
    assert images.counts == [4, 5]
    assert list(map(len, images.left_out.values())) == [2]
    assert "2 links to folders (red/more, red/round)" in images.remarks


def test_a_pipe_named_like_an_image_does_not_block(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "red" / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    (folder / "red" / "linked.png").symlink_to(tmp_path / "pipe")
    (folder / "red" / "endless.png").symlink_to("/dev/zero")
    assert len(open_images(folder)) == 8


# --- bad ones ---------------------------------------------------------------------------------------------------------


def spoil(folder: Path) -> int:
    """Adds bad images of every kind to a folder; returns their number."""
    (folder / "gone.png").symlink_to(".git/annex/nothing")
    (folder / "folder.png").mkdir()
    (folder / "junk.png").write_bytes(b"junk")
    (folder / "empty.jpg").write_bytes(b"")
    content = (folder / "0.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    return 5


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_images_are_refused_before_training_or_skipped_and_counted(
    tmp_path: Path, run: Run, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_splits(tmp_path / "data", "train", "test")
    num_bad = spoil(data / split / "red")
    with monkeypatch.context() as patched:
        patched.setattr("addenda.learner.learner.LearningRun", lambda *_: pytest.fail("training started"))
        refused = run("learn", "any", data, *LEARN)
    assert refused.code == 2
    assert f"{num_bad} of 13 images in {str(data / split)!r} cannot be read" in refused.err
    learned = json.loads(run("learn", "any", data, *LEARN, "--skip-bad", "--json").out)
    skipped = {"train": learned["skipped"], "test": learned["test"]["skipped"]}
    assert len(skipped.pop(split)) == num_bad
    assert list(skipped.values()) == [[]]
    assert learned["metrics"]["test"]["num_images"] == 8
    output = run("learn", "other", data, *LEARN, "--skip-bad").out
    assert output.count("skipped: ") == num_bad
    evaluated = run("evaluate", "any", data / split, "--skip-bad", "--json")
    assert json.loads(evaluated.out)["metrics"]["skipped"] == num_bad
    assert f"({num_bad} skipped)" in run("evaluate", "any", data / split, "--skip-bad").out


@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("error", [OSError("a disk that is gone"), KeyError("row"), zlib.error("invalid")])
def test_an_item_that_raises_is_an_error_or_skipped(learner: Learner, error: Exception, targets: bool) -> None:
    with pytest.raises(DataError, match=r"1 of 12 images .*\n  Item 2 of the given Pictures cannot be loaded: "):
        learner.learn("any", Pictures(error, targets), config=HEAD_ONLY)
    task = learner.learn("any", Pictures(error, targets), config=HEAD_ONLY, skip_bad=True)
    assert (task.data["num_images"], len(task.data["skipped"])) == (11, 1)
    assert learner.evaluate("any", Pictures(error, targets), skip_bad=True).metrics["skipped"] == 1


def test_a_dataset_of_failing_items_only_is_refused_with_the_reason(learner: Learner) -> None:
    class Broken(Pictures):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            raise self.error

    for targets in (True, False):
        with pytest.raises(DataError, match="an old format"):
            learner.learn("any", Broken(RuntimeError("an old format"), targets), config=HEAD_ONLY, skip_bad=True)


def test_an_item_that_is_not_a_pair_is_refused() -> None:
    with pytest.raises(DataError, match=r"Item 0 of the data is a dict, not a pair of image and target"):
        Items([{"image": 1}], "the data")[0]


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_thin_image_is_refused_by_name_before_it_takes_the_memory(
    learner: Learner, folder: Path, size: tuple[int, int]
) -> None:
    Image.new("RGB", size).save(folder / "red" / "thin.png")
    with pytest.raises(DataError, match=r"thin.png' has \d+ x \d+ pixels; the maximum aspect ratio is 1000:1"):
        learner.learn("any", folder, config=HEAD_ONLY)
    assert len(learner.learn("any", folder, config=HEAD_ONLY, skip_bad=True).data["skipped"]) == 1
    with pytest.raises(DataError, match="aspect ratio"):
        learner.backbone.transform(Image.new("RGB", size))


def test_random_views_of_tensors_are_refused_before_anything_is_read(learner: Learner) -> None:
    data = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 2)
    for augmentation in (Augmentation(views=2), Augmentation(fresh=True)):
        with pytest.raises(DataError, match=r"holds tensors, of which there are no random views\. Set views to 0"):
            learner.learn("any", data, config=replace(HEAD_ONLY, augmentation=augmentation), skip_bad=True)


# --- NaN and infinity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_not_finite_is_an_error_or_skipped(learner: Learner, value: float) -> None:
    images = torch.randn(8, 3, 32, 32)
    images[3, 0, 0, 0] = value
    data = TensorDataset(images, torch.arange(8) % 2)
    with pytest.raises(DataError, match=r"Item 3 of the given TensorDataset holds NaN or infinity"):
        learner.learn("any", data, config=HEAD_ONLY)
    task = learner.learn("any", data, config=HEAD_ONLY, skip_bad=True)
    assert len(task.data["skipped"]) == 1


def test_an_image_that_overflows_the_backbone_is_reported(learner: Learner) -> None:
    images = torch.randn(8, 3, 32, 32)
    images[5] = 3e38
    with pytest.raises(DataError, match=r"Item 5 of .* has a backbone feature with NaN or infinity"):
        learner.learn("any", TensorDataset(images, torch.arange(8) % 2), config=HEAD_ONLY)


def test_a_weight_that_is_not_finite_is_reported(tmp_path: Path) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(BackboneError, match=r"Weight 'norm.weight' of backbone 'tiny' \(there\) holds NaN or infinity"):
        FrozenBackbone(model, "tiny", "there")
    assert load_backbone("glyphs", device="cpu").fingerprint


# --- metadata ---------------------------------------------------------------------------------------------------------


def add_texts(info: PngImagePlugin.PngInfo, kind: str) -> None:
    long = "a" * 2_000_000
    if kind == "zTXt":
        info.add_text("parameters", long, zip=True)
    elif kind == "iTXt":
        info.add_itxt("prompt", long, zip=True)
    for number in range(80 if kind == "many" else 0):
        info.add_text(f"key {number}", long[:900_000], zip=True)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "many"])
def test_an_image_is_read_whatever_its_metadata(tmp_path: Path, kind: str) -> None:
    picture = Image.new("RGB", (9, 7), (10, 200, 30))
    picture.putpixel((0, 0), (255, 0, 0))
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    add_texts(info, kind)
    profile = b"x" * 2_000_000 if kind == "iCCP" else None
    picture.save(tmp_path / "a.png", pnginfo=info, exif=exif, icc_profile=profile)
    image = read_image(tmp_path / "a.png")
    assert image.size == (7, 9)  # turned upright
    assert image.getpixel((6, 0)) == (255, 0, 0)
    half = (tmp_path / "a.png").read_bytes()[:-100]
    (tmp_path / "half.png").write_bytes(half)
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path / "half.png")


def test_hidden_files_alone_cause_no_warning(folder: Path, learner: Learner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "addenda")
    (folder / "red" / ".DS_Store").write_bytes(b"\0")
    task = learner.learn("any", folder, config=HEAD_ONLY)
    assert task.data["left_out"] == {"hidden": 1}
    records = [record for record in caplog.records if "left out" in record.message]
    assert [record.levelno for record in records] == [logging.INFO]


@pytest.mark.parametrize("change", ["deleted", "changed", "random"])
def test_images_that_change_during_a_run_are_refused_and_never_skipped(
    learner: Learner, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = colour_folder(tmp_path / "new", per_class=4, classes=TWO, seed=1000 + len(change))  # not cached yet
    data: Any = folder
    if change == "random":
        noise = torch.Generator().manual_seed(0)
        data = ImageFolder(
            str(folder), transform=lambda image: learner.backbone.transform(image) + torch.rand(1, generator=noise)
        )
    else:
        original = LabelledImages.hashed

        def hashed(images: LabelledImages) -> LabelledImages:
            result = original(images)
            path = folder / "red" / "2.png"
            path.unlink() if change == "deleted" else path.write_bytes((folder / "red" / "0.png").read_bytes())
            return result

        monkeypatch.setattr(LabelledImages, "hashed", hashed)
    with pytest.raises(UnsteadyError, match=r"It was readable when this run began|changed during the run"):
        learner.learn("any", data, config=HEAD_ONLY, skip_bad=True)
    assert learner.registry.tasks() == []


def test_a_task_learned_with_skipped_images_is_not_reused_without_skip_bad(learner: Learner, folder: Path) -> None:
    (folder / "red" / "junk.png").write_bytes(b"junk")
    task = learner.learn("any", folder, config=HEAD_ONLY, skip_bad=True)
    assert learner.learn("any", folder, config=HEAD_ONLY, skip_bad=True).ref == task.ref
    with pytest.raises(DataError, match=r"1 of 9 images .*\n.*junk"):
        learner.learn("any", folder, config=HEAD_ONLY)


def test_a_link_to_itself_is_a_bad_image(folder: Path, run: Run) -> None:
    (folder / "red" / "self.png").symlink_to("self.png")
    (folder / "red" / "self").symlink_to("self")
    assert run("learn", "any", folder, *LEARN).code == 2
    assert run("learn", "any", folder, *LEARN, "--skip-bad").code == 0
    predicted = run("predict", folder, "--skip-bad", "--json")
    assert len(json.loads(predicted.out)["images"]) == 8
    assert run("predict", "x" * 300, "--skip-bad").code == 0


def test_missing_files_of_a_listing_are_skipped_on_request(folder: Path, run: Run) -> None:
    lines = [f"{path},{path.parent.name}" for path in folder.rglob("*.png")]
    (folder / "all.csv").write_text("\n".join(["path,label", *lines, "red/gone.png,red"]))
    refused = run("learn", "any", folder / "all.csv", *LEARN)
    assert "1 of 9 images in" in refused.err
    assert "line 10: there is no file" in refused.err
    learned = json.loads(run("learn", "any", folder / "all.csv", *LEARN, "--skip-bad", "--json").out)
    assert len(learned["skipped"]) == 1


def test_a_bad_file_that_occurs_twice_causes_no_traceback(learner: Learner, folder: Path, tmp_path: Path) -> None:
    learner.learn("any", folder, config=HEAD_ONLY)
    bad = colour_folder(tmp_path / "bad", per_class=1, classes=TWO)
    for path in bad.rglob("*.png"):
        path.write_bytes(b"junk")
    data = ImageFolder(str(bad))
    with pytest.raises(DataError, match=r"4 images in .* cannot be read"):
        learner.evaluate("any", ConcatDataset([data, data]), skip_bad=True)


def test_the_traceback_of_a_system_error_is_printed_on_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registry, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert run("tasks", "list").err == "Error: [Errno 5] Input/output error.\n"
    with pytest.raises(OSError, match="Input/output"):
        run("tasks", "list", "--traceback")


def test_an_archive_unpacked_twice_is_refused(tmp_path: Path) -> None:
    data = colour_folder(tmp_path / "trash", per_class=4)
    colour_folder(data / "trash", per_class=4)
    with pytest.raises(DataError, match=r"contains trash/, which holds folders named like its neighbours \(blue/, gre"):
        open_images(data)


def test_copies_and_contradictions_are_reported_with_an_example(learner: Learner, folder: Path, run: Run) -> None:
    content = (folder / "red" / "0.png").read_bytes()
    (folder / "red" / "0 (1).png").write_bytes(content)
    (folder / "blue" / "again.png").write_bytes(content)
    learned = run("learn", "any", folder, *LEARN, "--json")
    assert json.loads(learned.out)["repeated"] == {"classes": 3, "copies": 1, "test": 0}
    said = r"3 training images also occur with other labels, such as \S+ with 'blue' and 'red', and are learned with"
    assert re.search(said, learned.err)
    assert "training images that are copies of others of their class: 1, which" in learned.err


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match="it is empty, 0 bytes"):
        read_image(tmp_path / "a.jpg")


def test_a_listing_of_another_system_is_explained(folder: Path) -> None:
    (folder / "all.csv").write_text("path,label\nred\\0.png,red\nblue\\0.png,blue\n")
    with pytest.raises(DataError, match=r"Separate folders by /, not by \\"):
        open_images(folder / "all.csv")
