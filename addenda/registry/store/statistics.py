"""What a task's images say of it to a router: sums over the backbone's features, made once and never changed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from addenda.exceptions import IntegrityError
from addenda.registry.store.hashing import digest

MAX_BYTES = 5_000_000
"""Most that one task's statistics may weigh."""


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
        encoded: bytes = save({field.name: getattr(self, field.name).contiguous() for field in fields(self)})
        return encoded

    @property
    def excess(self) -> str | None:
        """Why they may not be kept, if they weigh too much."""
        if len(self.data) <= MAX_BYTES:
            return None
        weight = f"{len(self.data):,} bytes, and a task may have {MAX_BYTES:,}"
        return f"statistics of {len(self.counts)} classes weigh {weight}"

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
