"""The task streams of several candidates over kept activations, with gradients: an epoch for the price of a token."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Int
from torch import Tensor, nn

from addenda.backbones import MIN_ROWS, BlockAdapters, FrozenBackbone, KeyValue
from addenda.combined.attention import memory_key_values, private_read, private_scores

PART_BYTES = 4e6
"""Keys that are at work together on a CPU: more would leave its caches (docs/performance.md)."""


class Batch:
    """Some views, of which `parts`, a few at a time, are fetched in the precision that computes.

    `key_values` are on the device, of which `place` has each view's row; `kin` are those of the tokens of the tasks to
    extend, and `pooled` is the backbone's own feature, of each view. `num_keys` counts frozen tokens and kin.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        key_values: Float16[Tensor, "K L 2 H P d"],
        place: Int[Tensor, " B"],
        kin: Float16[Tensor, "B L 2 H a d"],
        pooled: Float[Tensor, "B D"],
    ) -> None:
        self.pooled = pooled.to(backbone.device)
        self._key_values, self._place = key_values, place.to(backbone.device)
        self._kin = kin.to(backbone.device)
        num_heads, num_tokens, head_dim = key_values.shape[3:]
        self.num_keys = seen = num_tokens + kin.shape[4]
        on_cpu = backbone.device.type == "cpu"
        count = min(len(place), max(1, int(PART_BYTES / (4 * backbone.embed_dim * seen))) if on_cpu else len(place))
        self.parts = [slice(start, min(start + count, len(place))) for start in range(0, len(place), count)]
        self._half = key_values.new_empty(count, num_heads, num_tokens, head_dim)
        self._whole = key_values.new_empty(count, num_heads, seen, head_dim, dtype=backbone.precision)

    def __len__(self) -> int:
        return len(self._place)

    def fetch(self, layer: int, which: int, part: slice) -> Float[Tensor, "c H P d"]:
        """Keys (which = 0) or values (1) of one of the `parts`; the next call overwrites them."""
        place = self._place[part]
        half, whole = self._half[: len(place)], self._whole[: len(place)]
        torch.index_select(self._key_values[:, layer, which], 0, place, out=half)
        whole[:, :, : half.shape[2]].copy_(half)
        whole[:, :, half.shape[2] :].copy_(self._kin[part, layer, which])
        return whole


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


def stream_features(
    backbone: FrozenBackbone,
    batch: Batch,
    class_tokens: Float[Tensor, "S D"],
    memory: Float[Tensor, "S L m D"],
    parent_memory: Sequence[KeyValue] = (),
    adapters: Sequence[BlockAdapters] = (),
) -> Float[Tensor, "S B D"]:
    """The final features of S candidates' tokens over some images, in float32.

    For each layer there may be the memory of the tasks to extend, [1, H, m', d], and the candidates' own adapters.
    """
    precision = backbone.precision
    tokens = backbone.first_tokens(class_tokens.to(precision)).unsqueeze(1).expand(-1, len(batch), -1)
    # On a GPU one by one: a few rows more or less beside them would change the bits of a candidate's memory.
    at_once = len(memory) if backbone.device.type == "cpu" else 1
    for layer, block in enumerate(training_blocks(backbone)):
        updates = adapters[layer] if adapters else None
        queries, keys, values = backbone.family.project(block, tokens, updates)  # [S, H, B, d]
        own = [memory_key_values(backbone, block, rows.to(precision)) for rows in memory[:, layer].split(at_once)]
        inherited = [layers.expand(len(memory), -1, -1, -1) for layers in parent_memory[layer]] if parent_memory else []
        joined = [torch.cat(parts) for parts in zip(*own, strict=True)]
        beside = KeyValue(*(torch.cat([part, *inherited[i : i + 1]], dim=2) for i, part in enumerate(joined)))
        private = KeyValue(keys.unsqueeze(3), values.unsqueeze(3))
        queries = queries * block.attn.scale
        read, weights = _FrozenAttention.apply(batch, layer, queries, private_scores(queries, private, beside))
        read = read + private_read(weights, private, beside)
        tokens = backbone.family.finish(block, tokens, read.transpose(1, 2).flatten(2), updates)
    return backbone.final_norm(tokens).float()


class _FrozenAttention(torch.autograd.Function):
    """One softmax over frozen and private keys, of which it reads the frozen values.

    The frozen keys and values are fetched a few images at a time, in the backward pass again: all at once they would
    fill memory many times over, and a processor's caches not at all.
    """

    @staticmethod
    def forward(
        ctx: Any, batch: Batch, layer: int, queries: Float[Tensor, "S H B d"], private: Float[Tensor, "S H B w"]
    ) -> tuple[Tensor, Tensor]:
        """Returns what each query read of the frozen values, [S, H, B, d], and the weights of its private keys."""
        count, num_frozen = len(queries), batch.num_keys
        asking, beside = _rows(queries), _rows(private)
        read = torch.empty_like(asking)
        joined = torch.cat([asking.new_empty(*asking.shape[:-1], num_frozen), beside], dim=-1)  # [B, H, R, P + w]
        for part in batch.parts:
            here = joined[part]
            here[..., :num_frozen] = _products(asking[part], batch.fetch(layer, 0, part).mT)
            torch.softmax(here, -1, out=here)
            read[part] = _products(here[..., :num_frozen], batch.fetch(layer, 1, part))
        ctx.batch, ctx.layer, ctx.weights = batch, layer, joined
        return _slots(read, count), _slots(joined[..., num_frozen:], count)

    @staticmethod
    def backward(ctx: Any, read: Tensor, weights: Tensor) -> tuple[None, None, Tensor, Tensor]:
        """The softmax's own gradient; keys and values are constants."""
        count, num_frozen = len(read), ctx.batch.num_keys
        of_read = _rows(read)
        queries, gradient = torch.empty_like(of_read), torch.empty_like(ctx.weights)
        gradient[..., num_frozen:] = _rows(weights)
        for part in ctx.batch.parts:
            here, joined = gradient[part], ctx.weights[part]
            here[..., :num_frozen] = _products(of_read[part], ctx.batch.fetch(ctx.layer, 1, part).mT)
            torch.ops.aten._softmax_backward_data.out(here, joined, -1, joined.dtype, grad_input=here)
            queries[part] = _products(here[..., :num_frozen], ctx.batch.fetch(ctx.layer, 0, part))
        return None, None, _slots(queries, count), _slots(gradient[..., num_frozen:], count)


def _products(rows: Float[Tensor, "c H R k"], matrices: Float[Tensor, "c H k n"]) -> Float[Tensor, "c H R n"]:
    """Row by row; unlike `@`, without copying rows that lie apart."""
    products: Tensor = torch.bmm(rows.flatten(0, 1), matrices.flatten(0, 1))
    by_head: Tensor = products.unflatten(0, rows.shape[:2])
    return by_head


def _rows(by_slot: Float[Tensor, "S H B k"]) -> Float[Tensor, "B H R k"]:
    """A candidate a row, by image and head; filled up to MIN_ROWS, since fewer have other bits."""
    count, num_heads, batch, width = by_slot.shape
    filled = by_slot.new_zeros(batch, num_heads, max(count, MIN_ROWS), width)
    filled[:, :, :count] = by_slot.permute(2, 1, 0, 3)
    return filled


def _slots(by_image: Float[Tensor, "B H R k"], count: int) -> Float[Tensor, "S H B k"]:
    """The way back."""
    return by_image[:, :, :count].permute(2, 1, 0, 3)
