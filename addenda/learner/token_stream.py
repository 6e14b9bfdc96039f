"""Task streams of several candidates over cached activations, with gradients: an epoch costs one token per image."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Int
from torch import Tensor, nn

from addenda.backbones import MIN_ROWS, BlockAdapters, FrozenBackbone, KeyValue
from addenda.combined.forward import private_read, private_scores
from addenda.combined.tiles import memory_key_values

CHUNK_BYTES = 4e6
"""Size of the keys that are processed together on a CPU, so that they fit its caches (docs/performance.md)."""


class Batch:
    """Cached activations of B views, fetched chunk by chunk (`chunks`) in the backbone's precision.

    `rows` has each view's row in `key_values`, which are on the device. `parent_key_values` are the keys and values of
    the tokens of the tasks to extend, and `pooled` is the backbone's own feature. `num_keys` counts frozen tokens and
    parents' tokens.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        key_values: Float16[Tensor, "K L 2 H P d"],
        rows: Int[Tensor, " B"],
        parent_key_values: Float16[Tensor, "B L 2 H a d"],
        pooled: Float[Tensor, "B D"],
    ) -> None:
        self.pooled = pooled.to(backbone.device)
        self._key_values, self._rows = key_values, rows.to(backbone.device)
        self._parent_key_values = parent_key_values.to(backbone.device)
        num_heads, num_tokens, head_dim = key_values.shape[3:]
        self.num_keys = num_keys = num_tokens + parent_key_values.shape[4]
        on_cpu = backbone.device.type == "cpu"
        size = min(len(rows), max(1, int(CHUNK_BYTES / (4 * backbone.embed_dim * num_keys))) if on_cpu else len(rows))
        self.chunks = [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        self._half = key_values.new_empty(size, num_heads, num_tokens, head_dim)
        self._joined = key_values.new_empty(size, num_heads, num_keys, head_dim, dtype=backbone.precision)

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, layer: int, which: int, chunk: slice) -> Float[Tensor, "c H P d"]:
        """Returns the keys (`which=0`) or values (`which=1`) of a chunk, in a buffer that the next call overwrites."""
        rows = self._rows[chunk]
        half, joined = self._half[: len(rows)], self._joined[: len(rows)]
        torch.index_select(self._key_values[:, layer, which], 0, rows, out=half)
        joined[:, :, : half.shape[2]].copy_(half)
        joined[:, :, half.shape[2] :].copy_(self._parent_key_values[chunk, layer, which])
        return joined


def training_blocks(backbone: FrozenBackbone) -> list[Any]:
    """Returns the backbone's blocks for training; they share its weights, and a row's bits do not depend on others.

    On a CPU in float32 their linear layers call oneDNN directly; otherwise they are the backbone's own blocks.
    """
    if backbone.device.type != "cpu" or backbone.precision != torch.float32 or not torch.backends.mkldnn.is_available():
        return backbone.blocks
    if "training_blocks" not in backbone.memo:
        backbone.memo["training_blocks"] = [_freeze_linear_layers(block) for block in backbone.blocks]
    blocks: list[Any] = backbone.memo["training_blocks"]
    return blocks


def _freeze_linear_layers(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return _FrozenLinear(module.weight.detach(), None if module.bias is None else module.bias.detach())
    copied = copy(module)
    copied._modules = {name: child and _freeze_linear_layers(child) for name, child in module._modules.items()}
    return copied


class _FrozenLinear(nn.Module):
    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def forward(self, rows: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        output: Tensor = _FrozenLinearFunction.apply(rows, self._weight, self._bias)
        return output


class _FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _linear(gradient, ctx.weight.t(), None), None, None


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Applies a linear layer by oneDNN, padded to MIN_ROWS rows: a single row would have other bits."""
    flat = rows.flatten(0, -2)
    padded = F.pad(flat, (0, 0, 0, max(0, MIN_ROWS - len(flat))))
    product: Tensor = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    output: Tensor = product[: len(flat)].unflatten(0, rows.shape[:-1])
    return output


def stream_features(
    backbone: FrozenBackbone,
    batch: Batch,
    class_tokens: Float[Tensor, "S D"],
    memory: Float[Tensor, "S L m D"],
    parent_memory: Sequence[KeyValue] = (),
    adapters: Sequence[BlockAdapters] = (),
) -> Float[Tensor, "S B D"]:
    """Computes the final features of S candidates' tokens in float32.

    Args:
        backbone: the frozen backbone.
        batch: cached activations of B views.
        class_tokens: the candidates' class tokens.
        memory: the candidates' memory tokens.
        parent_memory: for each layer the memory keys and values of the tasks to extend, [1, H, m', d].
        adapters: for each layer the candidates' adapters.
    """
    precision = backbone.precision
    tokens = backbone.first_tokens(class_tokens.to(precision)).unsqueeze(1).expand(-1, len(batch), -1)
    # On a GPU the memory of each candidate is projected separately: its bits depend on the number of rows.
    group_size = len(memory) if backbone.device.type == "cpu" else 1
    for layer, block in enumerate(training_blocks(backbone)):
        updates = adapters[layer] if adapters else None
        queries, keys, values = backbone.family.project(block, tokens, updates)  # [S, H, B, d]
        groups = [memory_key_values(backbone, block, rows.to(precision)) for rows in memory[:, layer].split(group_size)]
        inherited = [layers.expand(len(memory), -1, -1, -1) for layers in parent_memory[layer]] if parent_memory else []
        own = [torch.cat(parts) for parts in zip(*groups, strict=True)]
        memory_kv = KeyValue(*(torch.cat([part, *inherited[i : i + 1]], dim=2) for i, part in enumerate(own)))
        private = KeyValue(keys.unsqueeze(3), values.unsqueeze(3))
        queries = queries * block.attn.scale
        scores = torch.cat(private_scores(queries, private, memory_kv), dim=-1)
        attended, weights = _FrozenAttention.apply(batch, layer, queries, scores)
        attended = attended + private_read(weights, private, memory_kv)
        tokens = backbone.family.finish(block, tokens, attended.transpose(1, 2).flatten(2), updates)
    return backbone.final_norm(tokens).float()


class _FrozenAttention(torch.autograd.Function):
    """Softmax over frozen and private keys together, and the weighted sum of the frozen values.

    Frozen keys and values are fetched in chunks, again in the backward pass, so that they need little memory and stay
    in a CPU's caches.
    """

    @staticmethod
    def forward(
        ctx: Any, batch: Batch, layer: int, queries: Float[Tensor, "S H B d"], private: Float[Tensor, "S H B w"]
    ) -> tuple[Tensor, Tensor]:
        """Returns each query's weighted sum of the frozen values, [S, H, B, d], and the weights of its private keys."""
        count, num_frozen = len(queries), batch.num_keys
        query_rows, private_rows = _by_image(queries), _by_image(private)
        attended = torch.empty_like(query_rows)
        weights = torch.cat(
            [query_rows.new_empty(*query_rows.shape[:-1], num_frozen), private_rows], dim=-1
        )  # [B, H, R, P + w]
        for chunk in batch.chunks:
            chunk_weights = weights[chunk]
            chunk_weights[..., :num_frozen] = _matmul(query_rows[chunk], batch.fetch(layer, 0, chunk).mT)
            torch.softmax(chunk_weights, -1, out=chunk_weights)
            attended[chunk] = _matmul(chunk_weights[..., :num_frozen], batch.fetch(layer, 1, chunk))
        ctx.batch, ctx.layer, ctx.weights = batch, layer, weights
        return _by_candidate(attended, count), _by_candidate(weights[..., num_frozen:], count)

    @staticmethod
    def backward(ctx: Any, attended: Tensor, weights: Tensor) -> tuple[None, None, Tensor, Tensor]:
        """Returns the gradients of queries and private scores; frozen keys and values are constants."""
        count, num_frozen = len(attended), ctx.batch.num_keys
        attended_rows = _by_image(attended)
        queries, gradient = torch.empty_like(attended_rows), torch.empty_like(ctx.weights)
        gradient[..., num_frozen:] = _by_image(weights)
        for chunk in ctx.batch.chunks:
            chunk_gradient, chunk_weights = gradient[chunk], ctx.weights[chunk]
            frozen_values = ctx.batch.fetch(ctx.layer, 1, chunk)
            chunk_gradient[..., :num_frozen] = _matmul(attended_rows[chunk], frozen_values.mT)
            torch.ops.aten._softmax_backward_data.out(
                chunk_gradient, chunk_weights, -1, chunk_weights.dtype, grad_input=chunk_gradient
            )
            queries[chunk] = _matmul(chunk_gradient[..., :num_frozen], ctx.batch.fetch(ctx.layer, 0, chunk))
        return None, None, _by_candidate(queries, count), _by_candidate(gradient[..., num_frozen:], count)


def _matmul(rows: Float[Tensor, "c H R k"], matrices: Float[Tensor, "c H k n"]) -> Float[Tensor, "c H R n"]:
    """Batched matrix product; unlike `@`, it does not copy non-contiguous rows."""
    product: Tensor = torch.bmm(rows.flatten(0, 1), matrices.flatten(0, 1)).unflatten(0, rows.shape[:2])
    return product


def _by_image(by_candidate: Float[Tensor, "S H B k"]) -> Float[Tensor, "B H R k"]:
    """Moves candidates to the row dimension, padded to MIN_ROWS: fewer rows would have other bits."""
    count, num_heads, batch, width = by_candidate.shape
    padded = by_candidate.new_zeros(batch, num_heads, max(count, MIN_ROWS), width)
    padded[:, :, :count] = by_candidate.permute(2, 1, 0, 3)
    return padded


def _by_candidate(by_image: Float[Tensor, "B H R k"], count: int) -> Float[Tensor, "S H B k"]:
    """Inverts `_by_image`."""
    return by_image[:, :, :count].permute(2, 1, 0, 3)
