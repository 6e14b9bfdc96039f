"""Reads and normalises image files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from addenda.exceptions import DataError, TooLargeError

with suppress(ImportError):
    from pi_heif import register_heif_opener

    register_heif_opener(thumbnails=False)

PREPARATION = 2
"""Version of the preparation of images and views, increased whenever the pixels of any of them would change."""
CUT = "addenda: 16-bit colours cut to 8"
"""Key in `Image.info` that marks 16-bit colours which Pillow has reduced to 8 bits."""
PNG = b"\x89PNG\r\n\x1a\n"
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
"""Bytes 8 to 12 of the files that phones write, after "ftyp"."""
HEIC_REQUIRES = "pip install 'addenda[heic]'"
SCAN, MAX_SCANS = b"\xff\xda", 100
"""The marker that starts a scan of a JPEG, and their maximum number in an upload. A progressive JPEG usually has ten;
each further one takes the file twelve bytes, and the decoder a pass over all pixels."""
TEXT_CHUNKS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
"""PNG chunks whose size Pillow limits."""
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that brings an image of each EXIF orientation upright. Pillow's `exif_transpose` also rewrites the
metadata, and fails if it is damaged."""
MAX_ASPECT, MAX_UPLOAD_ASPECT = 1000, 100
"""Maximum ratio of the sides, in general and of an upload: the shorter side is resized to a fixed size, so that longer
images would exceed the memory."""


def read_image(
    source: str | Path | BytesIO,
    name: str | None = None,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Reads an image file and converts it with `prepared`.

    Args:
        source: a path, or the bytes of a file.
        name: name of the image in messages; None takes the path.
        formats: Pillow's names of the accepted formats; None accepts all.
        max_pixels: maximum number of pixels of an upload, with sides in a ratio of at most MAX_UPLOAD_ASPECT and at
            most MAX_SCANS scans; None applies Pillow's limit, and MAX_ASPECT.

    Raises:
        TooLargeError: the image exceeds a limit; it was not decoded.
        DataError: the file is missing, truncated, unsafely large or not an image, or its scale is unknown.
    """
    label = f"Image {str(source)!r}" if name is None else name

    def read(file: str | Path | BytesIO) -> Image.Image:
        with Image.open(file, formats=formats) as image:
            if max_pixels is not None:
                if image.width * image.height > max_pixels:
                    raise TooLargeError(f"{_sized(image, label)}; the maximum is {max_pixels}. Scale it down.")
                _check_aspect(image, label, MAX_UPLOAD_ASPECT)
                if image.format == "JPEG" and _content(file).count(SCAN) > MAX_SCANS:
                    raise TooLargeError(f"{label} is a progressive JPEG of more than {MAX_SCANS} scans. Save it anew.")
            return prepared(image, label)

    if not (source.getbuffer().nbytes if isinstance(source, BytesIO) else _size(source)):
        raise DataError(f"{label} cannot be read: it is empty, 0 bytes.")
    with _pillow_errors(label, formats):
        try:
            return read(source)
        except UnidentifiedImageError:
            if formats is None and _is_heic(_content(source)[:12]):
                raise DataError(f"{label} cannot be read: it is a HEIC file, which requires {HEIC_REQUIRES}.") from None
            raise
        except ValueError:  # Pillow's limits on texts and colour profiles, which do not affect the pixels
            stripped = _without_text_chunks(_content(source))
            if stripped is None:
                raise
            return read(BytesIO(stripped))


def _size(file: str | Path) -> int:
    """The size of a file in bytes, 1 for other kinds of paths, which fail when they are opened."""
    return os.path.getsize(file) if os.path.isfile(file) else 1


def _sized(image: Image.Image, label: str) -> str:
    return f"{label} has {image.width} x {image.height} pixels"


def _check_aspect(image: Image.Image, label: str, maximum: int) -> None:
    if max(image.size) > maximum * min(image.size):
        raise TooLargeError(f"{_sized(image, label)}; the maximum aspect ratio is {maximum}:1. Crop it.")


def _content(file: str | Path | BytesIO) -> bytes:
    return file.getvalue() if isinstance(file, BytesIO) else Path(file).read_bytes()


def _is_heic(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:] in HEIC_BRANDS


@contextmanager
def _pillow_errors(label: str, formats: tuple[str, ...] | None = None) -> Iterator[None]:
    """Converts Pillow's exceptions to a DataError."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{label} does not exist.") from error
    except Image.DecompressionBombError as error:
        pixels = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise TooLargeError(f"{label} has more than {pixels:,} pixels, the maximum. Scale it down.") from error
    except UnidentifiedImageError as error:
        expected = f"a {', '.join(formats[:-1])} or {formats[-1]} file" if formats else "an image of a known format"
        raise DataError(f"{label} cannot be read: it is not {expected}.") from error
    except Exception as error:  # Pillow's format readers may raise anything on a damaged file
        raise DataError(f"{label} cannot be read: {error}") from error


def _without_text_chunks(content: bytes) -> bytes | None:
    """A PNG file without its TEXT_CHUNKS; None if it is not a PNG file."""
    if not content.startswith(PNG):
        return None
    chunks, start = [PNG], len(PNG)
    while start + 8 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if content[start + 4 : start + 8] not in TEXT_CHUNKS:
            chunks.append(content[start:end])
        start = end
    return b"".join(chunks)


def prepared(image: Image.Image, label: str = "An image") -> Image.Image:
    """Converts an image, from a file or given as a PIL image, to upright 8-bit RGB.

    Applies the EXIF orientation, composites transparent pixels over white, and scales values that are not 8-bit:
    floats from the range 0 to 1, integers from the smallest of 8, 12 or 16 bits that holds the maximum.

    Raises:
        TooLargeError: the image exceeds MAX_ASPECT.
        DataError: the scale of the pixel values is unknown, the mode has no conversion to RGB, or the file is damaged.
    """
    with _pillow_errors(label):
        _check_aspect(image, label, MAX_ASPECT)
        if ";16" in str(getattr(image, "tile", "")) and len(image.getbands()) > 1:
            image.info[CUT] = True  # `tile`, the only trace of the 16 bits, is lost on loading
        image.load()
        if CUT in image.info and int(np.asarray(image.convert("RGB")).max()) < 16:
            raise DataError(
                f"{label} has 16-bit colours that use 12 bits or fewer, of which Pillow keeps the upper 8: it would be "
                "nearly black. Save it with 8 bits per channel."
            )
        image = _upright(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _to_eight_bit(image, label)
        elif image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            with_alpha = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", with_alpha.size, "white"), with_alpha)
        rgb = image.convert("RGB")
        rgb.info = {}  # the orientation has been applied
        return rgb


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; an image with damaged metadata stays unchanged."""
    try:
        transposition = TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata does not affect the pixels
        transposition = None
    return image if transposition is None else image.transpose(transposition)


def _to_eight_bit(image: Image.Image, label: str) -> Image.Image:
    """Converts a greyscale image of floats or of more than 8 bits to 8 bits."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    is_integer = image.mode != "F"
    scale = next((top for top in (*(() if is_integer else (1,)), 255, 4095, 65535) if high <= top), None)
    ambiguous = not is_integer and 1 < high < 2  # more likely 0 to 1 after a resize than 0 to 255 and nearly black
    if scale is None or ambiguous or not low >= 0:  # also rejects NaN
        raise DataError(
            f"{label} has pixel values from {low:g} to {high:g}, of unknown scale: 8, 12 or 16 "
            "bits and floats from 0 to 1 are supported. Save it as 8-bit or 16-bit greyscale."
        )
    if (
        is_integer
    ):  # by a table, as a copy in float64 would take eight times the memory of an upload of the maximum size
        scaled = np.floor(np.arange(scale + 1) * 255 / scale).astype(np.uint8)[values]
    else:
        scaled = np.rint(values.astype(np.float64) * 255 / scale).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        scaled[values == transparent] = 255
    return Image.fromarray(scaled)
