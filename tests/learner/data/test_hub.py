"""Hugging Face datasets, with the `datasets` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from datasets import Sequence as ListOf
from PIL import Image

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.exceptions import DataError
from addenda.learner.data import has_test_part, open_images
from tests.support.images import colour_folder

CLASSES = ClassLabel(names=["red", "green", "blue"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colour_folder(tmp_path / "data")


def dataset(folder: Path, count: int = 8, **columns: Any) -> Dataset:
    """The images of the folder, with further columns given as (values, feature)."""
    paths = [folder / name / f"{i}.png" for name in CLASSES.names for i in range(count)]
    values: dict[str, Any] = {"picture": list(map(str, paths)), "class": [p.parent.name for p in paths]}
    features = {"picture": ImageFeature(), "class": CLASSES}
    for name, (column, feature) in columns.items():
        values[name], features[name] = column, feature
    return Dataset.from_dict(values, features=Features(features))


def refused(data: object) -> str:
    with pytest.raises(DataError) as caught:
        open_images(data)
    return str(caught.value)


def test_a_dataset_equals_the_folder_it_was_made_from(folder: Path) -> None:
    data = dataset(folder)
    images = open_images(data)
    assert images.labels == ("red", "green", "blue")
    assert images.targets.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert images.fingerprint() == open_images(folder).fingerprint()
    embedded = data.map(lambda row: {"picture": {"bytes": Path(row["picture"].filename).read_bytes()}})
    assert open_images(embedded).fingerprint() == open_images(folder).fingerprint()


def test_its_images_are_read_like_files(tiny: FrozenBackbone, folder: Path, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (40, 36), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    read = open_images(folder).read(0, tiny)
    for data in (
        dataset(folder),
        dataset(folder).with_format("torch"),
        dataset(folder).cast_column("picture", ImageFeature(decode=False)),
    ):
        assert torch.equal(open_images(data).read(16, tiny), read)
    pictures = Dataset.from_dict({"x": [clear], "y": [0]}, features=Features({"x": ImageFeature(), "y": CLASSES}))
    (tmp_path / "one" / "white").mkdir(parents=True)
    clear.save(tmp_path / "one" / "white" / "0.png")
    assert torch.equal(open_images(pictures).read(0, tiny), open_images(tmp_path / "one").read(0, tiny))


def test_a_list_of_classes_is_multi_label(folder: Path) -> None:
    tags = [[0], [], [0, 2]] * 8
    for feature in (ListOf(CLASSES), [CLASSES]):
        data = dataset(folder, tags=(tags, feature)).remove_columns("class")
        images = open_images(data)
        assert (images.objective.name, images.labels) == ("multi-label", ("red", "green", "blue"))
        assert images.targets[:3].tolist() == [[True, False, False], [False] * 3, [True, False, True]]


def test_a_dictionary_of_train_and_test_is_learned_and_scored(
    tiny: FrozenBackbone, registry: Registry, folder: Path
) -> None:
    data = DatasetDict({"train": dataset(folder), "test": dataset(folder, 2)})
    assert has_test_part(data)
    learner = Learner(tiny, registry)
    task = learner.learn("colours", data, config=LearnConfig(optimizer="sgd", epochs=1, learning_rate=0.1))
    assert task.labels == ("red", "green", "blue")
    assert (task.data["num_images"], task.metrics["test"]["num_images"]) == (24, 6)
    assert learner.evaluate("colours", data).metrics == task.metrics["test"]
    assert not has_test_part(data["train"])


def test_an_unreadable_image_is_an_error_or_skipped_on_request(
    tiny: FrozenBackbone, registry: Registry, folder: Path
) -> None:
    broken = dataset(folder).map(lambda row, i: {"picture": {"bytes": b"none"}} if i == 5 else {}, with_indices=True)
    config = LearnConfig(optimizer="sgd", epochs=1, learning_rate=0.1)
    with pytest.raises(DataError, match="Image 5 of the given Dataset cannot be read"):
        Learner(tiny, registry).learn("colours", broken, config=config)
    task = Learner(tiny, registry).learn("colours", broken, config=config, skip_bad=True)
    assert task.data["num_images"] == 23


# --- what is refused --------------------------------------------------------------------------------------------------


def test_several_candidate_columns_are_listed(folder: Path) -> None:
    two = dataset(folder, coarse=([0] * 24, CLASSES), tags=([[0]] * 24, ListOf(CLASSES)))
    message = refused(two)
    assert "several columns" in message
    assert "'class', 'coarse', 'tags'" in message
    assert "remove_columns" in message
    mask = [str(folder / "red" / "0.png")] * 24
    assert "could be the image: 'picture', 'mask'" in refused(dataset(folder, mask=(mask, ImageFeature())))


def test_missing_columns_are_reported_with_the_existing_ones(folder: Path) -> None:
    numbers = dataset(folder, number=([0] * 24, Value("int64"))).remove_columns("class")
    message = refused(numbers)
    assert "no column of type ClassLabel, or a list of ClassLabel, to be the label" in message
    assert "'picture': Image, 'number': Value" in message
    assert "class_encode_column" in message
    assert "no column of type Image to be the image" in refused(dataset(folder).remove_columns("picture"))


def test_images_without_a_class_are_counted(folder: Path) -> None:
    unknown = dataset(folder, other=([0, None, -1] * 8, CLASSES)).remove_columns("class")
    message = refused(unknown)
    assert "16 of 24 images" in message
    assert "image 1 has None" in message


def test_splits_other_than_train_and_test_are_refused(folder: Path) -> None:
    images = dataset(folder)
    message = refused(DatasetDict({"train": images, "validation": images}))
    assert "the splits 'train', 'validation'" in message
    assert "draws its own validation split" in message
    assert "has no split 'train', only 'test'" in refused(DatasetDict({"test": images}))


def test_streaming_and_empty_datasets_are_refused(folder: Path) -> None:
    assert "is a streaming dataset" in refused(dataset(folder).to_iterable_dataset())
    assert "is empty" in refused(dataset(folder).select([]))
