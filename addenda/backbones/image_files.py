"""Finds the image files in a folder, by file extension, or else by their first bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from addenda.exceptions import DataError

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
    "linked_folders": ("link to a folder", "links to folders"),
    "beside_classes": ("image beside the class folders", "images beside the class folders"),
    "beside_parts": ("folder beside the splits", "folders beside the splits"),
    "validation": ("validation folder, because Addenda draws its own validation split from train", ""),
}
"""The reasons for which entries of a folder are left out, with their singular and plural."""
MAX_NAMED = 3
"""Maximum number of paths per reason that a message names."""

LeftOut = Mapping[str, Sequence[Path]]
"""Paths that were left out, by the keys of LEFT_OUT."""


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
    left_out: dict[str, list[Path]] = {}
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
                left_out.setdefault("hidden", []).append(path)
            elif is_folder and not deep:
                continue
            elif has_image_suffix and (is_folder or is_file or entry.is_symlink()):  # broken links fail when read
                images.append(path)
            elif is_folder and entry.is_symlink():
                left_out.setdefault("linked_folders", []).append(path)
            elif is_folder:
                folders.append(path)
            elif not has_image_suffix and is_file and _has_image_header(path):
                images.append(path)
            else:
                left_out.setdefault("not_images", []).append(path)
    return sorted(images), {kind: sorted(left_out[kind]) for kind in LEFT_OUT if kind in left_out}


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
