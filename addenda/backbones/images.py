"""Reading image files the same way everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from addenda.exceptions import DataError, TooLargeError

Name = TypeVar("Name", str, Path)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
ASPECT = 100
"""A transform that brings the shorter side to a size makes of a longer line more pixels than fit into memory."""


def read_image(
    source: str | Path | BytesIO,
    name: str | None = None,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Reads a file as an RGB image, turned as its EXIF orientation says.

    Transparent pixels are laid on white; 16-bit grey is scaled to 8 bits.

    Args:
        source: a path, or the bytes of a file.
        name: what it is called in messages; a path is called by itself.
        formats: Pillow's names of those that are tried; None tries all.
        max_pixels: most that are taken, of sides that are at most ASPECT times each other; None leaves it to Pillow.

    Raises:
        TooLargeError: more pixels than are taken; none was decoded.
        DataError: the file is missing, truncated, too large to be safe, or no image.
    """
    called = f"Image {str(source)!r}" if name is None else name
    try:
        with Image.open(source, formats=formats) as image:
            if max_pixels is not None:
                _check_size(called, image, max_pixels)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except TooLargeError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{called} does not exist.") from error
    except UnidentifiedImageError as error:
        kinds = f"no {', '.join(formats)} file" if formats else "no image of a known kind"
        raise DataError(f"{called} cannot be read: it is {kinds}.") from error
    except Exception as error:  # Pillow lets through what a damaged file makes its readers stumble over, of any kind
        raise DataError(f"{called} cannot be read: {error}") from error


def readable(paths: Sequence[Name]) -> tuple[list[Name], dict[Name, str]]:
    """The image files that can be read, in order, and of each of the others what is wrong with it."""
    good: list[Name] = []
    bad: dict[Name, str] = {}
    for path in paths:
        try:
            read_image(path)
            good.append(path)
        except DataError as error:
            bad[path] = str(error)
    return good, bad


def _check_size(called: str, image: Image.Image, max_pixels: int) -> None:
    found = f"{called} has {image.width} x {image.height} pixels"
    if image.width * image.height > max_pixels:
        raise TooLargeError(f"{found}; at most {max_pixels} are taken.")
    if max(image.size) > ASPECT * min(image.size):
        raise TooLargeError(f"{found}; a side may be {ASPECT} times as long as the other at most.")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 257).convert("L")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", with_alpha.size, "white"), with_alpha)
    return image.convert("RGB")
