"""What people's folders and datasets look like: what is asked of them is done, or refused in one line."""

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

from addenda import FrozenBackbone, LearnConfig, Learner, Registry, load_backbone
from addenda.backbones import read_image
from addenda.exceptions import BackboneError, DataError, NameTakenError, RegistryError, RetiredError, UnsteadyError
from addenda.learner import LearnRow, learn_many
from addenda.learner.data import open_images, open_parts
from addenda.learner.data.folders import part_named
from addenda.learner.data.labelled import LabelledImages
from addenda.learner.data.listings import open_listing
from addenda.learner.data.torch_datasets import Items
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


def divided(place: Path, *parts: str, classes: tuple[str, ...] = TWO) -> Path:
    for seed, part in enumerate(parts):
        colour_folder(place / part, per_class=4, classes=classes, seed=seed)
    return place


# --- which folders are parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"), ("Train", "Test"), ("TRAIN", "TEST"), ("Training", "Testing"), ("training_set", "test_set"),
        ("train-images", "testset"), ("train2017", "test2017"), ("trn", "tst"),
    ],
)  # fmt: skip
def test_folders_named_as_parts_are_parts_in_any_case(tmp_path: Path, train: str, test: str) -> None:
    images, scored = open_parts(divided(tmp_path / "scans", train, test))
    assert images.labels == ("blue", "red")
    assert scored is not None
    assert f"{test}{os.sep}" in str(scored.items[0])
    assert f"{train}{os.sep}" in str(images.items[0])


def test_parts_without_one_to_learn_from_are_refused_with_the_way_out(tmp_path: Path) -> None:
    place = divided(tmp_path / "parts", "val", "test")
    with pytest.raises(DataError, match=r"has test/ and val/ in it and no train/\. Give the part to use by its own"):
        open_parts(place)
    assert len(open_images(place, "test")) == 8  # what `evaluate` asks for is there
    assert len(open_images(place / "val")) == 8


def test_a_validation_folder_is_named_and_so_is_what_else_lies_beside_the_parts(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    place = divided(tmp_path / "parts", "train", "Validation", "unsup")
    assert open_parts(place)[1] is None
    result = run("learn", "any", place, *LEARN)
    assert result.code == 0
    assert "1 validation folder, because Addenda draws its own validation split from train (Validation)" in result.err
    assert "1 folder beside the splits (unsup)" in result.err
    assert json.loads(run("learn", "any", place, *LEARN, "--json").out)["left_out"] == {
        "beside_parts": 1, "validation": 1,
    }  # fmt: skip


def test_classes_may_be_called_as_parts_are(tmp_path: Path) -> None:
    place = colour_folder(tmp_path / "vehicles", classes=("bus", "train", "test"))
    assert open_images(place).labels == ("bus", "test", "train")


@pytest.mark.parametrize(
    ("parts", "classes", "said"),
    [
        (("train", "Train"), (), r"has both \w+/ and \w+/ in it"),
        (("test",), ("cat", "dog"), r"has test/ in it, which holds class folders, and cat/ beside it, which holds ima"),
        ((), ("train", "test"), r"has test/ and train/ in it, which are named as parts and hold no class folders"),
    ],
)
def test_what_may_be_a_part_or_a_class_is_refused(
    tmp_path: Path, parts: tuple[str, ...], classes: tuple[str, ...], said: str
) -> None:
    place = divided(tmp_path / "data", *parts)
    if classes:
        colour_folder(place, classes=classes)
    with pytest.raises(DataError, match=said):
        open_images(place)


def test_nothing_deeper_is_flattened_without_a_word(tmp_path: Path) -> None:
    place = tmp_path / "animals"
    colour_folder(place / "pets", classes=("cat", "dog"))
    colour_folder(place / "wild", classes=("lynx", "wolf"))
    images = open_images(place)
    assert images.labels == ("pets", "wild")
    assert "folders inside class folders count as their class's (pets/cat, pets/dog, wild/lynx, …)" in images.remarks
    with pytest.raises(DataError, match=r"has one folder, animals/, and its images lie in folders inside that"):
        open_images(tmp_path)


def test_a_listing_says_train_and_test_in_any_case(folder: Path) -> None:
    lines = [f"{path},{path.parent.name},{'Training' if path.stem < '2' else 'TEST'}" for path in folder.rglob("*.png")]
    (folder / "all.csv").write_text("\n".join(["path,label,split", *lines]))
    assert len(open_listing(folder / "all.csv", "train")) == len(open_listing(folder / "all.csv", "test")) == 4


def test_parts_have_names_and_classes_others() -> None:
    assert {name: part_named(name) for name in ("Val", "DEV", "validation_set", "Test images")} == {
        "Val": "validation", "DEV": "validation", "validation_set": "validation", "Test images": "test",
    }  # fmt: skip
    others = ("trainer", "testes", "contest", "device", "valley", "")
    assert {part_named(name) for name in others} == {None}


# --- which files are images -------------------------------------------------------------------------------------------


def test_every_file_that_pillow_reads_counts_and_what_does_not_is_said(folder: Path, run: Run) -> None:
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
    made = json.loads(learned.out)
    assert made["left_out"] == {"not_images": 3, "beside_classes": 1}
    assert "3 files that Pillow does not read as images (readme.md, blue/labels.csv, red/notes.txt)" in learned.err
    found = run("predict", folder / "red", folder / "blue", "--json")
    assert len(json.loads(found.out)["images"]) == 16
    assert json.loads(found.out)["left_out"] == {"not_images": 2}
    assert "left out of" in found.err
    scored = json.loads(run("evaluate", "any", folder, "--json").out)["metrics"]
    assert (scored["num_images"], scored["left_out"]) == (16, {"not_images": 3, "beside_classes": 1})


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", ".AppleDouble"])
def test_what_systems_put_into_folders_is_no_picture_and_no_class(folder: Path, name: str) -> None:
    for place in (folder, folder / "red", folder / "red" / "deeper"):
        (place / name / "0.png").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / name / "copy.png")
    Image.new("RGB", (8, 8)).save(folder / "blue" / "._0.png")
    (folder / "blue" / "Thumbs.db").write_bytes(b"\xd0\xcf")
    images = open_images(folder)
    assert images.labels == ("blue", "red")
    assert images.counts == [4, 4]
    assert {kind: len(paths) for kind, paths in images.left_out.items()} == {"hidden": 5}


def test_links_to_files_are_followed_and_links_to_folders_said(folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "linked.png").symlink_to(folder / "blue" / "0.png")
    (folder / "red" / "more").symlink_to(folder / "blue")
    (folder / "red" / "round").symlink_to(folder)
    images = open_images(folder)
    assert images.counts == [4, 5]
    assert list(map(len, images.left_out.values())) == [2]
    assert "2 links to folders (red/more, red/round)" in images.remarks


def test_a_pipe_named_as_a_picture_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "red" / "pipe.png")
    assert len(open_images(folder)) == 8


# --- bad ones ---------------------------------------------------------------------------------------------------------


def spoil(folder: Path) -> int:
    """Makes pictures in a folder bad in every way there is; gives how many there are then."""
    (folder / "gone.png").symlink_to(".git/annex/nothing")
    (folder / "folder.png").mkdir()
    (folder / "junk.png").write_bytes(b"junk")
    (folder / "empty.jpg").write_bytes(b"")
    whole = (folder / "0.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    return 5


@pytest.mark.parametrize("part", ["train", "test"])
def test_bad_pictures_are_refused_before_training_or_left_out_and_counted(
    tmp_path: Path, run: Run, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = divided(tmp_path / "data", "train", "test")
    bad = spoil(place / part / "red")
    with monkeypatch.context() as broken:
        broken.setattr("addenda.learner.learner.LearningRun", lambda *_: pytest.fail("it was trained first"))
        refused = run("learn", "any", place, *LEARN)
    assert refused.code == 2
    assert f"{bad} of 13 images in {str(place / part)!r} cannot be read" in refused.err
    made = json.loads(run("learn", "any", place, *LEARN, "--skip-bad", "--json").out)
    skipped = {"train": made["skipped"], "test": made["test"]["skipped"]}
    assert len(skipped.pop(part)) == bad
    assert list(skipped.values()) == [[]]
    assert made["metrics"]["test"]["num_images"] == 8
    said = run("learn", "other", place, *LEARN, "--skip-bad").out
    assert said.count("left out: ") == bad
    scored = run("evaluate", "any", place / part, "--skip-bad", "--json")
    assert json.loads(scored.out)["metrics"]["skipped"] == bad
    assert f"({bad} left out)" in run("evaluate", "any", place / part, "--skip-bad").out


class Pictures:
    """A dataset whose third item cannot be had."""

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
def test_an_item_that_raises_is_named_or_left_out(learner: Learner, error: Exception, targets: bool) -> None:
    with pytest.raises(DataError, match=r"1 of 12 images .*\n  Item 2 of the Pictures given cannot be had: "):
        learner.learn("any", Pictures(error, targets), config=HEAD_ONLY)
    task = learner.learn("any", Pictures(error, targets), config=HEAD_ONLY, skip_bad=True)
    assert (task.data["num_images"], len(task.data["skipped"])) == (11, 1)
    assert learner.evaluate("any", Pictures(error, targets), skip_bad=True).metrics["skipped"] == 1


def test_a_dataset_all_of_whose_items_raise_says_why(learner: Learner) -> None:
    class Broken(Pictures):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            raise self.error

    for targets in (True, False):
        with pytest.raises(DataError, match="an old format"):
            learner.learn("any", Broken(RuntimeError("an old format"), targets), config=HEAD_ONLY, skip_bad=True)


def test_an_item_that_is_no_pair_is_named() -> None:
    with pytest.raises(DataError, match=r"Item 0 of it is dict, not an image and its target"):
        Items([{"image": 1}], "it")[0]


# --- labels and their names -------------------------------------------------------------------------------------------


def test_labels_are_what_items_say_or_nothing_is_learned(learner: Learner, folder: Path) -> None:
    def turned(y: int) -> int:
        return 1 - y

    def merged(y: int) -> int:
        return 0

    for change in (turned, merged):
        data = ImageFolder(str(folder), target_transform=change)
        for skip_bad in (False, True):
            with pytest.raises(DataError, match=r"Item \d of the ImageFolder given has the target \d, where the data"):
                learner.learn("any", data, config=HEAD_ONLY, skip_bad=skip_bad)
    kept = ImageFolder(str(folder), target_transform=lambda y: y)
    assert learner.learn("any", kept, config=HEAD_ONLY).labels == ("blue", "red")


def test_one_item_that_says_otherwise_is_found_wherever_it_is(learner: Learner) -> None:
    class Wrong(Pictures):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return super().__getitem__(index)[0], 1 if index == 10 else index % 2

    data = Wrong(OSError(), True)
    with pytest.raises(DataError, match=r"Item 9 .* has the target 1, where the dataset's `targets` say 0"):
        learner.learn("any", Subset(data, [i for i in range(12) if i != 2]), config=HEAD_ONLY)


def test_targets_of_another_length_are_refused() -> None:
    data = Pictures(OSError(), True)
    data.targets = [0, 1]
    with pytest.raises(DataError, match="has 12 items and 2 targets"):
        open_images(data)


@pytest.mark.parametrize("target", [0.5, "cat", None, float("nan"), [1, 2.5]])
def test_a_target_that_is_no_whole_number_is_refused(target: object) -> None:
    with pytest.raises(DataError, match="target"):
        open_images([(Image.new("RGB", (8, 8)), target)] * 4)


def test_class_names_pass_through_subsets_and_joined_datasets(
    learner: Learner, folder: Path, tiny: FrozenBackbone
) -> None:
    for transform in (None, tiny.transform):
        data = ImageFolder(str(folder), transform=transform)
        part, rest = random_split(data, [6, 2], generator=torch.Generator().manual_seed(0))
        for one in (part, Subset(part, range(6)), ConcatDataset([data, data]), ConcatDataset([part, rest])):
            assert open_images(one).labels == ("blue", "red")
    name = "whole"
    assert learner.learn(name, part, test=data, config=HEAD_ONLY).metrics["test"]["num_images"] == 8


def test_joined_datasets_of_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    others = colour_folder(tmp_path / "others", classes=("cat", "dog"))
    for transform in (None, lambda image: image):
        data = ConcatDataset([ImageFolder(str(one), transform=transform) for one in (folder, others)])
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
    assert "has a name that is not UTF-8, 'caf\\udce9': rename it" in refused.err


# --- one class, one image ---------------------------------------------------------------------------------------------


def test_a_class_alone_can_be_learned_and_is_every_answer(
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
    choices = Router({name: one for name, one in known.items() if one is not None})
    images = open_images(tmp_path / "one").read_all(learner.backbone)
    pooled = CombinedModel(learner.backbone, [task])(images, pooled=True).pooled
    assert pooled is not None
    assert [choice.task for choice in choices.choose(pooled)].count("red") >= 6


def test_one_image_of_a_class_is_refused_by_its_name(learner: Learner, folder: Path) -> None:
    for number in range(1, 4):
        (folder / "red" / f"{number}.png").unlink()
    with pytest.raises(DataError, match=r"Class 'red' in .* has 1 image: each class needs two"):
        learner.learn("any", folder, config=HEAD_ONLY)


# --- asked again ------------------------------------------------------------------------------------------------------


def test_another_test_set_is_scored_though_the_task_was_learned_before(tmp_path: Path, run: Run) -> None:
    place = divided(tmp_path / "data", "train", "test", "other")
    train, test, other = (place / part for part in ("train", "test", "other"))
    for red, blue in zip((other / "red").iterdir(), (other / "blue").iterdir(), strict=True):
        held = red.read_bytes()
        red.write_bytes(blue.read_bytes())
        blue.write_bytes(held)
    before = run("learn", "any", train, *LEARN, "--test", test, "--json")
    again = run("learn", "any", train, *LEARN, "--test", other)
    assert "was learned before from these images with these settings; it was scored on this test set now" in again.out
    scored = json.loads(run("evaluate", "any", other, "--json").out)["metrics"]["accuracy"]
    asked = json.loads(run("learn", "any", train, *LEARN, "--test", other, "--json").out)
    assert asked["metrics"]["test"]["accuracy"] == scored
    assert asked["metrics"]["test"]["confusion"] != json.loads(before.out)["metrics"]["test"]["confusion"]
    assert not any("test" in asked["metrics"][probe] for probe in ("linear_probe", "layer_probe"))
    assert asked["already"]
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
    assert (row["state"], row["metrics"]["test"]["accuracy"]) == ("learned before", scored)


def test_a_test_part_that_came_later_is_scored(learner: Learner, tmp_path: Path) -> None:
    place = divided(tmp_path / "data", "train")
    assert "test" not in learner.learn("any", place, config=HEAD_ONLY).metrics
    divided(place, "test")
    task = learner.learn("any", place, config=HEAD_ONLY)
    assert task.metrics["test"]["num_images"] == 8
    assert task.sha256 == learner.registry.get("any").sha256
    assert len(learner.registry.evaluations("any")) == 1


def test_a_retired_version_is_no_answer_and_comes_back_as_a_new_one(learner: Learner, folder: Path) -> None:
    first = learner.learn("any", folder, config=HEAD_ONLY)
    probe = learner.registry.goldens("any")[0]
    learner.registry.retire("any", "it was wrong")
    said = r"'any:1' is the same task, and it was retired \(it was wrong\)\. To have it active again, .* --new-version"
    with pytest.raises(RetiredError, match=said):
        learner.learn("any", folder, config=HEAD_ONLY)
    with pytest.raises(RetiredError, match=said):
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


@pytest.mark.parametrize("name", ["auto", "combined", "none"])
def test_words_that_mean_something_else_are_no_names_for_tasks(
    learner: Learner, folder: Path, run: Run, name: str
) -> None:
    with pytest.raises(RegistryError, match=f"The name '{name}' is reserved"):
        learner.learn(name, folder, config=HEAD_ONLY)
    assert f"The name '{name}' is reserved" in run("learn", name, folder, *LEARN).err
    task = learner.learn("any", folder, config=HEAD_ONLY)
    renamed = replace(task, name=name, version=None)
    with pytest.raises(RegistryError, match=f"The name '{name}' is reserved"):
        learner.registry.register(renamed, learner.registry.goldens("any")[0])


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_no_number_is_named_or_left_out(learner: Learner, value: float) -> None:
    images = torch.randn(8, 3, 32, 32)
    images[3, 0, 0, 0] = value
    data = TensorDataset(images, torch.arange(8) % 2)
    with pytest.raises(DataError, match=r"Item 3 of the TensorDataset given holds NaN or infinity"):
        learner.learn("any", data, config=HEAD_ONLY)
    task = learner.learn("any", data, config=HEAD_ONLY, skip_bad=True)
    assert len(task.data["skipped"]) == 1


def test_numbers_that_no_backbone_can_take_are_told_by_their_item(learner: Learner) -> None:
    images = torch.randn(8, 3, 32, 32)
    images[5] = 3e38
    with pytest.raises(DataError, match=r"Item 5 of .* has a backbone feature with NaN or infinity"):
        learner.learn("any", TensorDataset(images, torch.arange(8) % 2), config=HEAD_ONLY)


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(BackboneError, match=r"Weight 'norm.weight' of backbone 'tiny' \(there\) holds NaN or infinity"):
        FrozenBackbone(model, "tiny", "there")
    assert load_backbone("glyphs", device="cpu").fingerprint


# --- what stands beside the pixels ------------------------------------------------------------------------------------


def add_texts(info: PngImagePlugin.PngInfo, kind: str) -> None:
    long = "a" * 2_000_000
    if kind == "zTXt":
        info.add_text("parameters", long, zip=True)
    elif kind == "iTXt":
        info.add_itxt("prompt", long, zip=True)
    for number in range(80 if kind == "many" else 0):
        info.add_text(f"key {number}", long[:900_000], zip=True)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "many"])
def test_a_picture_is_read_whatever_texts_it_carries(tmp_path: Path, kind: str) -> None:
    picture = Image.new("RGB", (9, 7), (10, 200, 30))
    picture.putpixel((0, 0), (255, 0, 0))
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    add_texts(info, kind)
    profile = b"x" * 2_000_000 if kind == "iCCP" else None
    picture.save(tmp_path / "a.png", pnginfo=info, exif=exif, icc_profile=profile)
    found = read_image(tmp_path / "a.png")
    assert found.size == (7, 9)  # upright still
    assert found.getpixel((6, 0)) == (255, 0, 0)
    half = (tmp_path / "a.png").read_bytes()[:-100]
    (tmp_path / "half.png").write_bytes(half)
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path / "half.png")


def test_hidden_files_alone_are_no_warning(folder: Path, learner: Learner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "addenda")
    (folder / "red" / ".DS_Store").write_bytes(b"\0")
    task = learner.learn("any", folder, config=HEAD_ONLY)
    assert task.data["left_out"] == {"hidden": 1}
    said = [record for record in caplog.records if "left out" in record.message]
    assert [record.levelno for record in said] == [logging.INFO]


# --- what a sceptic found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("seg_train", "seg_test"), ("asl_alphabet_train", "asl_alphabet_test"), ("images_train", "images_test"),
        ("DATASET_TRAIN", "DATASET_TEST"), ("Train (1)", "Test (1)"), ("01_train", "02_test"), ("train1", "test1"),
        ("trainImages", "testImages"), ("train-20240101T120000Z-001", "test-20240101T120000Z-001"),
        ("训练集", "测试集"),
    ],
)  # fmt: skip
def test_parts_are_known_by_a_word_of_their_name(tmp_path: Path, train: str, test: str) -> None:
    images, scored = open_parts(divided(tmp_path / "scans", train, test))
    assert (images.labels, scored is None) == (("blue", "red"), False)


def test_parts_that_an_archive_wrapped_twice_are_unwrapped(tmp_path: Path) -> None:
    for part in ("seg_train", "seg_test"):
        colour_folder(tmp_path / "data" / part / part, per_class=4, classes=TWO)
    (tmp_path / "data" / "seg_pred").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "seg_pred" / "1.png")
    images, scored = open_parts(tmp_path / "data")
    assert (images.labels, len(images), scored is None) == (("blue", "red"), 8, False)
    assert "1 folder beside the splits (seg_pred)" in images.remarks


def test_folders_that_all_hold_the_same_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"each of its folders holds the same: blue/, red/\. Are those the classes"):
        open_images(divided(tmp_path / "data", "fold1", "fold2"))


def test_a_class_called_train_with_folders_of_its_own_is_not_the_whole(tmp_path: Path) -> None:
    for name, kinds in (("bus", ("city", "coach")), ("train", ("steam", "diesel"))):
        colour_folder(tmp_path / "vehicles" / name, classes=kinds)
    with pytest.raises(DataError, match=r"has train/ in it, which holds class folders, and bus/ beside it"):
        open_images(tmp_path / "vehicles")


@pytest.mark.parametrize("how", ["gone", "changed", "random"])
def test_what_changes_while_it_is_read_is_refused_and_never_left_out(
    learner: Learner, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = colour_folder(tmp_path / "new", per_class=4, classes=TWO, seed=1000 + len(how))  # of which nothing is kept
    data: Any = folder
    if how == "random":
        noise = torch.Generator().manual_seed(0)
        data = ImageFolder(
            str(folder), transform=lambda image: learner.backbone.transform(image) + torch.rand(1, generator=noise)
        )
    else:
        opened = LabelledImages.hashed

        def hashed(images: LabelledImages) -> LabelledImages:
            found = opened(images)
            path = folder / "red" / "2.png"
            path.unlink() if how == "gone" else path.write_bytes((folder / "red" / "0.png").read_bytes())
            return found

        monkeypatch.setattr(LabelledImages, "hashed", hashed)
    with pytest.raises(UnsteadyError, match=r"It could be read when this run began|changed while it was being read"):
        learner.learn("any", data, config=HEAD_ONLY, skip_bad=True)
    assert learner.registry.tasks() == []


def test_a_run_that_left_images_out_is_no_answer_to_one_that_may_not(learner: Learner, folder: Path) -> None:
    (folder / "red" / "junk.png").write_bytes(b"junk")
    task = learner.learn("any", folder, config=HEAD_ONLY, skip_bad=True)
    assert learner.learn("any", folder, config=HEAD_ONLY, skip_bad=True).ref == task.ref
    with pytest.raises(DataError, match=r"1 of 9 images .*\n.*junk"):
        learner.learn("any", folder, config=HEAD_ONLY)


class Named(list):  # type: ignore[type-arg]
    """Four items of two classes, and what a dataset may say of their names."""

    def __init__(self, **said: Any) -> None:
        super().__init__((Image.new("RGB", (40, 40), (60 * i, 0, 0)), i % 2) for i in range(4))
        vars(self).update(said)


@pytest.mark.parametrize(
    ("said", "labels"),
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
def test_names_of_classes_come_in_many_forms(said: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert open_images(Named(**said)).labels == labels


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Named(classes={"a", "b"}), "are a set, which has no order"),
        (Named(classes={"a": 1, "b": 2}), "are not numbered from 0 without a gap"),
        (Named(classes=["a", "b"], class_to_idx={"a": 1, "b": 0}), "in one order in `classes` and in another"),
        (Subset(Named(targets=[0, 1, 0, 1]), range(9)), "cannot be looked into"),
        (Subset(Named(targets=[0, 1, 0, 1]), cast(Any, ["x"])), "cannot be looked into"),
        ([(Image.new("RGB", (8, 8)), 20_240_115 + i) for i in range(4)], "targets up to 20,240,118: they are"),
        (iter([1]), "is no dataset"),
        (Named, "is no dataset"),
        (None, "is no dataset"),
    ],
)
def test_what_is_no_dataset_is_told_in_a_line(data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_images(data)


def test_a_link_to_itself_stops_nothing_else(folder: Path, run: Run) -> None:
    (folder / "red" / "self.png").symlink_to("self.png")
    (folder / "red" / "self").symlink_to("self")
    assert run("learn", "any", folder, *LEARN).code == 2
    assert run("learn", "any", folder, *LEARN, "--skip-bad").code == 0
    found = run("predict", folder, "--skip-bad", "--json")
    assert len(json.loads(found.out)["images"]) == 8
    assert run("predict", "x" * 300, "--skip-bad").code == 0


def test_a_listing_leaves_out_what_is_not_there_when_asked(folder: Path, run: Run) -> None:
    lines = [f"{path},{path.parent.name}" for path in folder.rglob("*.png")]
    (folder / "all.csv").write_text("\n".join(["path,label", *lines, "red/gone.png,red"]))
    refused = run("learn", "any", folder / "all.csv", *LEARN)
    assert "1 of 9 images in" in refused.err
    assert "line 10: there is no file" in refused.err
    made = json.loads(run("learn", "any", folder / "all.csv", *LEARN, "--skip-bad", "--json").out)
    assert len(made["skipped"]) == 1


def test_a_test_set_that_lacks_a_class_is_scored_without_it(learner: Learner, tmp_path: Path) -> None:
    place = divided(tmp_path / "data", "train", "test")
    for path in (place / "test" / "red").iterdir():
        path.unlink()
    (place / "test" / "red").rmdir()
    scores = learner.learn("any", place, config=HEAD_ONLY).metrics["test"]
    assert scores["num_images"] == 4
    assert scores["per_class"]["red"] is None
    assert learner.evaluate("any", place).metrics["per_class"]["red"] is None


def test_a_bad_test_set_is_scored_once_and_its_own_is_said(tmp_path: Path, run: Run) -> None:
    place = divided(tmp_path / "data", "train", "other")
    (place / "other" / "red" / "junk.png").write_bytes(b"junk")
    run("learn", "any", place / "train", *LEARN, "--test", place / "train")
    words = ("learn", "any", place / "train", *LEARN, "--test", place / "other", "--skip-bad")
    first, second = (json.loads(run(*words, "--json").out) for _ in range(2))
    assert first == second
    assert len(first["test"]["skipped"]) == 1
    assert "left out: " in run(*words).out
    with Registry.open(tmp_path / "tasks.db") as registry:
        assert len(registry.evaluations("any")) == 2


def test_the_same_bad_file_twice_in_a_test_set_is_no_traceback(learner: Learner, folder: Path, tmp_path: Path) -> None:
    learner.learn("any", folder, config=HEAD_ONLY)
    bad = colour_folder(tmp_path / "bad", per_class=1, classes=TWO)
    for path in bad.rglob("*.png"):
        path.write_bytes(b"junk")
    data = ImageFolder(str(bad))
    with pytest.raises(DataError, match=r"4 images in .* cannot be read"):
        learner.evaluate("any", ConcatDataset([data, data]), skip_bad=True)


def test_the_traceback_of_a_system_error_is_had_for_the_asking(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registry, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert run("tasks", "list").err == "Error: [Errno 5] Input/output error.\n"
    with pytest.raises(OSError, match="Input/output"):
        run("tasks", "list", "--traceback")
