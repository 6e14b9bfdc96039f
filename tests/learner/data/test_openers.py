"""Opening and checking training and test data: what is accepted, and the errors for everything else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.exceptions import DataError
from addenda.learner.data import check_same_labels, has_test_part, open_images
from addenda.learner.data.labelled import LabelledImages
from addenda.learner.data.openers import check_learnable
from addenda.registry import TaskFilter
from tests.support.images import colour_folder

QUICK = LearnConfig(optimizer="sgd", epochs=1, learning_rate=(0.1,))


@pytest.fixture
def learner(tiny: FrozenBackbone, registry: Registry) -> Learner:
    return Learner(tiny, registry)


def refused(learner: Learner, train: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        learner.learn("colours", train, config=QUICK, **options)
    assert learner.registry.tasks(TaskFilter(retired=True)) == []
    return str(caught.value)


def test_a_missing_folder_is_reported(learner: Learner, tmp_path: Path) -> None:
    assert "There is no folder" in refused(learner, tmp_path / "nowhere")


def test_an_empty_folder_is_refused_with_the_expected_layout(learner: Learner, tmp_path: Path) -> None:
    message = refused(learner, tmp_path)
    assert "no class folders" in message
    assert "no images were found" in message
    assert f"{tmp_path.name}/cat/1.jpg" in message


def test_images_outside_class_folders_are_reported(learner: Learner, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "its images are not in class folders" in refused(learner, tmp_path)


def test_a_folder_of_datasets_is_refused(learner: Learner, tmp_path: Path) -> None:
    for name in ("first", "second"):
        colour_folder(tmp_path / name / "train")
        colour_folder(tmp_path / name / "test")
    message = refused(learner, tmp_path)
    assert "contains datasets, not classes: 'first' has splits of its own, such as train/" in message
    assert "learn-many" in message


def test_an_empty_class_folder_is_refused(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    (folder / "violet").mkdir()
    assert "Class folder 'violet'" in refused(learner, folder)


def test_unreadable_images_are_all_listed_and_counted(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    (folder / "red" / "0.png").write_bytes(b"no image")
    content = (folder / "blue" / "3.png").read_bytes()
    (folder / "blue" / "3.png").write_bytes(content[: len(content) // 2])
    message = refused(learner, folder)
    assert "2 of 24 images" in message
    assert str(folder / "red" / "0.png") in message
    assert str(folder / "blue" / "3.png") in message
    assert "--skip-bad" in message


def test_unreadable_images_are_skipped_on_request(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    (folder / "red" / "0.png").write_bytes(b"no image")
    task = learner.learn("colours", folder, config=QUICK, skip_bad=True)
    assert task.data["num_images"] == 23
    assert len(task.data["skipped"]) == 1
    assert str(folder / "red" / "0.png") in task.data["skipped"][0]


def test_a_class_left_without_a_readable_image_is_refused(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data", per_class=3)
    for number in range(3):
        (folder / "red" / f"{number}.png").write_bytes(b"no image")
    message = refused(learner, folder, skip_bad=True)
    assert "Class 'red'" in message
    assert "has 0 images." in message


def test_a_folder_of_unreadable_images_only_is_always_refused(learner: Learner, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data", per_class=2)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    assert "6 of 6 images" in refused(learner, folder, skip_bad=True)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(6, 1, 32, 32), "[1, 32, 32]"),
        (torch.zeros(6, 3, 16, 32), "[3, 16, 32]"),
        (torch.zeros(6, 3, 32, 32, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_tensors_of_the_wrong_channels_size_or_type_are_refused(
    learner: Learner, images: torch.Tensor, message: str
) -> None:
    error = refused(learner, TensorDataset(images, torch.tensor([0, 0, 0, 1, 1, 1])))
    assert message in error
    assert "[3, 32, 32]" in error


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
    assert "it also has 'pink'" in message


def test_the_classes_of_test_images_are_reordered() -> None:
    images = LabelledImages("x", ("b", "a"), torch.tensor([0, 1, 1]), [])
    assert check_same_labels(["a", "b"], images, "single-label").targets.tolist() == [1, 0, 0]


def test_the_fingerprint_depends_on_content_and_labels_but_not_on_names_or_order(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    before = open_images(folder).fingerprint()
    (folder / "red" / "0.png").rename(folder / "red" / "zzz.png")
    assert open_images(folder).fingerprint() == before
    (folder / "red" / "zzz.png").rename(folder / "blue" / "zzz.png")
    assert open_images(folder).fingerprint() != before


def test_a_folder_of_train_and_test_gives_the_requested_split(tmp_path: Path) -> None:
    colour_folder(tmp_path / "train", per_class=3)
    assert not has_test_part(tmp_path)
    with pytest.raises(DataError, match=r"contains train/ but no test/"):
        open_images(tmp_path, "test")
    colour_folder(tmp_path / "test", per_class=1)
    assert has_test_part(tmp_path)
    assert (len(open_images(tmp_path, "train")), len(open_images(tmp_path, "test"))) == (9, 3)
    assert not has_test_part(tmp_path / "test")
    assert len(open_images(tmp_path / "test", "train")) == 3


def test_the_fingerprint_of_a_missing_file_is_an_error(tmp_path: Path) -> None:
    images = LabelledImages("x", ("a", "b"), torch.tensor([0]), [tmp_path / "gone.png"])
    with pytest.raises(DataError, match=r"gone\.png' cannot be read"):
        images.fingerprint()


# --- several labels ---------------------------------------------------------------------------------------------------

HOT = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]]


class Tagged:
    """A Dataset of tensors with the given targets; optionally with the attribute `targets`."""

    def __init__(self, targets: list[object], classes: tuple[str, ...] = (), attribute: object = None) -> None:
        self._targets = targets
        if classes:
            self.classes = classes
        if attribute is not None:
            self.targets = attribute

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, object]:
        return torch.full((3, 32, 32), float(index)), self._targets[index]


@pytest.mark.parametrize(
    "data",
    [
        Tagged([torch.tensor(row) for row in HOT], ("a", "b", "c")),
        Tagged([torch.tensor(row).float() for row in HOT], ("a", "b", "c")),
        Tagged(HOT, ("a", "b", "c")),
        Tagged([None] * 5, ("a", "b", "c"), torch.tensor(HOT)),
        Tagged([None] * 5, ("a", "b", "c"), np.array(HOT, dtype=bool)),
        Tagged([None] * 5, ("a", "b", "c"), HOT),
    ],
    ids=["integers", "floats", "lists", "2-D tensor", "2-D array", "list of lists"],
)
def test_targets_of_zeros_and_ones_are_multi_label(data: Tagged) -> None:
    images = open_images(data)
    assert (images.objective.name, images.labels) == ("multi-label", ("a", "b", "c"))
    assert images.targets.dtype == torch.bool
    assert images.targets.int().tolist() == HOT
    assert images.counts == [2, 2, 2]


def test_labels_without_names_are_named_by_number() -> None:
    assert open_images(Tagged(HOT)).labels == ("0", "1", "2")


def test_a_vector_of_one_number_is_a_class_index() -> None:
    images = open_images(Tagged([torch.tensor([2]), np.array([0]), [1], 1]))
    assert (images.objective.name, images.targets.tolist(), images.counts) == ("single-label", [2, 0, 1, 1], [1, 2, 1])


@pytest.mark.parametrize(
    ("targets", "classes", "message"),
    [
        ([[0, 2], [1, 0]], (), "vector targets with values other than 0 and 1"),
        ([[0.5, 0.5], [1, 0]], (), "vector targets with values other than 0 and 1"),
        ([[0, 1], [1, 0, 0]], (), "not vectors of equal length"),
        ([[0, 1], 1], (), "not vectors of equal length"),
        ([1, [0, 1]], (), "a target that is not a whole number"),
        ([torch.tensor(1), torch.tensor([0, 1])], (), "a target that is not a whole number"),
        ([[0, 1], [1, 0]], ("a", "b", "c"), "targets for 2 labels but 3 classes"),
        (["cat", "dog"], (), "a target that is not a whole number"),
        ([[[0, 1]], [[1, 0]]], (), "a target that is not a whole number"),
        ([[[0], [1]], [[1], [0]]], (), "vector targets with values other than 0 and 1"),
    ],
)
def test_other_targets_are_refused(targets: list[object], classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_images(Tagged(targets, classes))


def tagged(hot: list[list[int]], labels: tuple[str, ...] = ("a", "b", "c")) -> LabelledImages:
    data = Tagged(hot)
    return LabelledImages("the tags", labels, torch.tensor(hot).bool(), data)


def test_a_label_needs_an_image_with_it_and_two_without() -> None:
    check_learnable(tagged(HOT))
    check_learnable(tagged([*HOT[:4], [0, 0, 0]]))  # a single image of c
    with pytest.raises(DataError, match=r"Class 'b' in the tags has 0 images\. Add images, or remove the class"):
        check_learnable(tagged([[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]]))
    with pytest.raises(DataError, match="the tags has a single image of each class: at least one class needs two"):
        check_learnable(tagged([[1, 0, 0], [0, 1, 0], [0, 0, 1]]))
    for common in ([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]], [[0, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]]):
        with pytest.raises(DataError, match="Label 'a' in the tags is on every image, or on all but one"):
            check_learnable(tagged(common))
    check_learnable(tagged([[1], [1], [0], [0]], ("alone",)))


@pytest.mark.parametrize("targets", [HOT, [0, 1, 2, 0, 1, 2]])
def test_duplicate_class_names_are_refused(targets: list[object]) -> None:
    with pytest.raises(DataError, match="several classes named 'a'"):
        open_images(Tagged(targets, ("a", "b", "a")))


def test_multi_label_images_may_lack_labels_of_the_task_and_have_no_others() -> None:
    images = check_same_labels(["c", "x", "a", "b"], tagged(HOT), "multi-label")
    assert images.labels == ("c", "x", "a", "b")
    assert images.targets.int().tolist() == [[row[2], 0, row[0], row[1]] for row in HOT]
    with pytest.raises(DataError, match="it also has 'b', 'c'"):
        check_same_labels(["a"], tagged(HOT), "multi-label")


def test_images_of_the_other_objective_are_refused() -> None:
    with pytest.raises(DataError, match="the tags is multi-label; the task is single-label"):
        check_same_labels(["a", "b", "c"], tagged(HOT), "single-label")
    single = LabelledImages("x", ("a", "b"), torch.tensor([0, 1]), [])
    with pytest.raises(DataError, match="x is single-label; the task is multi-label"):
        check_same_labels(["a", "b"], single, "multi-label")


def test_the_fingerprint_of_multi_label_images_depends_on_labels_but_not_on_their_order() -> None:
    before = tagged(HOT).fingerprint()
    assert check_same_labels(["c", "a", "b"], tagged(HOT), "multi-label").fingerprint() == before
    assert tagged([[0, 0, 1], *HOT[1:]]).fingerprint() != before
    assert tagged(HOT, ("a", "c", "b")).fingerprint() != before
    assert tagged(HOT, ("a", "b", "d")).fingerprint() != before


def test_the_fingerprint_of_a_folder_is_stable(tmp_path: Path) -> None:
    for label, content in (("a", b"1"), ("b", b"2")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0.png").write_bytes(content)
    lines = sorted(f"{hashlib.sha256(content).hexdigest()} {label}" for label, content in (("a", b"1"), ("b", b"2")))
    assert open_images(tmp_path).fingerprint() == hashlib.sha256("\n".join(lines).encode()).hexdigest()
