"""A task's head on the device, and its one fixed-shape call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined.layout import micro_batch
from addenda.registry import Task, check_unwritten

HEAD_ROWS = 16


class Head:
    """Computes in float32 at least, whatever the backbone's precision.

    Weights are filled up with zero rows to a multiple of HEAD_ROWS: in narrower products an image's bits depend on its
    place in the batch.

    Args:
        backbone: says where and how precisely.
        task: whose head it is.

    Raises:
        IntegrityError: the task's tensors have been written to.
    """

    def __init__(self, backbone: FrozenBackbone, task: Task) -> None:
        check_unwritten(task)
        self._dtype = torch.promote_types(backbone.precision, torch.float32)
        self._micro_batch = micro_batch(backbone.device)
        self.num_labels = len(task.labels)

        def fill(tensor: Tensor) -> Tensor:
            moved = tensor.to(backbone.device, self._dtype)
            return F.pad(moved, (0,) * (2 * (tensor.ndim - 1)) + (0, -len(tensor) % HEAD_ROWS))

        self.weight, self.bias = fill(task.head_weight), fill(task.head_bias)
        self.pooled_weight = None if task.pooled_weight is None else fill(task.pooled_weight)

    def __call__(self, feature: Float[Tensor, "B D"], pooled: Float[Tensor, "B D"] | None) -> Float[Tensor, "B C"]:
        """Logits from what the head reads: the token's feature (or, head-only, the pooled one), and the pooled one."""
        logits = F.linear(self._rows(feature), self.weight, self.bias)
        if self.pooled_weight is not None:
            assert pooled is not None
            logits = torch.addmm(logits, self._rows(pooled), self.pooled_weight.T)
        return logits[: len(feature), : self.num_labels].contiguous()

    def _rows(self, features: Tensor) -> Tensor:
        """In the head's precision, filled up to the canonical micro-batch."""
        return F.pad(features.to(self._dtype), (0, 0, 0, self._micro_batch - len(features)))
