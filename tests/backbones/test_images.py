"""Image files are read as viewers show them; damaged ones are refused by name."""

from __future__ import annotations

import random
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from addenda.backbones import load_backbone, prepared, read_image
from addenda.exceptions import DataError
from tests.support.places import DATA


def pixels(path: Path) -> list[list[int]]:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def picture(values: object, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.array(values, dtype))


def test_transparent_pixels_are_composited_over_white(tmp_path):
    picture([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]]).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png") == [[255, 255, 255], [255, 0, 0], [204, 204, 204]]


def test_grey_with_alpha_is_composited_over_white(tmp_path):
    picture([[[9, 9, 9, 0], [9, 9, 9, 255]]]).convert("LA").save(tmp_path / "a.png")
    assert mode(tmp_path / "a.png") == "LA"
    assert pixels(tmp_path / "a.png") == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])], ids=["index", "table"])
def test_a_transparent_palette_entry_is_composited_over_white(tmp_path, transparency):
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=transparency)
    assert mode(tmp_path / "a.png") == "P"
    assert pixels(tmp_path / "a.png") == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_a_photo_in_heic_is_upright(tmp_path):
    image = read_image(shutil.copy(DATA / "photo.heic", tmp_path / "a.jpg"))  # as some programs name it
    assert image.size == (48, 64)  # red, above left, and blue were turned by a quarter
    corners = [image.getpixel(at) for at in ((4, 4), (43, 4), (4, 59), (43, 59))]
    expected = [(30, 160, 60), (220, 30, 30), (30, 40, 220), (30, 160, 60)]
    np.testing.assert_allclose(corners, expected, atol=6)


def test_without_its_extra_a_photo_in_heic_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    with pytest.raises(DataError, match=r"photo\.heic' cannot be .* HEIC file, .* pip install 'addenda\[heic\]'\.$"):
        read_image(DATA / "photo.heic")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_scaled_to_eight(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    picture([[0, 10 * 257, 200 * 257, 65535]], np.uint16).save(path)
    assert mode(path).startswith("I")
    assert pixels(path) == [[v] * 3 for v in (0, 10, 200, 255)]


@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_integers_are_scaled_by_their_number_of_bits_and_rounded_down(top):
    values = np.linspace(0, top, 1000).astype(np.uint16).reshape(20, 50)
    scaled = np.asarray(prepared(Image.fromarray(values)))[..., 0]
    assert np.array_equal(scaled, np.floor(values.astype(np.float64) * 255 / top))


def test_exif_orientation_turns_the_image(tmp_path):
    expected = {1: [1, 2, 3, 4], 2: [2, 1, 4, 3], 3: [4, 3, 2, 1], 6: [3, 1, 4, 2], 8: [2, 4, 1, 3]}
    for orientation, order in expected.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture([[10, 20], [30, 40]]).save(tmp_path / "a.png", exif=exif)
        assert pixels(tmp_path / "a.png") == [[10 * v] * 3 for v in order], orientation
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (20, 40)


def test_every_suffix_can_be_read(tmp_path):
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jfif", ".avif", ".tga")
    for suffix in suffixes:
        Image.new("RGB", (8, 6), (0, 0, 255)).save(tmp_path / f"a{suffix}")
        red, green, blue = pixels(tmp_path / f"a{suffix}")[0]
        assert max(red, green, 255 - blue) <= 2, suffix


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".bmp", ".ppm"])
def test_a_truncated_image_is_refused_by_name(tmp_path, suffix):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    picture(np.random.RandomState(0).randint(0, 255, (40, 40, 3))).save(whole)
    data = whole.read_bytes()
    cuts = random.Random(0).sample(range(len(data) // 2), 10)
    assert read_image(whole).size == (40, 40)
    for length in cuts:
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"Image '.*cut\{suffix}' cannot be read: "):
            read_image(path)


def test_a_file_that_is_not_an_image_is_refused_by_name(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"Image '.*notes\.png' cannot be read: "):
        read_image(tmp_path / "notes.png")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)


def test_exif_orientation_is_applied_despite_another_tag_of_a_wrong_type(tmp_path):
    text_where_a_number_belongs = bytes.fromhex(
        "4578696600004d4d002a000000080002010a0002000000060000002601120003000000010006000000000000"
    )
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=text_where_a_number_belongs + b"hello\0")
    assert read_image(tmp_path / "a.jpg").size == (6, 8)


def test_a_missing_image_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"Image '.*nowhere\.png' does not exist"):
        read_image(tmp_path / "nowhere.png")


def test_an_image_too_large_to_be_safe_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png' has more than 200 pixels, the maximum\. Scale it down\.$"):
        read_image(tmp_path / "a.png")


def test_empty_bytes_are_said_to_be_empty() -> None:
    with pytest.raises(DataError, match=r"^Image 0 cannot be read: it is empty, 0 bytes\.$"):
        read_image(BytesIO(), "Image 0", ("JPEG", "PNG"))
    with pytest.raises(DataError, match=r"it is not a JPEG or PNG file\.$"):
        read_image(BytesIO(b"text"), "Image 0", ("JPEG", "PNG"))


def test_every_pixel_value_is_normalised_as_torch_computes_it():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    backbone = load_backbone("glyphs", mean=mean, std=std, device="cpu")
    pixels = np.random.default_rng(0).permuted(np.arange(3 * 32 * 32).reshape(32, 32, 3) % 256, axis=0)
    expected = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - torch.tensor(mean)[:, None, None]) / (
        torch.tensor(std)[:, None, None]
    )
    assert all(len(np.unique(pixels[..., channel])) == 256 for channel in range(3))
    transformed = backbone.transform(Image.fromarray(pixels.astype(np.uint8)))
    assert transformed.is_contiguous()
    assert torch.equal(transformed, expected)
