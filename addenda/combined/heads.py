"""A task's head on the device, and its one fixed-shape call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, plain
from addenda.combined.shapes import HEAD_ROWS, micro_batch
from addenda.registry import Task, check_unwritten


class Head:
    """Computes in float32 at least, whatever the backbone's precision; weights are filled up to HEAD_ROWS."""

    def __init__(self, backbone: FrozenBackbone, task: Task) -> None:
        check_unwritten(task)
        self._dtype = torch.promote_types(backbone.precision, torch.float32)
        self._micro_batch = micro_batch(backbone.device)
        self.num_labels = len(task.labels)

        def fill(tensor: Tensor) -> Tensor:
            moved = tensor.to(backbone.device, self._dtype)
            return F.pad(moved, (0,) * (2 * (tensor.ndim - 1)) + (0, -len(tensor) % HEAD_ROWS))

        with plain(backbone.device):
            self.weight, self.bias = fill(task.head_weight), fill(task.head_bias)
            self.pooled_weight = None if task.pooled_weight is None else fill(task.pooled_weight)
            self.layer_down = None if task.layer_down is None else fill(task.layer_down)
            self.layer_weight = None if task.layer_weight is None else fill(task.layer_weight)
            if self.layer_weight is not None and self.layer_down is not None:
                self.layer_weight = F.pad(self.layer_weight, (0, len(self.layer_down) - self.layer_weight.shape[1]))

    def __call__(
        self, feature: Float[Tensor, "B D"], pooled: Float[Tensor, "B D"] | None, layers: Float[Tensor, "B n"] | None
    ) -> Float[Tensor, "B C"]:
        """Logits from what the head reads: the token's feature (without a token the pooled one), pooled, and layers."""
        logits = F.linear(self._rows(feature), self.weight, self.bias)
        if self.pooled_weight is not None:
            assert pooled is not None
            logits = torch.addmm(logits, self._rows(pooled), self.pooled_weight.T)
        if self.layer_weight is not None:
            assert layers is not None
            rows = self._rows(layers)
            rows = rows if self.layer_down is None else F.linear(rows, self.layer_down)
            logits = torch.addmm(logits, rows, self.layer_weight.T)
        return logits[: feature.shape[0], : self.num_labels].contiguous()

    def _rows(self, features: Tensor) -> Tensor:
        """In the head's precision, filled up to the canonical micro-batch."""
        rows = features.to(self._dtype)
        if torch.compiler.is_compiling():  # a traced pass takes any number of rows, and no bits are promised of it
            return rows
        missing = self._micro_batch - len(rows)
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows  # which would copy them too
