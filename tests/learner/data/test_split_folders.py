"""Which folders are splits, by the names that people and archives give them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from addenda.exceptions import DataError
from addenda.learner.data import open_images, open_parts
from addenda.learner.data.listings import open_listing, split_named
from addenda.learner.data.openers import Split
from tests.support.commands import Run
from tests.support.images import colour_folder
from tests.support.messy import LEARN, TWO, with_splits

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


@pytest.mark.slow
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
