"""Attention of the task stream: one softmax over the frozen keys and each task's private keys (docs/method.md)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue, product


def attend(
    scale: float,
    queries: Float[Tensor, "S H B d"],
    frozen: KeyValue,  # [B, H, P, d], visible to every task
    tokens: KeyValue,  # tokens of the task and its ancestors, [S, H, B, t, d]
    memory: KeyValue,  # memory of the task and its ancestors, [S, H, m, d]; the same for all images
    bias: Float[Tensor, "S w"] | None = None,  # -inf for padding among the private keys; w = t + m
) -> Float[Tensor, "S B D"]:
    """Attention output of each task's query over its visible keys: the mask of the paper's Table 1, never built."""
    num_tasks, num_heads, batch, _ = queries.shape
    num_frozen = frozen.keys.shape[-2]
    weights = attention_weights(scale, queries, frozen, tokens, memory, bias)
    from_frozen = weights[..., :num_frozen].flatten(0, 1) @ frozen.values.flatten(0, 1)
    from_private = private_read(weights[..., num_frozen:].permute(2, 1, 0, 3), tokens, memory)
    output: Tensor = from_frozen.unflatten(0, (batch, num_heads)).permute(2, 1, 0, 3) + from_private
    return output.transpose(1, 2).reshape(num_tasks, batch, -1)


def attention_weights(
    scale: float,
    queries: Float[Tensor, "S H B d"],
    frozen: KeyValue,
    tokens: KeyValue,
    memory: KeyValue,
    bias: Float[Tensor, "S w"] | None = None,
) -> Float[Tensor, "B H S K"]:
    """Softmax weights of each task's query over its K = P + w keys: the frozen ones, then the private ones."""
    _, num_heads, batch, _ = queries.shape
    queries = (queries * scale).contiguous()
    by_image = queries.permute(2, 1, 0, 3).flatten(0, 1)  # [B H, S, d]: all tasks share an image's frozen keys
    on_frozen = by_image @ frozen.keys.flatten(0, 1).transpose(1, 2)
    private = private_scores(queries, tokens, memory)
    if bias is not None:
        private = private + bias[:, None, None]
    scores = torch.cat([on_frozen.unflatten(0, (batch, num_heads)), private.permute(2, 1, 0, 3)], dim=-1)
    return scores.softmax(dim=-1)


def private_scores(queries: Float[Tensor, "S H B d"], tokens: KeyValue, memory: KeyValue) -> Float[Tensor, "S H B w"]:
    """Scores of scaled queries for the private keys: tokens first, then memory."""
    on_tokens = (queries.unsqueeze(-2) * tokens.keys).sum(-1)
    return torch.cat([on_tokens, product(queries, memory.keys.transpose(-1, -2))], dim=-1)


def private_read(weights: Float[Tensor, "S H B w"], tokens: KeyValue, memory: KeyValue) -> Float[Tensor, "S H B d"]:
    """Weighted sum of the private values."""
    on_tokens, on_memory = weights.tensor_split((tokens.values.shape[-2],), dim=-1)
    return (on_tokens.unsqueeze(-1) * tokens.values).sum(-2) + product(on_memory, memory.values)


def memory_key_values(backbone: FrozenBackbone, block: Any, memory: Float[Tensor, "S m D"]) -> KeyValue:
    """Keys and values of memory tokens, [S, H, m, d], computed by norm1 and qkv as for any token."""
    _, keys, values = backbone.family.project(block, memory)
    return KeyValue(keys, values)
