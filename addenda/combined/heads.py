"""Task heads on the device, applied with fixed shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, plain
from addenda.combined.shapes import HEAD_ROWS, micro_batch
from addenda.registry import Task, check_unwritten


class Head:
    """A task's head, computed in float32 or higher, with weights padded to a multiple of HEAD_ROWS rows."""

    def __init__(self, backbone: FrozenBackbone, task: Task) -> None:
        check_unwritten(task)
        self._dtype = torch.promote_types(backbone.precision, torch.float32)
        self._micro_batch = micro_batch(backbone.device)
        self.num_labels = len(task.labels)

        def pad(tensor: Tensor) -> Tensor:
            on_device = tensor.to(backbone.device, self._dtype)
            return F.pad(on_device, (0,) * (2 * (tensor.ndim - 1)) + (0, -len(tensor) % HEAD_ROWS))

        with plain(backbone.device):
            self.weight, self.bias = pad(task.head_weight), pad(task.head_bias)
            self.pooled_weight = None if task.pooled_weight is None else pad(task.pooled_weight)
            self.layer_down = None if task.layer_down is None else pad(task.layer_down)
            self.layer_weight = None if task.layer_weight is None else pad(task.layer_weight)
            if self.layer_weight is not None and self.layer_down is not None:
                self.layer_weight = F.pad(self.layer_weight, (0, len(self.layer_down) - self.layer_weight.shape[1]))

    def __call__(
        self, feature: Float[Tensor, "B D"], pooled: Float[Tensor, "B D"] | None, layers: Float[Tensor, "B n"] | None
    ) -> Float[Tensor, "B C"]:
        """Logits from the task's feature (the pooled one if head-only), the pooled feature and the layer features."""
        logits = F.linear(self._padded(feature), self.weight, self.bias)
        if self.pooled_weight is not None:
            assert pooled is not None
            logits = torch.addmm(logits, self._padded(pooled), self.pooled_weight.T)
        if self.layer_weight is not None:
            assert layers is not None
            rows = self._padded(layers)
            rows = rows if self.layer_down is None else F.linear(rows, self.layer_down)
            logits = torch.addmm(logits, rows, self.layer_weight.T)
        return logits[: feature.shape[0], : self.num_labels].contiguous()

    def _padded(self, features: Tensor) -> Tensor:
        """Casts features to the head's dtype and pads them with zeros to the canonical micro-batch."""
        rows = features.to(self._dtype)
        if torch.compiler.is_compiling():  # traced for export: any number of rows, no promise about bits
            return rows
        missing = self._micro_batch - len(rows)
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows  # F.pad always copies
