"""Messy folders and datasets: they are read as intended, or refused with a clear error."""

from __future__ import annotations

import json
import logging
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import ConcatDataset, Subset, TensorDataset, random_split
from torchvision.datasets import ImageFolder

from addenda import Augmentation, CombinedModel, FrozenBackbone, LearnConfig, Learner, Registry, load_backbone
from addenda.backbones import read_image
from addenda.exceptions import BackboneError, DataError, NameTakenError, RegistryError, RetiredError, UnsteadyError
from addenda.learner import LearnRow, learn_many
from addenda.learner.data import open_images, open_parts
from addenda.learner.data.dataset_objects import Items
from addenda.learner.data.labelled import LabelledImages
from addenda.learner.data.listings import open_listing, split_named
from addenda.learner.data.openers import Split
from tests.support.commands import Run
from tests.support.images import colour_folder
from tests.support.tiny import tiny_vit

HEAD_ONLY = LearnConfig(head_only=True)
LEARN = ("--backbone", "glyphs", "--head-only")
TWO = ("red", "blue")


@pytest.fixture
def learner(tiny: FrozenBackbone, registry: Registry) -> Learner:
    return Learner(tiny, registry)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colour_folder(tmp_path / "images", per_class=4, classes=TWO)


def with_splits(folder: Path, *splits: str, classes: tuple[str, ...] = TWO) -> Path:
    for seed, split in enumerate(splits):
        colour_folder(folder / split, per_class=4, classes=classes, seed=seed)
    return folder


# --- which folders are splits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"), ("Train", "Test"), ("TRAIN", "TEST"), ("Training", "Testing"), ("training_set", "test_set"),
        ("train-images", "testset"), ("train2017", "test2017"), ("trn", "tst"),
    ],
)  # fmt: skip
def test_folders_named_like_splits_are_splits_in_any_case(tmp_path: Path, train: str, test: str) -> None:
    images, test_images = open_parts(with_splits(tmp_path / "scans", train, test))
    assert images.labels == ("blue", "red")
    assert test_images is not None
    assert f"{test}{os.sep}" in str(test_images.items[0])
    assert f"{train}{os.sep}" in str(images.items[0])


def test_splits_without_a_training_split_are_refused_with_a_remedy(tmp_path: Path) -> None:
    data = with_splits(tmp_path / "data", "val", "test")
    with pytest.raises(DataError, match=r"contains test/ and val/ but no train/\. Put the training images into"):
        open_parts(data)
    assert len(open_images(data, "test")) == 8  # as `evaluate` opens it
    assert len(open_images(data / "val")) == 8


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_no_error_suggests_to_learn_from_test_images_or_to_test_on_training_images(
    tmp_path: Path, split: Split, other: str
) -> None:
    beside = colour_folder(with_splits(tmp_path / "beside", other), classes=("cat", "dog"))
    folders = [with_splits(tmp_path / "one", other), with_splits(tmp_path / "two", other, f"{other}2"), beside]
    for folder in folders:
        with pytest.raises(DataError) as refused:
            open_images(folder, split)
        assert str(folder / other) not in str(refused.value)


def test_a_validation_folder_and_others_beside_the_splits_are_reported(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    data = with_splits(tmp_path / "data", "train", "Validation", "unsup")
    assert open_parts(data)[1] is None
    result = run("learn", "any", data, *LEARN)
    assert result.code == 0
    assert "1 validation folder, because Addenda draws its own validation split from train (Validation)" in result.err
    assert "1 folder beside the splits (unsup)" in result.err
    assert json.loads(run("learn", "any", data, *LEARN, "--json").out)["left_out"] == {
        "beside_parts": 1, "validation": 1,
    }  # fmt: skip


def test_classes_may_be_named_like_splits(tmp_path: Path) -> None:
    data = colour_folder(tmp_path / "vehicles", classes=("bus", "train", "test"))
    assert open_images(data).labels == ("bus", "test", "train")


@pytest.mark.parametrize(
    ("splits", "classes", "message"),
    [
        (("train", "Train"), (), r"contains both \w+/ and \w+/"),
        (("test",), ("cat", "dog"), r"contains test/, which holds class folders, and cat/, which holds images"),
        ((), ("train", "test"), r"contains test/ and train/, which are named like splits but hold no class folders"),
    ],
)
def test_ambiguous_folders_are_refused(
    tmp_path: Path, splits: tuple[str, ...], classes: tuple[str, ...], message: str
) -> None:
    data = with_splits(tmp_path / "data", *splits)
    if classes:
        colour_folder(data, classes=classes)
    with pytest.raises(DataError, match=message):
        open_images(data)


def test_subfolders_of_class_folders_are_reported(tmp_path: Path) -> None:
    data = tmp_path / "animals"
    colour_folder(data / "pets", classes=("cat", "dog"))
    colour_folder(data / "wild", classes=("lynx", "wolf"))
    images = open_images(data)
    assert images.labels == ("pets", "wild")
    assert "subfolders of class folders belong to that class (pets/cat, pets/dog, wild/lynx, …)" in images.remarks
    with pytest.raises(DataError, match=r"contains a single folder, animals/, whose images are in subfolders"):
        open_images(tmp_path)


def test_a_listing_has_split_names_in_any_case(folder: Path) -> None:
    lines = [f"{path},{path.parent.name},{'Training' if path.stem < '2' else 'TEST'}" for path in folder.rglob("*.png")]
    (folder / "all.csv").write_text("\n".join(["path,label,split", *lines]))
    assert len(open_listing(folder / "all.csv", "train")) == len(open_listing(folder / "all.csv", "test")) == 4


def test_split_names_are_recognised() -> None:
    assert {name: split_named(name) for name in ("Val", "DEV", "validation_set", "Test images")} == {
        "Val": "validation", "DEV": "validation", "validation_set": "validation", "Test images": "test",
    }  # fmt: skip
    others = ("trainer", "testes", "contest", "device", "valley", "")
    assert {split_named(name) for name in others} == {None}


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


def test_a_pipe_named_like_an_image_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "red" / "pipe.png")
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


class Pictures:
    """A dataset whose third item cannot be loaded."""

    def __init__(self, error: Exception, targets: bool) -> None:
        self.error = error
        if targets:
            self.targets = [number % 2 for number in range(12)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == 2:
            raise self.error
        return Image.new("RGB", (40, 40), (index % 2 * 200, 17 * index, 0)), index % 2


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


# --- labels and their names -------------------------------------------------------------------------------------------


def test_targets_must_match_the_items(learner: Learner, folder: Path) -> None:
    def turned(y: int) -> int:
        return 1 - y

    def merged(y: int) -> int:
        return 0

    for change in (turned, merged):
        data = ImageFolder(str(folder), target_transform=change)
        for skip_bad in (False, True):
            with pytest.raises(DataError, match=r"Item \d of the given ImageFolder has the target \d, but the data"):
                learner.learn("any", data, config=HEAD_ONLY, skip_bad=skip_bad)
    unchanged = ImageFolder(str(folder), target_transform=lambda y: y)
    assert learner.learn("any", unchanged, config=HEAD_ONLY).labels == ("blue", "red")


def test_a_single_item_with_another_target_is_found(learner: Learner) -> None:
    class Wrong(Pictures):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return super().__getitem__(index)[0], 1 if index == 10 else index % 2

    data = Wrong(OSError(), True)
    with pytest.raises(DataError, match=r"Item 9 .* has the target 1, but the dataset's `targets` has 0"):
        learner.learn("any", Subset(data, [i for i in range(12) if i != 2]), config=HEAD_ONLY)


def test_targets_of_another_length_are_refused() -> None:
    data = Pictures(OSError(), True)
    data.targets = [0, 1]
    with pytest.raises(DataError, match="has 12 items and 2 targets"):
        open_images(data)


@pytest.mark.parametrize("target", [0.5, "cat", None, float("nan"), [1, 2.5]])
def test_a_target_that_is_not_a_whole_number_is_refused(target: object) -> None:
    with pytest.raises(DataError, match="target"):
        open_images([(Image.new("RGB", (8, 8)), target)] * 4)


def test_class_names_are_found_through_subsets_and_concatenations(
    learner: Learner, folder: Path, tiny: FrozenBackbone
) -> None:
    for transform in (None, tiny.transform):
        data = ImageFolder(str(folder), transform=transform)
        first, second = random_split(data, [6, 2], generator=torch.Generator().manual_seed(0))
        for dataset in (first, Subset(first, range(6)), ConcatDataset([data, data]), ConcatDataset([first, second])):
            assert open_images(dataset).labels == ("blue", "red")
    assert learner.learn("any", first, test=data, config=HEAD_ONLY).metrics["test"]["num_images"] == 8


def test_concatenated_datasets_of_different_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    others = colour_folder(tmp_path / "others", classes=("cat", "dog"))
    for transform in (None, lambda image: image):
        data = ConcatDataset([ImageFolder(str(path), transform=transform) for path in (folder, others)])
        with pytest.raises(DataError, match=r"number 0 is 'blue' in one and 'cat' in another"):
            open_images(data)


def test_names_that_are_not_utf8_are_refused_in_classes_and_shown_in_files(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.rename(os.fsencode(folder / "red" / "0.png"), os.fsencode(folder / "red") + b"/caf\xe9.png")
    assert run("learn", "any", folder, *LEARN).code == 0
    assert "caf\\udce9.png" in run("predict", folder, "--json").out
    assert json.loads(run("predict", folder, "--json").out)
    assert "caf\\udce9.png" in run("predict", folder, "--csv").out
    (folder / "red" / "caf\udce9.png").write_bytes(b"junk")
    bad = run("learn", "bad", folder, *LEARN, "--skip-bad")
    assert (bad.code, "caf\\udce9.png" in bad.out) == (0, True), bad.err
    os.rename(os.fsencode(folder / "red"), os.fsencode(folder) + b"/caf\xe9")
    refused = run("learn", "two", folder, *LEARN)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "has a name that is not UTF-8, 'caf\\udce9'; rename it" in refused.err


# --- one class, one image ---------------------------------------------------------------------------------------------


def test_a_single_class_can_be_learned_and_is_always_predicted(
    learner: Learner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from addenda.combined import CombinedModel, Router

    task = learner.learn("red", colour_folder(tmp_path / "one", classes=("red",)), config=LearnConfig(epochs=1))
    assert task.labels == ("red",)
    assert "has one class: every prediction will be 'red'" in caplog.text
    assert task.metrics["validation"]["accuracy"] == 1.0
    assert not task.head_weight.any()
    model = CombinedModel(learner.backbone, [learner.registry.get("red")])
    assert model(torch.randn(2, 3, 32, 32))["red"].tolist() == [[0.0], [0.0]]
    learner.learn("two", colour_folder(tmp_path / "two", classes=("blue", "green")), config=HEAD_ONLY)
    known = {name: learner.registry.statistics(name) for name in ("red", "two")}
    choices = Router({name: statistics for name, statistics in known.items() if statistics is not None})
    images = open_images(tmp_path / "one").read_all(learner.backbone)
    features = CombinedModel(learner.backbone, [task])(images, features=True).features
    assert features is not None
    assert [choice.task for choice in choices.choose(features)].count("red") >= 6


def test_a_class_of_one_image_is_learned_and_not_validated(
    learner: Learner, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1, 4):
        (folder / "red" / f"{number}.png").unlink()
    task = learner.learn("any", folder, config=HEAD_ONLY)
    assert "The validation split has no image of 'red': a class has a single image." in caplog.text
    assert task.metrics["validation"]["per_class"]["red"] is None
    only = open_images(folder).select([len(open_images(folder)) - 1]).read_all(learner.backbone)
    assert CombinedModel(learner.backbone, [task])(only)["any"].argmax(1).tolist() == [task.labels.index("red")]
    for path in [*(folder / "blue").iterdir()][1:]:
        path.unlink()
    with pytest.raises(DataError, match="has a single image of each class: at least one class needs two"):
        learner.learn("single", folder, config=HEAD_ONLY)


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


def test_a_repeated_run_keeps_the_probes_scores_beside_files_that_were_left_out(tmp_path: Path, run: Run) -> None:
    data = with_splits(tmp_path / "data", "train", "test")
    (data / "test" / "red" / "notes.txt").write_text("no image")
    before = json.loads(run("learn", "any", data, *LEARN, "--json").out)["metrics"]
    run("evaluate", "any", data)
    again = json.loads(run("learn", "any", data, *LEARN, "--json").out)["metrics"]
    assert again["linear_probe"] == before["linear_probe"]
    assert "test" in again["linear_probe"]


# --- learning again ---------------------------------------------------------------------------------------------------


def test_new_test_images_are_evaluated_though_the_task_was_learned_before(tmp_path: Path, run: Run) -> None:
    data = with_splits(tmp_path / "data", "train", "test", "other")
    train, test, other = (data / split for split in ("train", "test", "other"))
    for red, blue in zip((other / "red").iterdir(), (other / "blue").iterdir(), strict=True):
        content = red.read_bytes()
        red.write_bytes(blue.read_bytes())
        blue.write_bytes(content)
    before = run("learn", "any", train, *LEARN, "--test", test, "--json")
    again = run("learn", "any", train, *LEARN, "--test", other)
    assert "already learned from these images with these settings; it was now evaluated on this test split" in again.out
    accuracy = json.loads(run("evaluate", "any", other, "--json").out)["metrics"]["accuracy"]
    repeated = json.loads(run("learn", "any", train, *LEARN, "--test", other, "--json").out)
    assert repeated["metrics"]["test"]["accuracy"] == accuracy
    assert repeated["metrics"]["test"]["confusion"] != json.loads(before.out)["metrics"]["test"]["confusion"]
    assert not any("test" in repeated["metrics"][probe] for probe in ("linear_probe", "layer_probe"))
    assert repeated["already"]
    assert "nothing was done" in run("learn", "any", train, *LEARN, "--test", test).out
    assert "nothing was done" in run("learn", "any", train, *LEARN, "--test", other).out
    with Registry.open(tmp_path / "tasks.db") as registry:
        assert len({record.data_fingerprint for record in registry.evaluations("any")}) == 2
        assert registry.record("any").metrics == json.loads(before.out)["metrics"]
    many = tmp_path / "many.yaml"
    many.write_text(
        f"config: {{head_only: true}}\ntasks: [{{name: any, data: {str(train)!r}, test: {str(other)!r}}}]\n"
    )
    (row,) = json.loads(run("learn-many", many, "--backbone", "glyphs", "--json").out)
    assert (row["state"], row["metrics"]["test"]["accuracy"]) == ("learned before", accuracy)


def test_a_test_split_added_later_is_evaluated(learner: Learner, tmp_path: Path) -> None:
    data = with_splits(tmp_path / "data", "train")
    assert "test" not in learner.learn("any", data, config=HEAD_ONLY).metrics
    with_splits(data, "test")
    task = learner.learn("any", data, config=HEAD_ONLY)
    assert task.metrics["test"]["num_images"] == 8
    assert task.sha256 == learner.registry.get("any").sha256
    assert len(learner.registry.evaluations("any")) == 1


def test_a_retired_version_is_refused_and_can_be_added_again(learner: Learner, folder: Path) -> None:
    first = learner.learn("any", folder, config=HEAD_ONLY)
    probe = learner.registry.goldens("any")[0]
    learner.registry.retire("any", "it was wrong")
    message = r"'any:1' is the same task and was retired \(it was wrong\)\. To reactivate it, .* --new-version"
    with pytest.raises(RetiredError, match=message):
        learner.learn("any", folder, config=HEAD_ONLY)
    with pytest.raises(RetiredError, match=message):
        learner.registry.register(first, probe)
    (outcome,) = learn_many(learner, [LearnRow("any", folder, None, HEAD_ONLY)])
    assert outcome.state == "failed"
    with pytest.raises(NameTakenError):
        learner.learn("any", folder, config=LearnConfig(head_only=True, seed=1))
    revived = learner.learn("any", folder, config=HEAD_ONLY, new_version=True)
    assert (revived.ref, revived.sha256) == ("any:2", first.sha256)
    assert learner.learn("any", folder, config=HEAD_ONLY).ref == "any:2"
    assert learner.registry.register(first, probe).ref == "any:2"
    assert learner.registry.check_integrity().ok


@pytest.mark.parametrize("name", ["auto", "combined", "features", "none"])
def test_reserved_words_cannot_name_a_task(learner: Learner, folder: Path, run: Run, name: str) -> None:
    with pytest.raises(RegistryError, match=f"The name '{name}' is reserved"):
        learner.learn(name, folder, config=HEAD_ONLY)
    assert f"The name '{name}' is reserved" in run("learn", name, folder, *LEARN).err
    task = learner.learn("any", folder, config=HEAD_ONLY)
    renamed = replace(task, name=name, version=None)
    with pytest.raises(RegistryError, match=f"The name '{name}' is reserved"):
        learner.registry.register(renamed, learner.registry.goldens("any")[0])


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


# --- further cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("seg_train", "seg_test"), ("asl_alphabet_train", "asl_alphabet_test"), ("images_train", "images_test"),
        ("DATASET_TRAIN", "DATASET_TEST"), ("Train (1)", "Test (1)"), ("01_train", "02_test"), ("train1", "test1"),
        ("trainImages", "testImages"), ("train-20240101T120000Z-001", "test-20240101T120000Z-001"),
        ("训练集", "测试集"),
    ],
)  # fmt: skip
def test_splits_are_recognised_by_a_word_of_their_name(tmp_path: Path, train: str, test: str) -> None:
    images, test_images = open_parts(with_splits(tmp_path / "scans", train, test))
    assert (images.labels, test_images is None) == (("blue", "red"), False)


def test_splits_nested_by_an_archive_are_unwrapped(tmp_path: Path) -> None:
    for split in ("seg_train", "seg_test"):
        colour_folder(tmp_path / "data" / split / split, per_class=4, classes=TWO)
    (tmp_path / "data" / "seg_pred").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "seg_pred" / "1.png")
    images, test_images = open_parts(tmp_path / "data")
    assert (images.labels, len(images), test_images is None) == (("blue", "red"), 8, False)
    assert "1 folder beside the splits (seg_pred)" in images.remarks


def test_folders_with_the_same_subfolders_are_not_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"each of its folders has the same subfolders: blue/, red/\. If these are"):
        open_images(with_splits(tmp_path / "data", "fold1", "fold2"))


def test_a_class_named_train_with_subfolders_is_not_taken_for_a_split(tmp_path: Path) -> None:
    for name, kinds in (("bus", ("city", "coach")), ("train", ("steam", "diesel"))):
        colour_folder(tmp_path / "vehicles" / name, classes=kinds)
    with pytest.raises(DataError, match=r"contains train/, which holds class folders, and bus/, which holds images"):
        open_images(tmp_path / "vehicles")


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


class Named(list):  # type: ignore[type-arg]
    """Four items of two classes, with the given attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__((Image.new("RGB", (40, 40), (60 * i, 0, 0)), i % 2) for i in range(4))
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("attributes", "labels"),
    [
        ({"classes": {"b": 1, "a": 0}}, ("a", "b")),
        ({"classes": {0: "cat", 1: "dog"}}, ("cat", "dog")),
        ({"class_to_idx": {"b": 1, "a": 0}}, ("a", "b")),
        ({"classes": np.array(["a", "b"])}, ("a", "b")),
        ({"classes": torch.tensor([7, 9])}, ("7", "9")),
        ({"classes": [b"a", b"b"]}, ("a", "b")),
        ({"classes": [("tench", "Tinca"), ("shark",)]}, ("tench, Tinca", "shark")),
        ({"classes": 10}, ("0", "1")),
        ({"classes": []}, ("0", "1")),
        ({"targets": lambda: None}, ("0", "1")),
    ],
)
def test_class_names_may_have_many_forms(attributes: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert open_images(Named(**attributes)).labels == labels


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Named(classes={"a", "b"}), "are a set, which has no order"),
        (Named(classes={"a": 1, "b": 2}), "are not numbered from 0 without gaps"),
        (Named(classes=["a", "b"], class_to_idx={"a": 1, "b": 0}), "in one order in `classes` and in another"),
        (Subset(Named(targets=[0, 1, 0, 1]), range(9)), "is not valid: "),
        (Subset(Named(targets=[0, 1, 0, 1]), cast(Any, ["x"])), "is not valid: "),
        (
            [(Image.new("RGB", (8, 8)), 20_240_115 + i) for i in range(4)],
            "targets up to 20,240,118; targets must be class indices",
        ),
        (iter([1]), "is not a dataset"),
        (Named, "is not a dataset"),
        (None, "is not a dataset"),
    ],
)
def test_invalid_datasets_are_refused_with_one_line(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_images(data)


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


def test_test_images_may_lack_a_class(learner: Learner, tmp_path: Path) -> None:
    data = with_splits(tmp_path / "data", "train", "test")
    for path in (data / "test" / "red").iterdir():
        path.unlink()
    (data / "test" / "red").rmdir()
    metrics = learner.learn("any", data, config=HEAD_ONLY).metrics["test"]
    assert metrics["num_images"] == 4
    assert metrics["per_class"]["red"] is None
    assert learner.evaluate("any", data).metrics["per_class"]["red"] is None


def test_test_images_with_a_bad_one_are_evaluated_once_and_it_is_reported(tmp_path: Path, run: Run) -> None:
    data = with_splits(tmp_path / "data", "train", "other")
    (data / "other" / "red" / "junk.png").write_bytes(b"junk")
    run("learn", "any", data / "train", *LEARN, "--test", data / "train")
    words = ("learn", "any", data / "train", *LEARN, "--test", data / "other", "--skip-bad")
    first, second = (json.loads(run(*words, "--json").out) for _ in range(2))
    assert first == second
    assert len(first["test"]["skipped"]) == 1
    assert "skipped: " in run(*words).out
    with Registry.open(tmp_path / "tasks.db") as registry:
        assert len(registry.evaluations("any")) == 2


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
