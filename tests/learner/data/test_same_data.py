"""Order, names and encoding of images do not affect a task; different pixels do."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import random
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import ImageFolder

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.backbones import prepared, read_image
from addenda.exceptions import DataError
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.context import Epoch
from addenda.learner.data import Data, open_images
from addenda.registry import Task
from tests.support.commands import Run
from tests.support.images import colour_folder

QUICK = LearnConfig(epochs=2, batch_size=5, fall_back=False, augmentation=Augmentation(views=1))
numbers = itertools.count()


class Pictures:
    """A torch Dataset of PIL images."""

    def __init__(self, items: Sequence[tuple[Image.Image, int]], classes: Sequence[str]) -> None:
        self._items, self.targets, self.classes = items, [target for _, target in items], list(classes)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._items[index]


# --- order and names --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and test/ of three classes; one image occurs twice."""
    folder = tmp_path_factory.mktemp("pictures")
    colour_folder(folder / "train", per_class=6)
    shutil.copy(folder / "train" / "red" / "0.png", folder / "train" / "red" / "again.png")
    colour_folder(folder / "test", per_class=4, seed=50)
    return folder


def files(folder: Path) -> list[tuple[Path, str]]:
    return [(path, path.parent.name) for path in sorted(folder.glob("*/*"))]


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


# --- preparation of images --------------------------------------------------------------------------------------------


def turned(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "turned.jpg", exif=exif)
    return folder / "turned.jpg"


def clear(folder: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 255, (20, 30, 4), dtype=np.uint8)
    pixels[:10, :, 3] = 0
    Image.fromarray(pixels).save(folder / "clear.png")
    return folder / "clear.png"


def clear_palette(folder: Path) -> Path:
    image = Image.open(clear(folder)).convert("RGB").quantize(16)
    image.save(folder / "palette.png", transparency=3)
    return folder / "palette.png"


def deep(folder: Path) -> Path:
    values = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(values).save(folder / "deep.png")
    return folder / "deep.png"


def floats(folder: Path) -> Path:
    Image.fromarray(np.linspace(0, 1, 600).reshape(20, 30).astype(np.float32)).save(folder / "floats.tif")
    return folder / "floats.tif"


KINDS = pytest.mark.parametrize("make", [turned, clear, clear_palette, deep, floats])


@KINDS
def test_a_file_and_its_pil_image_are_prepared_identically(
    tiny: FrozenBackbone, tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path)
    from_file = tiny.transform(read_image(path))
    assert torch.equal(tiny.transform(Image.open(path)), from_file)
    assert torch.equal(tiny.transform(prepared(Image.open(path))), from_file)  # preparing again changes nothing
    for data in (as_items(path), as_image_folder(path, tmp_path), Subset(as_image_folder(path, tmp_path), [0])):
        assert torch.equal(open_images(data).read(0, tiny), from_file)
    assert open_images(as_image_folder(path, tmp_path)).digest(0) == open_images(tmp_path / "of").digest(0)
    datasets: list[Any] = [as_image_folder(path, tmp_path), as_items(path)]
    assert torch.equal(open_images(ConcatDataset(datasets)).read_all(tiny), from_file.expand(2, -1, -1, -1))


def as_items(path: Path) -> Pictures:
    return Pictures([(Image.open(path), 0)], ["a"])


def as_image_folder(path: Path, folder: Path) -> ImageFolder:
    class_folder = folder / "of" / "a"
    class_folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, class_folder)
    return ImageFolder(str(folder / "of"))


def test_a_custom_loader_is_used(tiny: FrozenBackbone, tmp_path: Path) -> None:
    path = clear(tmp_path)
    root = as_image_folder(path, tmp_path).root
    custom = ImageFolder(root, loader=lambda file: Image.open(file).convert("L"))
    assert torch.equal(open_images(custom).read(0, tiny), tiny.transform(Image.open(path).convert("L")))
    turned_round = ImageFolder(root, transform=lambda image: image.rotate(180))
    loader = turned_round.loader
    assert torch.equal(open_images(turned_round).read(0, tiny), tiny.transform(read_image(path).rotate(180)))
    assert turned_round.loader is loader


def test_an_image_is_turned_once_and_damaged_metadata_are_ignored(tmp_path: Path) -> None:
    path = turned(tmp_path)
    assert read_image(path).size == (20, 30)
    assert prepared(read_image(path)).size == (20, 30)
    assert np.array_equal(read_image(path), np.rot90(np.asarray(Image.open(path)), -1))
    plain = Image.open(path).convert("RGB")
    plain.info["exif"] = b"Exif\0\0 not at all"
    assert prepared(plain).size == (30, 20)


@pytest.mark.parametrize(
    ("values", "top"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32), 1),
        (np.linspace(0, 255, 64, dtype=np.float32), 255),
        (np.linspace(0, 65535, 64, dtype=np.float32), 65535),
        (np.arange(0, 256, 4).astype(np.int32), 255),
        (np.arange(0, 256, 4).astype(np.uint16), 255),
        (np.linspace(0, 4095, 64).astype(np.uint16), 4095),
        (np.linspace(0, 65535, 64).astype(np.uint16), 65535),
        (np.linspace(0, 65535, 64).astype(np.int32), 65535),
    ],
)
def test_values_that_are_not_8_bit_are_scaled_by_their_range(tmp_path: Path, values: np.ndarray, top: int) -> None:
    Image.fromarray(values.reshape(8, 8)).save(tmp_path / "a.tif")
    pixels = np.asarray(read_image(tmp_path / "a.tif")).astype(int)
    assert (abs(pixels - (values.reshape(8, 8, 1).astype(float) * 255 / top)) <= 1).all()
    assert pixels.max() >= 251


@pytest.mark.parametrize(
    "values",
    [
        [-1.0, 0.5],
        [0.0, 1.133],
        [-0.05, 1.0],
        [0.0, 1e6],
        [0.0, float("nan")],
        [0.0, float("inf")],
        [-5, 3],
        [0, 70_000],
    ],
)
def test_values_of_unknown_scale_are_refused(tmp_path: Path, values: list[float]) -> None:
    kind = np.int32 if all(isinstance(value, int) for value in values) else np.float32
    Image.fromarray(np.array([values], kind)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif' has pixel values from .* of unknown scale: 8, 12 or 16 bits"):
        read_image(tmp_path / "a.tif")


def test_16_bit_colours_that_pillow_would_make_black_are_refused(tmp_path: Path) -> None:
    for name, top in (("dark", 4095), ("light", 65535)):
        write_16_bit_rgb(tmp_path / f"{name}.png", np.linspace(0, top, 48).astype(np.uint16).reshape(4, 4, 3))
    assert np.asarray(read_image(tmp_path / "light.png")).max() == 255
    image = Image.open(tmp_path / "dark.png")
    for read in (lambda: read_image(tmp_path / "dark.png"), lambda: prepared(image), lambda: prepared(image)):
        with pytest.raises(DataError, match=r"has 16-bit colours that use 12 bits or fewer"):
            read()


def write_16_bit_rgb(path: Path, values: np.ndarray) -> None:
    """Writes a 16-bit RGB PNG, which Pillow can read but not write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_an_unreadable_image_of_a_dataset_is_an_error_or_skipped(
    tiny: FrozenBackbone, registry: Registry, tmp_path: Path
) -> None:
    paths = [path for path, _ in files(colour_folder(tmp_path / "colours"))]
    cut = tmp_path / "cut.jpg"
    Image.open(paths[0]).save(cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    items = [(Image.open(path), number // 8) for number, path in enumerate(paths)]
    bad = [Image.open(BytesIO(cut.read_bytes())), Image.fromarray(np.array([[0, 70_000]], np.int32))]
    data = Pictures([*items, *((image, 0) for image in bad)], ["blue", "green", "red"])
    learner = Learner(tiny, registry)
    with pytest.raises(DataError, match=r"2 of 26 images .* cannot be read") as refused:
        learner.learn("colours", data, config=LearnConfig(head_only=True))
    assert "Item 24 of the given Pictures cannot be read" in str(refused.value)
    assert "Item 25 of the given Pictures has pixel values from 0 to 70000" in str(refused.value)
    task = learner.learn("colours", data, config=LearnConfig(head_only=True), skip_bad=True)
    assert (task.data["num_images"], len(task.data["skipped"])) == (24, 2)
    assert task.data["repeated"] == {"classes": 0, "test": 0}


def test_another_order_of_classes_is_another_task(tiny: FrozenBackbone, registry: Registry, tmp_path: Path) -> None:
    rows = [
        (Image.open(path), ("red", "green", "blue").index(label))
        for path, label in files(colour_folder(tmp_path / "c"))
    ]
    learner, config = Learner(tiny, registry), LearnConfig(head_only=True)
    first = learner.learn("colours", Pictures(rows, ["red", "green", "blue"]), config=config)
    assert learner.learn("colours", Pictures(rows, ["red", "green", "blue"]), config=config).ref == first.ref
    other = Pictures([(image, 2 - target) for image, target in rows], ["blue", "green", "red"])
    second = learner.learn("colours", other, config=config, new_version=True)
    assert (second.ref, second.labels) == ("colours:2", ("blue", "green", "red"))


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
    assert task.data["repeated"] == {"classes": 2, "test": 2}
    assert registry.record("colours").data["repeated"] == {"classes": 2, "test": 2}
    (message,) = [record.getMessage() for record in caplog.records if "Byte-identical images" in record.getMessage()]
    assert "2 training images also occur with other labels" in message
    assert "2 of 26 test images are also training images" in message


def test_without_repeats_nothing_is_logged(
    tiny: FrozenBackbone, registry: Registry, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        task = Learner(tiny, registry).learn("colours", pictures, config=LearnConfig(head_only=True))
    assert task.data["repeated"] == {"classes": 0, "test": 0}
    assert "Byte-identical images" not in caplog.text


def test_repeats_are_in_the_json_too(run: Run, tmp_path: Path) -> None:
    colour_folder(tmp_path / "set" / "train")
    shutil.copytree(tmp_path / "set" / "train", tmp_path / "set" / "test")
    result = run("learn", "colours", tmp_path / "set", "--backbone", "glyphs", "--head-only", "--json")
    assert json.loads(result.out)["repeated"] == {"classes": 0, "test": 24}
    assert "24 of 24 test images are also training images, which inflates the test score" in result.err
