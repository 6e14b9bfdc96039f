"""Tasks in transit: gathered with their ancestors and associated rows, and bundles, which are files of them.

The order of tasks does not depend on the database. A bundle is a safetensors file of byte tensors: a manifest, which
refers to everything else by sha256, and blobs named by their sha256. Its only metadata value is the manifest's sha256.
It contains no paths and is never unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sqlalchemy import Column, Connection, Row, select

from addenda.exceptions import IntegrityError, RegistryError
from addenda.files import written
from addenda.registry.exchange.manifest import BundledAlias, Contents, Entry, first_error
from addenda.registry.store import schema
from addenda.registry.store.digests import canonical_json, digest, integrity_errors
from addenda.registry.store.ledger import INTERNAL
from addenda.registry.store.queries import find, ref_of, rows_where, with_ancestors

M = TypeVar("M", bound=BaseModel)

FORMAT = 1
_KEY, _MANIFEST = "addenda", "manifest"
_ASSOCIATED = (schema.golden, schema.statistics, schema.evaluation, schema.retirement, schema.tag)
_MAX_MANIFEST = 100_000_000  # bytes; parsing takes several times as much memory


class _Format(BaseModel):
    format: int


class _Manifest(Contents):
    format: Literal[1]


ReadBlob = Callable[[str], bytes]
"""Reads one blob by its sha256; raises IntegrityError if the digest does not match."""
Transfer = tuple[Contents, ReadBlob, Sequence[BundledAlias]]
"""Tasks in transit, a function that reads their blobs, and the aliases to set."""


def gather(connection: Connection, refs: Sequence[str] | None) -> Transfer:
    """Gathers tasks and their ancestors, or for None all tasks and aliases; blobs are read on demand."""
    selected = connection.execute(select(schema.task)).all() if refs is None else [find(connection, r) for r in refs]
    rows, parents = with_ancestors(connection, selected)
    for child, parent_ids in parents.items():
        if not rows.keys() >= set(parent_ids):
            raise IntegrityError(f"Task {ref_of(rows[child])!r} extends a task that is missing.")
    associated = {table.name: rows_where(connection, table, "task_id", rows) for table in _ASSOCIATED}
    blobs: dict[str, tuple[Column[bytes], tuple[Any, ...]]] = {}

    def entry(task_id: int) -> Entry:
        row = rows[task_id]
        parent_rows = [rows[parent] for parent in parents[task_id]]
        portable = {name: list(map(_portable, grouped[task_id])) for name, grouped in associated.items()}
        blobs[row.artifact] = schema.artifact.c.data, (row.artifact,)
        for golden in associated["golden"][task_id]:
            blobs[golden.digest] = schema.golden.c.logits, (task_id, golden.numerics_fingerprint)
        for statistics in associated["statistics"][task_id]:
            blobs[statistics.sha256] = schema.statistics.c.data, (task_id,)
        content = {
            "task": _portable(row),
            "parents": [{"name": p.name, "version": p.version, "sha256": p.artifact} for p in parent_rows],
            "goldens": sorted(portable["golden"], key=lambda golden: str(golden["numerics_fingerprint"])),
            "statistics": next((statistics["sha256"] for statistics in portable["statistics"]), None),
            "evaluations": portable["evaluation"],
            "retirement": next(iter(portable["retirement"]), None),
            "tags": sorted(tag["tag"] for tag in portable["tag"]),
        }
        return _validated(Entry, content, f"Task {ref_of(row)!r}")

    def read(sha256: str) -> bytes:
        column, key = blobs[sha256]
        query = select(column).where(*(c == value for c, value in zip(column.table.primary_key, key, strict=True)))
        data = connection.scalar(query)
        if data is None or digest(data) != sha256:
            raise IntegrityError(f"its {column.table.name}'s stored bytes are missing or have changed")
        return data

    tasks: list[Entry] = []
    sorter = TopologicalSorter({task_id: parents[task_id] for task_id in rows})
    sorter.prepare()
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=lambda task_id: (rows[task_id].name, rows[task_id].version))
        tasks += map(entry, ready)
        sorter.done(*ready)
    backbones = rows_where(connection, schema.backbone, "fingerprint", {row.backbone for row in rows.values()})
    records = [_portable(row) for fingerprint in sorted(backbones) for row in backbones[fingerprint]]
    contents = _validated(Contents, {"backbones": records, "tasks": tasks}, "A backbone")
    if refs is not None:
        return contents, read, ()
    query = select(schema.alias.c.name, schema.alias.c.alias, schema.task.c.version)
    alias_rows = connection.execute(query.join_from(schema.alias, schema.task))
    aliases = [BundledAlias.model_validate(row._asdict()) for row in alias_rows]
    return contents, read, sorted(aliases, key=lambda alias: (alias.name, alias.alias))


def _validated(model: type[M], content: dict[str, Any], what: str) -> M:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise IntegrityError(f"{what} has a damaged record: {first_error(error)}.") from error


def _portable(row: Row[Any]) -> dict[str, Any]:
    """A row without the ids of its database."""
    return {key: value for key, value in row._mapping.items() if key not in INTERNAL}


def write(path: Path, contents: Contents, read: ReadBlob, mode: int) -> None:
    """Writes a bundle atomically to a new file; the whole bundle is built in memory."""
    exists_error = RegistryError(f"The file {str(path)!r} exists; choose another name, or remove it.")
    if path.exists():
        raise exists_error
    manifest = _encode_manifest(contents)
    if len(manifest) > _MAX_MANIFEST:
        raise RegistryError(f"{len(contents.tasks):,} tasks are too many for one bundle; export fewer, or merge.")
    blobs = {_MANIFEST: manifest}
    for entry in contents.tasks:
        with integrity_errors(f"Task {entry.ref!r} cannot be exported"):
            blobs |= {sha256: read(sha256) for sha256 in entry.blobs}
    tensors = {name: np.frombuffer(data, np.uint8) for name, data in blobs.items()}
    try:
        with written(path, mode, replace=False) as unfinished:
            unfinished.write_bytes(save(tensors, metadata={_KEY: digest(manifest)}))
    except FileExistsError as error:
        raise exists_error from error
    except OSError as error:
        raise RegistryError(f"Bundle {str(path)!r} was not written: {error.strerror}.") from error


@contextmanager
def open_bundle(path: Path) -> Iterator[tuple[Transfer, str]]:
    """Yields a bundle's contents, with all digests checked, and its source name `bundle:SHA256`."""
    context = f"Bundle {str(path)!r} cannot be imported"
    try:
        file: Any = safe_open(path, framework="numpy")
    except OSError as error:
        raise RegistryError(f"{context}: {error}.") from error
    except SafetensorError as error:
        raise IntegrityError(
            f"{context}: it is truncated or not a bundle ({error}). Copy or export it again."
        ) from error

    def read(sha256: str) -> bytes:
        data: bytes = file.get_tensor(sha256).tobytes()
        if digest(data) != sha256:
            raise IntegrityError(f"its blob with sha256 {sha256[:16]}… has changed. Copy or export it again")
        return data

    with file:
        try:
            contents, sha256 = _contents(file)
            for name in sorted(set(file.keys()) - {_MANIFEST}):
                read(name)
        except ValidationError as error:
            raise IntegrityError(f"{context}: {first_error(error)}.") from error
        except RecursionError as error:
            raise IntegrityError(f"{context}: its manifest is nested too deeply.") from error
        except (RegistryError, SafetensorError) as error:  # RegistryError: an invalid name
            raise IntegrityError(f"{context}: {str(error).rstrip('.')}.") from error
        yield (contents, read, ()), f"bundle:{sha256}"


def _encode_manifest(contents: Contents) -> bytes:
    """Encodes a manifest; raises IntegrityError if a number is not finite."""
    try:
        return canonical_json({"format": FORMAT, **contents.model_dump(exclude_defaults=True)}).encode()
    except ValueError as error:
        raise IntegrityError(f"its manifest is not valid: {error}") from error


def _contents(file: Any) -> tuple[Contents, str]:
    """An open bundle's contents and its manifest's sha256; does not check the blobs' digests."""
    names, sha256 = set(file.keys()), (file.metadata() or {}).get(_KEY)
    if sha256 is None or _MANIFEST not in names:
        raise IntegrityError("it is not a bundle; `addenda tasks export` writes bundles")
    for name in names:
        blob = file.get_slice(name)
        if blob.get_dtype() != "U8" or len(blob.get_shape()) != 1:
            dtype, shape = blob.get_dtype(), blob.get_shape()
            raise IntegrityError(f"its blob {name[:16]!r} has dtype {dtype} and shape {shape}, not a vector of U8")
    [size] = file.get_slice(_MANIFEST).get_shape()
    if size > _MAX_MANIFEST:
        raise IntegrityError(f"its manifest has {size:,} bytes; the maximum is {_MAX_MANIFEST:,}")
    manifest = file.get_tensor(_MANIFEST).tobytes()
    if digest(manifest) != sha256:
        raise IntegrityError("its manifest has changed. Copy or export it again")
    if (version := _Format.model_validate_json(manifest).format) != FORMAT:
        raise IntegrityError(f"it has format {version}; this version reads {FORMAT}. Upgrade Addenda")
    contents = _Manifest.model_validate_json(manifest)
    if _encode_manifest(contents) != manifest:
        raise IntegrityError("its manifest is not in canonical form")
    expected = {_MANIFEST, *(sha256 for entry in contents.tasks for sha256 in entry.blobs)}
    if mismatch := sorted(expected ^ names):
        state = "lacks the blob" if mismatch[0] in expected else "has an unexpected blob"
        raise IntegrityError(f"it {state} {mismatch[0][:16]!r}")
    return contents, sha256
