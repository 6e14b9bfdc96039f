"""Reading tasks with their tensors; every stored byte is checked against its sha256."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from sqlalchemy import Connection, Row, select
from torch import Tensor

from addenda.exceptions import IntegrityError
from addenda.registry.store import schema
from addenda.registry.store.digests import blamed, digest
from addenda.registry.store.queries import ref_of, with_ancestors
from addenda.registry.store.task import Golden, Task, decode

MAX_BYTES = 5_000_000  # most that one task's statistics may weigh


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Sums over the features of the N images that a task was learned from; no image, and of features but a sample.

    They may be a stranger's: `decode` and `check` say in words what does not fit, so no shape is promised before.

    Attributes:
        counts: images of each class, Int64[C].
        sums: features added up, for each class, Float32[C, F].
        gram: the upper triangle, row by row, of the sum of each feature's product with itself, Float32[F (F + 1) / 2].
        sample: the backbone's own features of some of the images, Float32[K, D].
        sample_targets: the classes of these, Int64[K].
    """

    counts: Tensor
    sums: Tensor
    gram: Tensor
    sample: Tensor
    sample_targets: Tensor

    @cached_property
    def data(self) -> bytes:
        """The statistics as safetensors; equal content gives equal bytes."""
        return bytes(save({field.name: getattr(self, field.name).contiguous() for field in fields(self)}))

    @property
    def excess(self) -> str | None:
        """Why they may not be kept, if they weigh too much."""
        if len(self.data) <= MAX_BYTES:
            return None
        found = f"statistics of {len(self.counts)} classes weigh {len(self.data):,} bytes"
        return f"{found}, and a task may have {MAX_BYTES:,}"

    @cached_property
    def sha256(self) -> str:
        """The identity of the content."""
        return digest(self.data)

    @classmethod
    def decode(cls, data: bytes, sha256: str, num_classes: int) -> FeatureStatistics:
        """Reads stored statistics of so many classes; IntegrityError where the bytes are none, or others."""
        if digest(data) != sha256:
            raise IntegrityError("its statistics' stored bytes have changed")
        try:
            found = cls(**load(data))
        except (SafetensorError, TypeError) as error:
            raise IntegrityError(f"its statistics are not valid: {error}") from error
        found.check(num_classes)
        return found

    def check(self, num_classes: int) -> None:
        """Raises IntegrityError unless the tensors fit each other and the number of classes, and are finite."""
        width = self.sums.shape[-1] if self.sums.ndim else 0
        fits = (
            self.counts.shape == (num_classes,)
            and self.sums.shape == (num_classes, width)
            and self.gram.shape == (width * (width + 1) // 2,)
            and self.sample.ndim == 2
            and self.sample_targets.shape == (len(self.sample),)
        )
        if not fits:
            shapes = {field.name: list(getattr(self, field.name).shape) for field in fields(self)}
            raise IntegrityError(f"its statistics do not fit {num_classes} classes or each other: {shapes}")
        for name in ("counts", "sample_targets"):
            if (tensor := getattr(self, name)).dtype != torch.int64:
                raise IntegrityError(f"its statistics' {name} must be int64; it is {tensor.dtype}")
        for name in ("sums", "gram", "sample"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise IntegrityError(
                    f"its statistics' {name} must be finite float32; it is {tensor.dtype}, or holds NaN"
                )
        if not ((self.sample_targets >= 0) & (self.sample_targets < num_classes)).all() or (self.counts < 0).any():
            raise IntegrityError("its statistics count or name classes that do not exist")


_ARTIFACTS = 16  # most that one query asks for: one with adapters weighs some megabytes


def load_task(connection: Connection, row: Row[Any]) -> Task:
    """Decodes a task and its ancestors, as `load_tasks` does."""
    return load_tasks(connection, [row])[0]


def load_tasks(connection: Connection, rows: Sequence[Row[Any]]) -> list[Task]:
    """Decodes tasks and their ancestors, each once, with few queries and few artifacts in memory at a time."""
    wanted, parents = with_ancestors(connection, rows)
    artifact = schema.artifact.c
    found: dict[int, Task | IntegrityError] = {}
    ids = sorted(wanted)  # parents have smaller numbers than their children
    for start in range(0, len(ids), _ARTIFACTS):
        some = ids[start : start + _ARTIFACTS]
        query = select(artifact.sha256, artifact.data)
        hashes = {wanted[task_id].artifact for task_id in some}
        stored = dict(connection.execute(query.where(artifact.sha256.in_(hashes))).all())
        for task_id in some:
            row = wanted[task_id]
            known = {wanted[parent].artifact: found[parent] for parent in parents[task_id] if parent in found}
            try:
                with blamed(f"Task {ref_of(row)!r} cannot be trusted"):
                    task = found[task_id] = _decode(row, stored.get(row.artifact), known)
                _ = task.closure  # while those of its parents are known: a long line of them would be a deep recursion
            except IntegrityError as error:  # an ancestor's is told by the task that was asked for
                found[task_id] = error
    return [_trusted(found[row.id]) for row in rows]


def _decode(row: Row[Any], artifact: bytes | None, parents: Mapping[str, Task | IntegrityError]) -> Task:
    """A task from its row, its artifact, and its parents by sha256."""

    def parent(sha256: str) -> Task:
        found = parents.get(sha256)
        if found is None:
            raise IntegrityError(f"it extends a task with sha256 {sha256[:16]}… that is missing")
        return _trusted(found)

    if artifact is None:
        raise IntegrityError("its artifact is missing")
    task = decode(artifact, row.artifact, parent, stored_in(row))
    if (task.backbone, list(task.labels), task.objective) != (row.backbone, row.labels, row.objective):
        raise IntegrityError("its row and its artifact name different backbones, labels or objectives")
    return task


def stored_in(row: Any) -> dict[str, Any]:
    """What a task's row holds that its artifact does not."""
    return {name: getattr(row, name) for name in ("name", "version", "config", "metrics", "data")}


def _trusted(found: Task | IntegrityError) -> Task:
    if isinstance(found, IntegrityError):
        raise found
    return found


def load_goldens(connection: Connection, row: Row[Any]) -> list[Golden]:
    """A task's golden probes, newest first; IntegrityError for logits that do not hash to their digest."""
    query = select(schema.golden).where(schema.golden.c.task_id == row.id)
    stored = connection.execute(query.order_by(schema.golden.c.created_at.desc())).all()
    for probe in stored:
        if digest(probe.logits) != probe.digest:
            raise IntegrityError(f"Task {ref_of(row)!r}: its golden probe's stored bytes have changed.")
    return [
        Golden(
            numerics=probe.numerics,
            numerics_fingerprint=probe.numerics_fingerprint,
            logits=torch.from_numpy(np.frombuffer(probe.logits, np.float32).copy()).view(-1, len(row.labels)),
            digest=probe.digest,
        )
        for probe in stored
    ]


def load_statistics(connection: Connection, row: Row[Any]) -> FeatureStatistics | None:
    """What a router knows of a task's images; None where nothing was kept, IntegrityError where it has changed."""
    stored = connection.execute(select(schema.statistics).where(schema.statistics.c.task_id == row.id)).first()
    if stored is None:
        return None
    with blamed(f"Task {ref_of(row)!r} cannot be routed to"):
        return FeatureStatistics.decode(stored.data, stored.sha256, len(row.labels))
