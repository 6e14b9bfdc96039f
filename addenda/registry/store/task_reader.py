"""Loading tasks, golden probes and routing statistics, checked against their digests."""

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
from addenda.registry.store.digests import digest, integrity_errors
from addenda.registry.store.queries import ref_of, with_ancestors
from addenda.registry.store.task import Golden, Task, decode

MAX_BYTES = 5_000_000  # maximum size of one task's statistics


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Routing statistics: sums over the features of a task's training images, and a sample of the features.

    A router chooses among tasks by them, and a task grows from its own. They contain no images. Imported statistics are
    untrusted: no shape is guaranteed before `check`.

    Attributes:
        counts: number of images per class, Int64[C].
        sums: sum of the features per class, Float32[C, F].
        gram: upper triangle, row by row, of the sum of the features' outer products, Float32[F (F + 1) / 2].
        sample: frozen features of some of the images, Float32[K, D].
        sample_targets: classes of the sample, Int64[K].
        layer_sums, layer_gram, layer_sample: the same of hashed layer features; None in statistics of version 0.1, of
            backbones without layer features, and of tasks with many classes.
        layer_lengths: sum of the length of each of the V vectors of layer features, Float32[V]; None if not stored.
        layer_directions: sum of these vectors scaled to length 1, Float32[n]; None if not stored.
        digests: first eight bytes of each image's sha256, class by class, Int64[N]; None if they were not stored.
    """

    counts: Tensor
    sums: Tensor
    gram: Tensor
    sample: Tensor
    sample_targets: Tensor
    layer_sums: Tensor | None = None
    layer_gram: Tensor | None = None
    layer_sample: Tensor | None = None
    layer_lengths: Tensor | None = None
    layer_directions: Tensor | None = None
    digests: Tensor | None = None

    @property
    def layers(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The sums, Gram matrix and sample of the hashed layer features, if present."""
        if self.layer_sums is None or self.layer_gram is None or self.layer_sample is None:
            return None
        return self.layer_sums, self.layer_gram, self.layer_sample

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in values.items() if tensor is not None}

    @cached_property
    def data(self) -> bytes:
        """The statistics as safetensors bytes; equal content gives equal bytes."""
        return bytes(save({name: tensor.contiguous() for name, tensor in self.tensors.items()}))

    @property
    def excess(self) -> str | None:
        """A message if the statistics are too large, or None."""
        if len(self.data) <= MAX_BYTES:
            return None
        size = f"statistics of {len(self.counts)} classes have {len(self.data):,} bytes"
        return f"{size}; the maximum is {MAX_BYTES:,}"

    @cached_property
    def sha256(self) -> str:
        """The sha256 of `data`."""
        return digest(self.data)

    @classmethod
    def decode(cls, data: bytes, sha256: str, num_classes: int) -> FeatureStatistics:
        """Decodes stored statistics; raises IntegrityError if they are not valid for the number of classes."""
        if digest(data) != sha256:
            raise IntegrityError("its statistics' stored bytes have changed")
        try:
            statistics = cls(**load(data))
        except (SafetensorError, TypeError) as error:
            raise IntegrityError(f"its statistics are not valid: {error}") from error
        statistics.check(num_classes)
        return statistics

    def check(self, num_classes: int) -> None:
        """Raises IntegrityError unless the tensors are finite and fit each other and the number of classes."""
        fits = self.counts.shape == (num_classes,) and self.sample_targets.ndim == 1
        fits &= self.layers is not None or not any(name.startswith("layer_") for name in self.tensors)
        fits &= all(each is None or each.ndim == 1 for each in (self.layer_lengths, self.layer_directions))
        if self.digests is not None:
            fits &= self.digests.ndim == 1 and bool(self.counts.sum() == len(self.digests))
        for sums, gram, sample in ((self.sums, self.gram, self.sample), *([self.layers] if self.layers else [])):
            width = sums.shape[-1] if sums.ndim else 0
            fits &= sums.shape == (num_classes, width) and gram.shape == (width * (width + 1) // 2,)
            fits &= sample.ndim == 2 and self.sample_targets.shape == (len(sample),)
        if not fits:
            shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
            raise IntegrityError(f"its statistics do not fit {num_classes} classes or each other: {shapes}")
        for name, tensor in self.tensors.items():
            if name in ("counts", "sample_targets", "digests"):
                if tensor.dtype != torch.int64:
                    raise IntegrityError(f"its statistics' {name} must be int64, not {tensor.dtype}")
            elif tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise IntegrityError(
                    f"its statistics' {name} must be finite float32; it is {tensor.dtype}, or contains NaN or infinity"
                )
        if not ((self.sample_targets >= 0) & (self.sample_targets < num_classes)).all() or (self.counts < 0).any():
            raise IntegrityError("its statistics have negative counts or classes out of range")


_BATCH = 16  # artifacts per query; an artifact with adapters has some megabytes


def load_task(connection: Connection, row: Row[Any]) -> Task:
    """Loads a task and its ancestors; see `load_tasks`."""
    return load_tasks(connection, [row])[0]


def load_tasks(connection: Connection, rows: Sequence[Row[Any]]) -> list[Task]:
    """Loads tasks and their ancestors, each once, with few queries and few artifacts in memory at a time."""
    task_rows, parents = with_ancestors(connection, rows)
    artifact = schema.artifact.c
    loaded: dict[int, Task | IntegrityError] = {}
    ids = sorted(task_rows)  # parents have smaller ids than their children
    for start in range(0, len(ids), _BATCH):
        batch = ids[start : start + _BATCH]
        query = select(artifact.sha256, artifact.data)
        hashes = {task_rows[task_id].artifact for task_id in batch}
        stored = dict(connection.execute(query.where(artifact.sha256.in_(hashes))).all())
        for task_id in batch:
            row = task_rows[task_id]
            known = {task_rows[parent].artifact: loaded[parent] for parent in parents[task_id] if parent in loaded}
            try:
                with integrity_errors(f"Task {ref_of(row)!r} cannot be trusted"):
                    task = loaded[task_id] = _decode(row, stored.get(row.artifact), known)
                _ = task.closure  # cached parents first: computing a long chain at once would recurse deeply
            except IntegrityError as error:  # raised only if a requested task depends on it
                loaded[task_id] = error
    return [_task_or_raise(loaded[row.id]) for row in rows]


def _decode(row: Row[Any], artifact: bytes | None, parents: Mapping[str, Task | IntegrityError]) -> Task:

    def parent(sha256: str) -> Task:
        task = parents.get(sha256)
        if task is None:
            raise IntegrityError(
                f"it extends a task with sha256 {sha256[:16]}… that is missing. Restore the registry from a backup"
            )
        return _task_or_raise(task)

    if artifact is None:
        raise IntegrityError("its artifact is missing. Restore the registry from a backup")
    task = decode(artifact, row.artifact, parent, row_fields(row))
    if (task.backbone, list(task.labels), task.objective) != (row.backbone, row.labels, row.objective):
        raise IntegrityError("its row and its artifact disagree on backbone, labels or objective")
    return task


def row_fields(row: Any) -> dict[str, Any]:
    """The fields of a task that are in its row but not in its artifact."""
    return {name: getattr(row, name) for name in ("name", "version", "config", "metrics", "data")}


def _task_or_raise(task: Task | IntegrityError) -> Task:
    if isinstance(task, IntegrityError):
        raise task
    return task


def load_goldens(connection: Connection, task_id: int, num_classes: int) -> list[Golden]:
    """A task's golden probes, newest first; raises IntegrityError if logits do not match their digest."""
    columns, goldens = schema.golden.c, []
    query = select(schema.golden).where(columns.task_id == task_id)
    query = query.order_by(columns.created_at.desc(), columns.numerics_fingerprint)  # an import adds several at once
    for row in connection.execute(query):
        if digest(row.logits) != row.digest or len(row.logits) % (4 * num_classes):
            raise IntegrityError("its golden probe's stored bytes have changed")
        logits = torch.from_numpy(np.frombuffer(row.logits, np.float32).copy()).view(-1, num_classes)
        goldens.append(Golden(row.numerics, row.numerics_fingerprint, logits, row.digest))
    return goldens


def load_statistics(connection: Connection, task_id: int, num_classes: int) -> FeatureStatistics | None:
    """A task's routing statistics, or None; raises IntegrityError if they have changed."""
    stored = connection.execute(select(schema.statistics).where(schema.statistics.c.task_id == task_id)).first()
    return None if stored is None else FeatureStatistics.decode(stored.data, stored.sha256, num_classes)
