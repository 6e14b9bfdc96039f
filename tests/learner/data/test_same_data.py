"""The same data in another order, under other names or in another form give the same task."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import random
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.context import Epoch
from addenda.learner.data import Data, open_images
from addenda.registry import Task
from tests.support.commands import Run
from tests.support.datasets import Pictures, files
from tests.support.images import colour_folder

QUICK = LearnConfig(epochs=2, batch_size=5, fall_back=False, augmentation=Augmentation(views=1))


numbers = itertools.count()


# --- order and names --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and test/ of three classes; one image occurs twice."""
    folder = tmp_path_factory.mktemp("pictures")
    colour_folder(folder / "train", per_class=6)
    shutil.copy(folder / "train" / "red" / "0.png", folder / "train" / "red" / "again.png")
    colour_folder(folder / "test", per_class=4, seed=50)
    return folder


def renamed(source: Path, target: Path, choose: random.Random) -> Path:
    """Copies the images under other names, in subfolders of their class folders."""
    for number, (path, label) in enumerate(files(source)):
        folder = target / label / choose.choice((".", "more", "more/still"))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{choose.getrandbits(60):x}-{number}.png")
    return target


def as_folder(source: Path, target: Path, choose: random.Random) -> Data:
    return renamed(source, target, choose)


def as_listing(source: Path, target: Path, choose: random.Random) -> Data:
    renamed(source, target / "of", choose)
    rows = [(path, path.relative_to(target / "of").parts[0]) for path in (target / "of").rglob("*.png")]
    choose.shuffle(rows)
    with (target / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((str(path), label) for path, label in rows)])
    return target / "all.csv"


def learned(
    on: FrozenBackbone, folder: Path, train: Data, test: Data, config: LearnConfig = QUICK
) -> tuple[object, ...]:
    """Everything about a task and its evaluation that depends on the data."""
    with Registry.open(folder / f"{next(numbers)}.db") as registry:
        learner = Learner(on, registry, ActivationCache(folder / f"cache-{next(numbers)}"))
        task = learner.learn("colours", train, test, config=config)
        evaluation, statistics = learner.evaluate("colours", test), registry.statistics(task.ref)
        assert statistics is not None
        (probe,) = registry.goldens(task.ref)
        data = task.data["run"]["data"], evaluation.data_fingerprint
        digests = task.sha256, statistics.sha256, probe.digest, evaluation.logits_digest
        return *digests, data, task.metrics, evaluation.metrics


@pytest.mark.slow
@settings(deadline=None, max_examples=5)
@given(choose=st.randoms(use_true_random=False), forms=st.tuples(*[st.sampled_from((as_folder, as_listing))] * 2))
def test_shuffled_and_renamed_data_give_one_artifact(
    tiny: FrozenBackbone, pictures: Path, tmp_path_factory: pytest.TempPathFactory,
    choose: random.Random, forms: tuple[Callable[..., Data], Callable[..., Data]],
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("example")
    expected = learned(tiny, folder, pictures / "train", pictures / "test")
    splits = zip(("train", "test"), forms, strict=True)
    data = [form(pictures / split, folder / split, choose) for split, form in splits]
    assert learned(tiny, folder, *data) == expected


@pytest.mark.slow
@settings(deadline=None, max_examples=3)
@given(choose=st.randoms(use_true_random=False))
def test_a_shuffled_dataset_gives_one_artifact(
    tiny: FrozenBackbone, pictures: Path, tmp_path_factory: pytest.TempPathFactory, choose: random.Random
) -> None:
    folder, results = tmp_path_factory.mktemp("example"), []
    labels = sorted({label for _, label in files(pictures / "train")})
    for _ in range(2):
        datasets = []
        for split in ("train", "test"):
            rows = [(Image.open(path), labels.index(label)) for path, label in files(pictures / split)]
            choose.shuffle(rows)
            datasets.append(Pictures(rows, labels))
        results.append(learned(tiny, folder, *datasets))
    assert results[0] == results[1]


def test_an_interrupted_run_resumes_with_renamed_images_to_the_same_task(
    tiny: FrozenBackbone, pictures: Path, tmp_path: Path
) -> None:
    config = LearnConfig(epochs=4, batch_size=5, fall_back=False, augmentation=Augmentation(views=1))
    expected = learned(tiny, tmp_path, pictures / "train", pictures / "test", config)[0]

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    seen: list[int] = []
    with Registry.open(tmp_path / "resumed.db") as registry:
        learner = Learner(tiny, registry, ActivationCache(tmp_path / "cache"))
        with pytest.raises(KeyboardInterrupt):
            learner.learn("colours", pictures / "train", pictures / "test", config=config, on_epoch=stop)
        other = renamed(pictures / "train", tmp_path / "renamed", random.Random(1))
        task = learner.learn(
            "colours", other, pictures / "test", config=config, on_epoch=lambda epoch: seen.append(epoch.epoch)
        )
    assert seen[0] == 3
    assert task.sha256 == expected


def test_renaming_a_test_image_is_not_an_unexplained_change(
    tiny: FrozenBackbone, pictures: Path, run: Run, tmp_path: Path
) -> None:
    test = Path(shutil.copytree(pictures / "test", tmp_path / "test"))
    with Registry.open(tmp_path / "tasks.db") as registry:
        learner = Learner(tiny, registry, ActivationCache(tmp_path / "cache"))
        learner.learn("colours", pictures / "train", test, config=QUICK)
        (test / "red" / "0.png").rename(test / "red" / "zero.png")
        learner.evaluate("colours", test)
        assert [entry.verdict for entry in registry.history("colours")] == ["first", "equal"]
    assert run("tasks", "history", "colours").code == 0


def test_an_evaluation_of_version_0_1_is_compared_by_its_metrics(
    registered: Callable[..., Task], registry: Registry
) -> None:
    """Version 0.1 hashed logits in the order of the files."""
    ref = registered("task").ref
    metrics = {"accuracy": 0.75, "calibration_error": 0.1, "num_images": 4}
    registry.add_evaluation(ref, "data", "numerics", metrics, "a" * 64)
    registry.add_evaluation(ref, "data", "numerics", {**metrics, "calibration_error": 0.10000001}, "2:" + "b" * 64)
    registry.add_evaluation(ref, "data", "numerics", {**metrics, "accuracy": 0.5}, "2:" + "c" * 64)
    registry.add_evaluation(ref, "other", "numerics", metrics, "a" * 64)
    registry.add_evaluation(ref, "other", "numerics", {**metrics, "accuracy": 0.5}, "2:" + "b" * 64)
    history = registry.history("task")
    assert [entry.verdict for entry in history] == ["first", "equal", "unexplained", "first", "unexplained"]
    assert "version 0.1 hashed logits in another order" in history[1].reason


# --- different images -------------------------------------------------------------------------------------------------


def in_palette(colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, mode=None).convert("P")
    image.putdata([i % 4 for i in range(64)])
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def test_equal_indices_in_different_palettes_are_different_images(tiny: FrozenBackbone) -> None:
    light = in_palette([(250, 240, 230), (200, 210, 220), (180, 190, 170), (255, 255, 255)])
    dark = in_palette([(10, 20, 30), (0, 0, 0), (40, 30, 20), (5, 5, 5)])
    assert light.tobytes() == dark.tobytes()
    images = open_images(Pictures([(light, 0), (dark, 1), (light.convert("RGB"), 0)], ["a", "b"]))
    assert images.digest(0) != images.digest(1)
    assert images.digest(0) == images.digest(2)
    assert not torch.equal(images.read(0, tiny), images.read(1, tiny))


def test_equal_bytes_of_another_dtype_are_another_image() -> None:
    halves = torch.arange(3 * 4 * 4).reshape(3, 4, 4).half()
    tensors = [halves, halves.view(torch.bfloat16), halves.float(), halves.double(), halves.float().clone()]
    digests = [open_images([(tensor, 0)]).digest(0) for tensor in tensors]  # a list is a Dataset too
    assert digests[2] == digests[4]
    assert len(set(digests)) == 4


# --- Unicode normalisation of names -----------------------------------------------------------------------------------


COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


def test_class_names_are_normalised(tiny: FrozenBackbone, registry: Registry, tmp_path: Path) -> None:
    assert COMPOSED != DECOMPOSED
    for split, name in (("train", DECOMPOSED), ("test", COMPOSED)):
        colour_folder(tmp_path / "set" / split)
        (tmp_path / "set" / split / "red").rename(tmp_path / "set" / split / name)
    task = Learner(tiny, registry).learn("colours", tmp_path / "set", config=LearnConfig(head_only=True))
    assert task.labels == ("blue", COMPOSED, "green")
    assert task.metrics["test"]["num_images"] == 24


def test_both_forms_of_a_name_are_one_class(tmp_path: Path) -> None:
    colour_folder(tmp_path / "set")
    (tmp_path / "set" / "red").rename(tmp_path / "set" / DECOMPOSED)
    (tmp_path / "set" / "blue").rename(tmp_path / "set" / COMPOSED)
    images = open_images(tmp_path / "set")
    assert (images.labels, images.counts) == ((COMPOSED, "green"), [16, 8])
    rows = [f"{path},{(DECOMPOSED, COMPOSED)[number % 2]}" for number, path in enumerate(item for item in images.items)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    assert open_images(tmp_path / "list.csv").labels == (COMPOSED,)
    data = Pictures([(Image.new("RGB", (4, 4)), 0), (Image.new("RGB", (4, 4)), 1)], [DECOMPOSED, "other"])
    assert open_images(data).labels == (COMPOSED, "other")


# --- repeated images --------------------------------------------------------------------------------------------------


def test_images_in_both_splits_and_in_two_classes_are_counted(
    tiny: FrozenBackbone, registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    colour_folder(tmp_path / "set" / "train")
    colour_folder(tmp_path / "set" / "test", seed=50)
    for name in ("0", "1"):
        shutil.copy(
            tmp_path / "set" / "train" / "red" / f"{name}.png", tmp_path / "set" / "test" / "red" / f"x{name}.png"
        )
    shutil.copy(tmp_path / "set" / "train" / "red" / "2.png", tmp_path / "set" / "train" / "blue" / "x2.png")
    with caplog.at_level(logging.WARNING):
        task = Learner(tiny, registry).learn("colours", tmp_path / "set", config=LearnConfig(head_only=True))
    assert task.data["repeated"] == {"classes": 2, "copies": 0, "test": 2}
    assert registry.record("colours").data["repeated"] == {"classes": 2, "copies": 0, "test": 2}
    (message,) = [record.getMessage() for record in caplog.records if "Byte-identical images" in record.getMessage()]
    assert "2 training images also occur with other labels" in message
    assert "2 of 26 test images are also training images" in message


@pytest.mark.slow
def test_without_repeats_nothing_is_logged(
    tiny: FrozenBackbone, registry: Registry, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        copied = Learner(tiny, registry).learn("copied", pictures, config=LearnConfig(head_only=True))
        assert copied.data["repeated"] == {"classes": 0, "copies": 1, "test": 0}
        assert "training images that are copies of others of their class: 1" in caplog.text
        caplog.clear()
        whole = pictures / "test"
        task = Learner(tiny, registry).learn("colours", whole, config=LearnConfig(head_only=True))
    assert task.data["repeated"] == {"classes": 0, "copies": 0, "test": 0}
    assert "Byte-identical images" not in caplog.text


@pytest.mark.slow
def test_repeats_are_in_the_json_too(run: Run, tmp_path: Path) -> None:
    colour_folder(tmp_path / "set" / "train")
    shutil.copytree(tmp_path / "set" / "train", tmp_path / "set" / "test")
    result = run("learn", "colours", tmp_path / "set", "--backbone", "glyphs", "--head-only", "--json")
    assert json.loads(result.out)["repeated"] == {"classes": 0, "copies": 0, "test": 24}
    assert "24 of 24 test images are also training images, which inflates the test score" in result.err
