"""Which files of a folder are images: by the ends of their names, and where these say nothing, by how they begin."""

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
"""Names of what systems put into people's folders, in lower case; names that begin with a dot are others."""
APART = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow knows and does not decode, or only by another program."""
LEFT_OUT = {
    "hidden": ("hidden or system file or folder", "hidden or system files and folders"),
    "not_images": ("file that Pillow does not read as an image", "files that Pillow does not read as images"),
    "linked_folders": ("link to a folder", "links to folders"),
    "beside_classes": ("image beside the class folders", "images beside the class folders"),
    "beside_parts": ("folder beside the parts", "folders beside the parts"),
    "validation": ("validation folder, since Addenda draws its own part from train", ""),
}
"""Why something in a folder is left out, and the words for one and for several."""
NAMED = 3

LeftOut = Mapping[str, Sequence[Path]]
"""What was left out, by the keys of LEFT_OUT."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is a system's own, and none of a person's pictures."""
    return name.startswith(".") or name.casefold() in SYSTEM


def image_files(folder: Path, deep: bool = True) -> tuple[list[Path], dict[str, list[Path]]]:
    """The image files in a folder in the order of their names, and all that was left out, folders as one.

    What is named as an image is taken for one, whatever it is: reading it will tell. Links to files are followed,
    links to folders are not. Unless `deep`, no folder in it is entered, and only a system's own are reported.

    Raises:
        DataError: a folder cannot be read.
    """
    images: list[Path] = []
    left_out: dict[str, list[Path]] = {}
    known = Image.registered_extensions().items()  # with what plugins have added
    suffixes = {suffix for suffix, kind in known if kind in Image.OPEN and kind not in APART}
    places = [folder]
    while places:
        place = places.pop()
        try:
            with os.scandir(place) as found:
                entries = list(found)
        except OSError as error:
            raise DataError(f"The folder {str(place)!r} cannot be read: {error.strerror}.") from error
        for entry in entries:
            path, is_folder, is_file = Path(entry.path), os.path.isdir(entry), os.path.isfile(entry)
            named = path.suffix.lower() in suffixes
            if is_hidden(entry.name):
                left_out.setdefault("hidden", []).append(path)
            elif is_folder and not deep:
                continue
            elif named and (is_folder or is_file or entry.is_symlink()):  # a link to nothing is an image that is gone
                images.append(path)
            elif is_folder and entry.is_symlink():
                left_out.setdefault("linked_folders", []).append(path)
            elif is_folder:
                places.append(path)
            elif not named and is_file and _begins_as_image(path):
                images.append(path)
            else:
                left_out.setdefault("not_images", []).append(path)
    return sorted(images), {kind: sorted(left_out[kind]) for kind in LEFT_OUT if kind in left_out}


def joined(parts: Iterable[LeftOut]) -> dict[str, list[Path]]:
    """What was left out of several places."""
    every = list(parts)
    found = {kind: [path for part in every for path in part.get(kind, ())] for kind in LEFT_OUT}
    return {kind: paths for kind, paths in found.items() if paths}


def counted(left_out: LeftOut) -> dict[str, int]:
    """How much was left out, by the keys of LEFT_OUT."""
    return {kind: len(paths) for kind, paths in left_out.items()}


def in_words(left_out: LeftOut, folder: Path) -> str:
    """What was left out of a folder, in one line; empty where nothing was."""
    said = []
    for kind, paths in left_out.items():
        named = ", ".join(os.path.relpath(path, folder) for path in paths[:NAMED])
        said.append(f"{len(paths)} {LEFT_OUT[kind][len(paths) > 1]} ({named}{', …' if len(paths) > NAMED else ''})")
    return "; ".join(said)


def _begins_as_image(path: Path) -> bool:
    """Whether Pillow knows a file's format by its first bytes."""
    known = [kind for kind, (_, accept) in Image.OPEN.items() if accept is not None and kind not in APART]
    try:
        with Image.open(path, formats=known):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow lets through what its readers stumble over, of any kind
        return False
