"""The task stream's attention: frozen keys first, private keys beside them, one softmax (design, section 1)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue, product


def attend(
    scale: float,
    queries: Float[Tensor, "S H B d"],
    frozen: KeyValue,  # [B, H, P, d], seen by every task
    tokens: KeyValue,  # each task's own and its ancestors', [S, H, B, t, d]
    memory: KeyValue,  # each task's own and its ancestors', [S, H, m, d]: of no image
    bias: Float[Tensor, "S w"] | None = None,  # -inf where a private key only fills its size class; w = t + m
) -> Float[Tensor, "S B D"]:
    """What each task's query reads of the keys that it sees (the paper's Table 1, never built as a mask)."""
    num_tasks, num_heads, batch, _ = queries.shape
    num_frozen = frozen.keys.shape[-2]
    weights = attention_weights(scale, queries, frozen, tokens, memory, bias)
    of_frozen = weights[..., :num_frozen].flatten(0, 1) @ frozen.values.flatten(0, 1)
    of_private = private_read(weights[..., num_frozen:].permute(2, 1, 0, 3), tokens, memory)
    read: Tensor = of_frozen.unflatten(0, (batch, num_heads)).permute(2, 1, 0, 3) + of_private
    return read.transpose(1, 2).reshape(num_tasks, batch, -1)


def attention_weights(
    scale: float,
    queries: Float[Tensor, "S H B d"],
    frozen: KeyValue,
    tokens: KeyValue,
    memory: KeyValue,
    bias: Float[Tensor, "S w"] | None = None,
) -> Float[Tensor, "B H S K"]:
    """How much each task's query attends to each of its K = P + w keys, frozen ones, then private, in one softmax."""
    _, num_heads, batch, _ = queries.shape
    queries = (queries * scale).contiguous()
    by_image = queries.permute(2, 1, 0, 3).flatten(0, 1)  # [B H, S, d]: an image's frozen keys serve all tasks
    on_frozen = by_image @ frozen.keys.flatten(0, 1).transpose(1, 2)
    private = private_scores(queries, tokens, memory)
    if bias is not None:
        private = private + bias[:, None, None]
    scores = torch.cat([on_frozen.unflatten(0, (batch, num_heads)), private.permute(2, 1, 0, 3)], dim=-1)
    return scores.softmax(dim=-1)


def private_scores(queries: Float[Tensor, "S H B d"], tokens: KeyValue, memory: KeyValue) -> Float[Tensor, "S H B w"]:
    """Scaled queries against a task's own keys and its ancestors': tokens' first, then memory's."""
    on_tokens = (queries.unsqueeze(-2) * tokens.keys).sum(-1)
    return torch.cat([on_tokens, product(queries, memory.keys.transpose(-1, -2))], dim=-1)


def private_read(weights: Float[Tensor, "S H B w"], tokens: KeyValue, memory: KeyValue) -> Float[Tensor, "S H B d"]:
    """What the weights of the private keys read of their values."""
    on_tokens, on_memory = weights.tensor_split((tokens.values.shape[-2],), dim=-1)
    return (on_tokens.unsqueeze(-1) * tokens.values).sum(-2) + product(on_memory, memory.values)


def memory_key_values(backbone: FrozenBackbone, block: Any, memory: Float[Tensor, "S m D"]) -> KeyValue:
    """Keys and values of memory tokens, [S, H, m, d]: put through norm1 and qkv like any token."""
    _, keys, values = backbone.family.project(block, memory)
    return KeyValue(keys, values)
