"""Images are prepared alike wherever they are read: orientation, transparency, palettes, depth."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import ImageFolder

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.backbones import prepared, read_image
from addenda.exceptions import DataError
from addenda.learner import Augmentation
from addenda.learner.augmentation import augment
from addenda.learner.data import open_images
from tests.support.datasets import Pictures, files
from tests.support.images import colour_folder


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
    assert task.data["repeated"] == {"classes": 0, "copies": 0, "test": 0}


@pytest.mark.slow
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


@pytest.mark.parametrize("turned_by", [None, Image.Transpose.ROTATE_90])
def test_a_view_of_a_long_image_is_no_squashed_image(tiny: FrozenBackbone, turned_by: Image.Transpose | None) -> None:
    position = np.tile(np.arange(200, dtype=np.uint8), (20, 1))
    image = Image.fromarray(np.stack([position] * 3, axis=-1))
    how = Augmentation(views=1, scale=(0.9, 1.0), hflip=0.0, color_jitter=0.0)
    mean, std = (np.array(tiny.preprocessing[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    for seed in range(5):
        view = augment(image if turned_by is None else image.transpose(turned_by), how, seed, tiny.preprocessing)
        seen = 255 * (view.numpy() * std + mean)
        assert seen.min() == pytest.approx(100 - 20 * 4 / 3 / 2, abs=2)  # the centre, in the widest permitted ratio
        assert seen.max() == pytest.approx(99 + 20 * 4 / 3 / 2, abs=2)
