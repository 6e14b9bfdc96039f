"""The linear layers of frozen blocks in training: on a CPU by oneDNN, weights without gradients.

MKL, which torch takes for float32, leaves half of AVX-512 unused on processors of other makers than its own
(docs/performance.md); oneDNN comes with torch too, and multiplies in float32 all the same.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from addenda.backbones import MIN_ROWS, FrozenBackbone


def training_blocks(backbone: FrozenBackbone) -> list[Any]:
    """The backbone's blocks, sharing its weights, for tokens to pass with gradients."""
    if backbone.device.type != "cpu" or backbone.precision != torch.float32 or not torch.backends.mkldnn.is_available():
        return backbone.blocks
    if "training_blocks" not in backbone.memo:
        backbone.memo["training_blocks"] = [_copy(block) for block in backbone.blocks]
    blocks: list[Any] = backbone.memo["training_blocks"]
    return blocks


def _copy(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return _FrozenLinear(module.weight.detach(), None if module.bias is None else module.bias.detach())
    copied = copy(module)
    copied._modules = {name: child and _copy(child) for name, child in module._modules.items()}
    return copied


class _FrozenLinear(nn.Module):
    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def forward(self, rows: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        product: Tensor = _Product.apply(rows, self._weight, self._bias)
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _product(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _product(gradient, ctx.weight.t(), None), None, None


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output; one row is filled up, since alone it has other bits than in company."""
    flat = rows.flatten(0, -2)
    filled = F.pad(flat, (0, 0, 0, max(0, MIN_ROWS - len(flat))))
    product: Tensor = torch.ops.mkldnn._linear_pointwise(filled, weight, bias, "none", [], "")
    kept: Tensor = product[: len(flat)].unflatten(0, rows.shape[:-1])
    return kept
