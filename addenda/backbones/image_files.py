"""Image files: finds them in a folder, and reads them ahead of the model, on several threads and in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from addenda.backbones.frozen import FrozenBackbone
from addenda.backbones.images import HEIC_REQUIRES, read_image
from addenda.exceptions import DataError, UnsteadyError

SYSTEM = frozenset({
    "__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found",
    "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
})  # fmt: skip
"""Names, in lower case, of files and folders that operating systems create; names with a leading dot are hidden too."""
UNDECODABLE = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow registers but cannot decode, or only with an external program."""
LEFT_OUT = {
    "hidden": ("hidden or system file or folder", "hidden or system files and folders"),
    "not_images": ("file that Pillow does not read as an image", "files that Pillow does not read as images"),
    "heic": (f"HEIC image, which requires {HEIC_REQUIRES}", f"HEIC images, which require {HEIC_REQUIRES}"),
    "linked_folders": ("link to a folder", "links to folders"),
    "beside_classes": ("image beside the class folders", "images beside the class folders"),
    "beside_parts": ("folder beside the splits", "folders beside the splits"),
    "validation": ("validation folder, because Addenda draws its own validation split from train", ""),
}
"""The reasons for which entries of a folder are left out, with their singular and plural."""
HEIC = frozenset({".heic", ".heif", ".hif"})
"""Extensions of photos that Pillow reads with the extra `heic`."""
MAX_NAMED = 3
"""Maximum number of paths per reason that a message names."""

LeftOut = Mapping[str, Sequence[Path]]
"""Paths that were left out, by the keys of LEFT_OUT."""

THREADS = 2
"""Threads that read, decode and transform; Pillow releases the GIL, and two keep up with a ViT-Ti on two cores."""

Row = TypeVar("Row")
Value = TypeVar("Value")
Name = TypeVar("Name", bound=str | Path)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or belongs to the operating system."""
    return name.startswith(".") or name.casefold() in SYSTEM


def image_files(folder: Path, deep: bool = True) -> tuple[list[Path], dict[str, list[Path]]]:
    """The image files in a folder, sorted by path, and the paths that were left out; a folder counts as one path.

    A file with an image extension counts as an image without being opened. Links to files are followed, links to
    folders are not. Unless `deep`, subfolders are skipped, and only hidden ones are reported.

    Raises:
        DataError: a folder cannot be read.
    """
    images: list[Path] = []
    left_out: dict[str, list[Path]] = {kind: [] for kind in LEFT_OUT}
    known = Image.registered_extensions().items()  # including those of plugins
    suffixes = {suffix for suffix, kind in known if kind in Image.OPEN and kind not in UNDECODABLE}
    folders = [folder]
    while folders:
        current = folders.pop()
        try:
            with os.scandir(current) as scan:
                entries = list(scan)
        except OSError as error:
            raise DataError(f"The folder {str(current)!r} cannot be read: {error.strerror}.") from error
        for entry in entries:
            path, is_folder, is_file = Path(entry.path), os.path.isdir(entry), os.path.isfile(entry)
            has_image_suffix = path.suffix.lower() in suffixes
            if is_hidden(entry.name):
                left_out["hidden"].append(path)
            elif is_folder and not deep:
                continue
            elif has_image_suffix and (is_folder or is_file or not os.path.exists(entry)):  # broken links fail later
                images.append(path)
            elif is_folder and entry.is_symlink():
                left_out["linked_folders"].append(path)
            elif is_folder:
                folders.append(path)
            elif not has_image_suffix and is_file and _has_image_header(path):
                images.append(path)
            else:
                left_out["heic" if path.suffix.lower() in HEIC else "not_images"].append(path)
    return sorted(images), {kind: sorted(paths) for kind, paths in left_out.items() if paths}


def joined(left_outs: Iterable[LeftOut]) -> dict[str, list[Path]]:
    """Combines the left-out paths of several folders."""
    left_outs = list(left_outs)
    combined = {kind: [path for left_out in left_outs for path in left_out.get(kind, ())] for kind in LEFT_OUT}
    return {kind: paths for kind, paths in combined.items() if paths}


def counted(left_out: LeftOut) -> dict[str, int]:
    """Numbers of left-out paths, by the keys of LEFT_OUT."""
    return {kind: len(paths) for kind, paths in left_out.items()}


def in_words(left_out: LeftOut, folder: Path) -> str:
    """Describes the left-out paths of a folder in one line; empty if there are none."""
    phrases = []
    for kind, paths in left_out.items():
        named = ", ".join(os.path.relpath(path, folder) for path in paths[:MAX_NAMED])
        more = ", …" if len(paths) > MAX_NAMED else ""
        phrases.append(f"{len(paths)} {LEFT_OUT[kind][len(paths) > 1]} ({named}{more})")
    return "; ".join(phrases)


def _has_image_header(path: Path) -> bool:
    """Whether Pillow recognises a file's format from its first bytes."""
    known = [kind for kind, (_, accept) in Image.OPEN.items() if accept is not None and kind not in UNDECODABLE]
    try:
        with Image.open(path, formats=known):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's format readers may raise anything
        return False


def read_ahead(
    rows: Sequence[Row], read: Callable[[Row], Value], ahead: int, threads: int = THREADS
) -> Iterator[tuple[Row, Value | DataError]]:
    """Reads rows in order in the background while the caller processes earlier ones.

    At most `ahead` rows are read before they are requested, which bounds the memory. A DataError of `read` is yielded
    in place of the value; an UnsteadyError is raised.
    """

    def attempt(row: Row) -> Value | DataError:
        try:
            return read(row)
        except UnsteadyError:
            raise
        except DataError as error:
            return error

    remaining, pool = iter(rows), ThreadPoolExecutor(threads)
    try:
        pending = deque((row, pool.submit(attempt, row)) for row in islice(remaining, max(ahead, threads)))
        while pending:
            row, future = pending.popleft()
            value = future.result()
            pending.extend((following, pool.submit(attempt, following)) for following in islice(remaining, 1))
            yield row, value
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Files(Generic[Name]):
    """A batch of image files."""

    asked: list[Name]  # all files of the batch, in order
    images: Float[Tensor, "B 3 H W"]  # model inputs of the readable files
    bad: dict[Name, str]  # error messages of the unreadable files

    @property
    def paths(self) -> list[Name]:
        """The readable files."""
        return [path for path in self.asked if path not in self.bad]


def read_files(
    backbone: FrozenBackbone, paths: Sequence[Name], size: int, skip_bad: bool = False
) -> Iterator[Files[Name]]:
    """Reads image files in batches of `size`, transformed for a backbone.

    Raises:
        DataError: a path is none, or a file is not a readable image, and `skip_bad` is False.
    """
    if others := [path for path in paths if not isinstance(path, str | os.PathLike)]:
        raise DataError(f"Images are given by the paths of their files, not as {type(others[0]).__name__}.")
    reading = read_ahead(paths, lambda path: backbone.transform(read_image(path)), size)
    empty = torch.empty(0, *backbone.preprocessing["input_size"], dtype=torch.float32, device="cpu")
    while batch := list(islice(reading, size)):
        bad = {path: error for path, error in batch if isinstance(error, DataError)}
        if bad and not skip_bad:
            raise next(iter(bad.values()))
        images = [image for _, image in batch if isinstance(image, Tensor)]
        yield Files(
            [path for path, _ in batch],
            torch.stack(images) if images else empty,
            {path: str(error) for path, error in bad.items()},
        )
