"""A bundle: tasks with all that belongs to them in one file, hashed throughout.

It is a safetensors file of bytes: a manifest, which names everything else by its sha256, and the blobs under these
names. Its one metadata value is the manifest's sha256. No path stands in it, and nothing in it is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from addenda.exceptions import IntegrityError, RegistryError
from addenda.files import written
from addenda.registry.exchange.manifest import Contents, fault
from addenda.registry.exchange.selection import Arrived, Read
from addenda.registry.store.digests import blamed, canonical_json, digest

FORMAT = 1
_KEY, _MANIFEST = "addenda", "manifest"
_MAX_MANIFEST = 100_000_000  # bytes; read as JSON it takes several times as much memory


class _Format(BaseModel):
    format: int


class _Manifest(Contents):
    format: Literal[1]


def write(path: Path, contents: Contents, read: Read, mode: int) -> None:
    """Writes a bundle, whole or not at all, to a file that does not exist; it is held in memory meanwhile."""
    taken = RegistryError(f"{str(path)!r} exists already: name another file, or remove it.")
    if path.exists():
        raise taken
    manifest = _encoded(contents)
    if len(manifest) > _MAX_MANIFEST:
        raise RegistryError(f"{len(contents.tasks):,} tasks are too many for one bundle: export fewer, or merge.")
    blobs = {_MANIFEST: manifest}
    for entry in contents.tasks:
        with blamed(f"Task {entry.ref!r} cannot be exported"):
            blobs |= {sha256: read(sha256) for sha256 in entry.blobs}
    tensors = {name: np.frombuffer(data, np.uint8) for name, data in blobs.items()}
    try:
        with written(path, mode, replace=False) as unfinished:
            unfinished.write_bytes(save(tensors, metadata={_KEY: digest(manifest)}))
    except FileExistsError as error:
        raise taken from error
    except OSError as error:
        raise RegistryError(f"Bundle {str(path)!r} was not written: {error.strerror}.") from error


@contextmanager
def opened(path: Path) -> Iterator[tuple[Arrived, str]]:
    """What has come in a bundle, to be read while it is open, every byte hashed before; and `bundle:SHA256` of it."""
    what = f"Bundle {str(path)!r} cannot be taken in"
    try:
        file: Any = safe_open(path, framework="numpy")
    except OSError as error:
        raise RegistryError(f"{what}: {error}.") from error
    except SafetensorError as error:
        raise IntegrityError(f"{what}: it is cut off, or no bundle ({error}).") from error

    def read(sha256: str) -> bytes:
        data: bytes = file.get_tensor(sha256).tobytes()
        if digest(data) != sha256:
            raise IntegrityError(f"its bytes of sha256 {sha256[:16]}… have changed")
        return data

    with file:
        try:
            contents, sha256 = _contents(file)
            for name in sorted(set(file.keys()) - {_MANIFEST}):
                read(name)
        except ValidationError as error:
            raise IntegrityError(f"{what}: {fault(error)}.") from error
        except RecursionError as error:
            raise IntegrityError(f"{what}: its manifest is nested too deeply.") from error
        except (RegistryError, SafetensorError) as error:  # a name that is none is a RegistryError
            raise IntegrityError(f"{what}: {str(error).rstrip('.')}.") from error
        yield (contents, read, ()), f"bundle:{sha256}"


def _encoded(contents: Contents) -> bytes:
    """A manifest; raises IntegrityError where a number in it is not finite."""
    try:
        return canonical_json({"format": FORMAT, **contents.model_dump(exclude_defaults=True)}).encode()
    except ValueError as error:
        raise IntegrityError(f"its manifest is not valid: {error}") from error


def _contents(file: Any) -> tuple[Contents, str]:
    """The contents of an open bundle, and its manifest's sha256; whether its blobs are whole is not looked at."""
    names, sha256 = set(file.keys()), (file.metadata() or {}).get(_KEY)
    if sha256 is None or _MANIFEST not in names:
        raise IntegrityError("it is no bundle: `addenda tasks export` writes one")
    for name in names:
        part = file.get_slice(name)
        if part.get_dtype() != "U8" or len(part.get_shape()) != 1:
            raise IntegrityError(f"it holds {name[:16]!r} as {part.get_dtype()} of shape {part.get_shape()}")
    [size] = file.get_slice(_MANIFEST).get_shape()
    if size > _MAX_MANIFEST:
        raise IntegrityError(f"its manifest has {size:,} bytes, and may have {_MAX_MANIFEST:,}")
    manifest = file.get_tensor(_MANIFEST).tobytes()
    if digest(manifest) != sha256:
        raise IntegrityError("its manifest has changed")
    if (found := _Format.model_validate_json(manifest).format) != FORMAT:
        raise IntegrityError(f"it has format {found}; this version reads {FORMAT}. Upgrade Addenda")
    contents = _Manifest.model_validate_json(manifest)
    if _encoded(contents) != manifest:
        raise IntegrityError("its manifest is not in canonical form")
    expected = {_MANIFEST, *(sha256 for entry in contents.tasks for sha256 in entry.blobs)}
    if wrong := sorted(expected ^ names):
        state = "lacks" if wrong[0] in expected else "holds in excess"
        raise IntegrityError(f"it {state} {wrong[0][:16]!r}")
    return contents, sha256
