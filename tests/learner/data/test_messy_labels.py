"""Messy labels and datasets: understood in every common form, or refused with a clear error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, random_split
from torchvision.datasets import ImageFolder

from addenda import CombinedModel, FrozenBackbone, LearnConfig, Learner
from addenda.exceptions import DataError
from addenda.learner.data import open_images
from tests.support.commands import Run
from tests.support.images import colour_folder
from tests.support.messy import HEAD_ONLY, LEARN, Pictures, with_splits

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


@pytest.mark.slow
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


def test_outer_spaces_are_no_part_of_a_class_name_in_folders_and_listings(folder: Path) -> None:
    (folder / "red").rename(folder / "red ")
    (folder / "rows.csv").write_text("path,label\nred /0.png,red \nblue/0.png,blue\n")
    assert open_images(folder).labels == open_images(folder / "rows.csv").labels == ("blue", "red")


@pytest.mark.parametrize(("first", "second"), [("Rot", "rot"), ("1", "1.0"), ("STRASSE", "straße")])
def test_classes_that_are_probably_one_are_named(
    learner: Learner, folder: Path, caplog: pytest.LogCaptureFixture, first: str, second: str
) -> None:
    (folder / "blue").rename(folder / first)
    (folder / "red").rename(folder / second)
    learner.learn("any", folder, config=HEAD_ONLY)
    assert f"{first!r} and {second!r} are learned as two classes. If they are one, give them one name." in caplog.text


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


def test_test_images_may_lack_a_class(learner: Learner, tmp_path: Path) -> None:
    data = with_splits(tmp_path / "data", "train", "test")
    for path in (data / "test" / "red").iterdir():
        path.unlink()
    (data / "test" / "red").rmdir()
    metrics = learner.learn("any", data, config=HEAD_ONLY).metrics["test"]
    assert metrics["num_images"] == 4
    assert metrics["per_class"]["red"] is None
    assert learner.evaluate("any", data).metrics["per_class"]["red"] is None
