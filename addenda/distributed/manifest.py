"""What a folder of predictions is made of: its manifest, which is written before the first part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from addenda.exceptions import DataError
from addenda.files import written

FILE = "manifest.json"
PART, PART_FORM = "part-{:05d}.parquet", r"part-\d{5,}\.parquet"
NAMED = 5
"""How many differences a message names."""


@dataclass(frozen=True)
class Manifest:
    """All that the bytes of a folder's parts depend on.

    Attributes:
        images: how many images are asked about.
        images_sha256: sha256 over their paths in order.
        part_size: images in a part; the last has what is left.
        top: most labels of each image and task, as `CombinedModel.predict` takes it.
        exact: whether a task's bits depend on nothing but image, task, backbone and numerics.
        backbone: its fingerprint.
        tasks: sha256 of each task that is answered, by its reference, in order.
        numerics: what the bits depend on beside all this.
        numerics_fingerprint: sha256 over the numerics.
        generation: the registry's, when the tasks were chosen; it only tells.
    """

    images: int
    images_sha256: str
    part_size: int
    top: int | None
    exact: bool
    backbone: str
    tasks: Mapping[str, str]
    numerics: Mapping[str, Any]
    numerics_fingerprint: str
    generation: int

    @property
    def num_parts(self) -> int:
        """Files that there are when all is done."""
        return -(-self.images // self.part_size)

    def bounds(self, part: int) -> slice:
        """Which of the images a part is about."""
        return slice(part * self.part_size, min((part + 1) * self.part_size, self.images))


def paths_digest(paths: Sequence[str]) -> str:
    """sha256 over paths in order.

    Raises:
        DataError: a path that is not UTF-8, which Parquet cannot hold.
    """
    found = hashlib.sha256()
    for path in paths:
        try:
            found.update(path.encode() + b"\0")
        except UnicodeEncodeError as error:
            raise DataError(f"The name of image {path!r} is not UTF-8, which Parquet cannot hold.") from error
    return found.hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is neither one nor anything that it could be of.

    Raises:
        DataError: the folder has parts without a manifest, or one that is none.
    """
    path = folder / FILE
    if not path.exists():
        if next(folder.glob("part-*"), None) is not None:
            raise DataError(f"The folder {str(folder)!r} has parts and no {FILE}: give another --out.")
        return None
    try:
        return Manifest(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{str(path)!r} is not a manifest of predictions ({error}): give another --out.") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes the folder, and the manifest in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with written(folder / FILE) as unfinished:
        unfinished.write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False))


def check_same(folder: Path, before: Manifest, now: Manifest) -> None:
    """Raises a DataError that names what differs between a folder's manifest and what is asked for.

    The generation may differ, and the fingerprint of numerics, which says less than they do.
    """
    one, other = (asdict(each) | {"generation": 0, "numerics_fingerprint": ""} for each in (before, now))
    found = differences(one, other)
    if found:
        raise DataError(
            f"The folder {str(folder)!r} holds other predictions: {named(found)}. Ask for the same, or give another "
            "--out."
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """What differs between two descriptions, in words."""
    found = []
    for key in dict.fromkeys((*before, *now)):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{within}{key} ")
        elif one != other:
            found.append(f"{within}{key} was {_shown(one)}, now {_shown(other)}")
    return found


def named(found: Sequence[str]) -> str:
    """Differences as one text, which names a few of them."""
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return "; ".join(found[:NAMED]) + more


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 64 else f"{text[:12]}…"
