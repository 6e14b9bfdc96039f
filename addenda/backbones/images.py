"""Reading image files the same way everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from addenda.exceptions import DataError, TooLargeError

PREPARATION = 1
"""Which way of preparing images this is: another number wherever the pixels of some image would differ."""
CUT = "addenda: 16-bit colours cut to 8"
"""Noted among an image's own properties."""
PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
"""Chunks of a PNG file that Pillow bounds."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image of each EXIF orientation upright. Pillow's own `exif_transpose` also rewrites the metadata, and
fails where these are damaged."""
ASPECT = 100
"""A transform that brings the shorter side to a size makes of a longer line more pixels than fit into memory."""


def read_image(
    source: str | Path | BytesIO,
    name: str | None = None,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Reads a file as an image that is `prepared`.

    Args:
        source: a path, or the bytes of a file.
        name: what it is called in messages; a path is called by itself.
        formats: Pillow's names of those that are tried; None tries all.
        max_pixels: most that are taken, of sides that are at most ASPECT times each other; None leaves it to Pillow.

    Raises:
        TooLargeError: more pixels than are taken; none was decoded.
        DataError: the file is missing, truncated, too large to be safe, no image, or of no known scale.
    """
    called = f"Image {str(source)!r}" if name is None else name

    def read(file: str | Path | BytesIO) -> Image.Image:
        with Image.open(file, formats=formats) as image:
            found = f"{called} has {image.width} x {image.height} pixels"
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise TooLargeError(f"{found}; at most {max_pixels} are taken.")
            if max_pixels is not None and max(image.size) > ASPECT * min(image.size):
                raise TooLargeError(f"{found}; a side may be {ASPECT} times as long as the other at most.")
            return prepared(image, called)

    with _readable(called, formats):
        try:
            return read(source)
        except ValueError:  # Pillow's own bounds for texts and colour profiles, which are not the picture
            bare = _without_texts(source.getvalue() if isinstance(source, BytesIO) else Path(source).read_bytes())
            if bare is None:
                raise
            return read(BytesIO(bare))


@contextmanager
def _readable(called: str, formats: tuple[str, ...] | None = None) -> Iterator[None]:
    """What goes wrong as Pillow reads an image, as a DataError."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{called} does not exist.") from error
    except UnidentifiedImageError as error:
        kinds = f"no {', '.join(formats)} file" if formats else "no image of a known kind"
        raise DataError(f"{called} cannot be read: it is {kinds}.") from error
    except Exception as error:  # Pillow lets through what a damaged file makes its readers stumble over, of any kind
        raise DataError(f"{called} cannot be read: {error}") from error


def _without_texts(content: bytes) -> bytes | None:
    """A PNG file without what stands beside its pixels and its orientation; None where it is no PNG."""
    if not content.startswith(PNG):
        return None
    kept, place = [PNG], len(PNG)
    while place + 8 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] not in TEXTS:
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


def prepared(image: Image.Image, called: str = "An image") -> Image.Image:
    """An image as every model sees it, whether it was read from a file or given as a PIL image: RGB and upright.

    It is turned as its EXIF orientation says, transparent pixels are laid on white, and values that are not 8-bit are
    scaled: floats from 0 to 1, and the fewest of 8, 12 or 16 bits that hold the largest value.

    Raises:
        DataError: pixel values of no known scale, a mode that has no RGB, or a file that is damaged.
    """
    with _readable(called):
        if ";16" in str(getattr(image, "tile", "")) and len(image.getbands()) > 1:
            image.info[CUT] = True  # once it is loaded nothing else tells
        image.load()
        if CUT in image.info and int(np.asarray(image.convert("RGB")).max()) < 16:
            raise DataError(
                f"{called} has 16-bit colours of 12 bits or fewer, of which Pillow keeps the upper 8: it would be "
                "nearly black. Save it with 8 bits for each channel."
            )
        image = _upright(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _eight_bit(image, called)
        elif image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            with_alpha = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", with_alpha.size, "white"), with_alpha)
        found = image.convert("RGB")
        found.info = {}  # its orientation is done with
        return found


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; as it is where the metadata is damaged."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever stands beside the pixels is not the picture
        turn = None
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image, called: str) -> Image.Image:
    """A grey image of floats or of more than 8 bits as 8-bit grey."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    whole = image.mode != "F"
    scale = next((top for top in (*(() if whole else (1,)), 255, 4095, 65535) if high <= top), None)
    beyond_one = not whole and 1 < high < 2  # more likely 0 to 1 after a resize than 0 to 255 and black
    if scale is None or beyond_one or not low >= 0:  # nor where one of them is not a number
        raise DataError(
            f"{called} has pixel values from {low:g} to {high:g}, of no known scale: 8, 12 or 16 bits, or floats from "
            "0 to 1, can be read. Save it as 8-bit or 16-bit grey."
        )
    scaled = np.floor(values * 255 / scale) if whole else np.rint(values * 255 / scale)
    if isinstance(transparent := image.info.get("transparency"), int):
        scaled[values == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))
