"""What the learner says about images that it cannot learn from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.exceptions import DataError
from addenda.learner.data import LabelledImages, check_same_labels, open_images
from tests.images import colour_folder

QUICK = LearnConfig(epochs=1, learning_rate=(0.1,))


@pytest.fixture
def learner(tiny: FrozenBackbone, registry: Registry) -> Learner:
    return Learner(tiny, registry)


def refused(learner: Learner, train: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        learner.learn("colours", train, config=QUICK, **options)
    assert learner.registry.tasks(include_retired=True) == []
    return str(caught.value)


def test_a_missing_folder_is_named(learner: Learner, tmp_path: Path) -> None:
    assert "There is no folder" in refused(learner, tmp_path / "nowhere")


def test_an_empty_folder_is_told_how_a_data_set_looks(learner: Learner, tmp_path: Path) -> None:
    message = refused(learner, tmp_path)
    assert "no class folders" in message
    assert "no image was found" in message
    assert f"{tmp_path.name}/cat/1.jpg" in message


def test_images_side_by_side_are_told_apart_from_none(learner: Learner, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "its images lie side by side" in refused(learner, tmp_path)


def test_one_class_is_too_few(learner: Learner, tmp_path: Path) -> None:
    assert "has one class ('red')" in refused(learner, colour_folder(tmp_path, classes=("red",)))


def test_a_class_with_one_image_is_named(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    for number in range(1, 8):
        (folder / "green" / f"{number}.png").unlink()
    message = refused(learner, folder)
    assert "Class 'green'" in message
    assert "has 1 image:" in message


def test_an_empty_class_folder_is_named(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    (folder / "violet").mkdir()
    assert "Class folder 'violet'" in refused(learner, folder)


def test_unreadable_images_are_all_named_and_counted(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    (folder / "red" / "0.png").write_bytes(b"no image")
    whole = (folder / "blue" / "3.png").read_bytes()
    (folder / "blue" / "3.png").write_bytes(whole[: len(whole) // 2])
    message = refused(learner, folder)
    assert "2 of 24 images" in message
    assert str(folder / "red" / "0.png") in message
    assert str(folder / "blue" / "3.png") in message
    assert "--skip-bad" in message


def test_unreadable_images_are_left_out_only_when_asked(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    (folder / "red" / "0.png").write_bytes(b"no image")
    task = learner.learn("colours", folder, config=QUICK, skip_bad=True)
    assert task.data["num_images"] == 23
    assert len(task.data["skipped"]) == 1
    assert str(folder / "red" / "0.png") in task.data["skipped"][0]


def test_a_class_that_loses_its_images_as_bad_ones_is_named(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data", per_class=3)
    for number in range(2):
        (folder / "red" / f"{number}.png").write_bytes(b"no image")
    message = refused(learner, folder, skip_bad=True)
    assert "Class 'red'" in message
    assert "has 1 image:" in message


def test_a_folder_of_nothing_but_bad_images_is_refused_even_so(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data", per_class=2)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    assert "6 of 6 images" in refused(learner, folder, skip_bad=True)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(6, 1, 32, 32), "[1, 32, 32]"),
        (torch.zeros(6, 3, 16, 32), "[3, 16, 32]"),
        (torch.zeros(6, 3, 32, 32, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_tensors_of_the_wrong_channels_size_or_type_are_refused(
    learner: Learner, images: torch.Tensor, found: str
) -> None:
    message = refused(learner, TensorDataset(images, torch.tensor([0, 0, 0, 1, 1, 1])))
    assert found in message
    assert "[3, 32, 32]" in message


def test_an_empty_dataset_is_refused(learner: Learner) -> None:
    assert "is empty" in refused(learner, TensorDataset(torch.zeros(0, 3, 32, 32), torch.zeros(0)))


def test_targets_must_be_whole_numbers_within_the_classes(learner: Learner) -> None:
    images = torch.zeros(4, 3, 32, 32)
    assert "targets from -1" in refused(learner, TensorDataset(images, torch.tensor([-1, 0, 0, 1])))


def test_train_and_test_must_have_the_same_classes(learner: Learner, tmp_path: Path) -> None:
    train = colour_folder(tmp_path / "train")
    test = colour_folder(tmp_path / "test", classes=("red", "green", "pink"))
    message = refused(learner, train, test=test)
    assert "it lacks 'blue'" in message
    assert "it has 'pink' besides" in message


def test_a_test_set_with_its_classes_in_another_order_is_put_in_order() -> None:
    images = LabelledImages("x", ("b", "a"), torch.tensor([0, 1, 1]), [])
    assert check_same_labels(["a", "b"], images).targets.tolist() == [1, 0, 0]


def test_the_fingerprint_sees_content_and_labels_but_neither_names_nor_order(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    before = open_images(folder).fingerprint()
    (folder / "red" / "0.png").rename(folder / "red" / "zzz.png")
    assert open_images(folder).fingerprint() == before
    (folder / "red" / "zzz.png").rename(folder / "blue" / "zzz.png")
    assert open_images(folder).fingerprint() != before
