"""The task stream through one block: frozen keys first, private keys beside them, one softmax (design, section 1)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue


def project(backbone: FrozenBackbone, block: Any, tokens: Float[Tensor, "B S D"]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of some tokens at a block's input, each [B, H, S, d]."""
    return backbone.split_qkv(block, block.attn.qkv(block.norm1(tokens)))


def attend(
    scale: float,
    queries: Float[Tensor, "B H S d"],
    frozen: KeyValue,
    tokens: KeyValue,
    memory: KeyValue,
    bias: Float[Tensor, "S w"] | None = None,
) -> Float[Tensor, "B S D"]:
    """Each task's query over the keys that it sees, in one softmax (the paper's Table 1, never built as a mask).

    Args:
        scale: d ** -0.5.
        queries: one for each task.
        frozen: the backbone's keys and values, [B, H, P, d], seen by every task.
        tokens: each task's own token and its ancestors', [B, H, S, t, d].
        memory: each task's memory and its ancestors', [S, H, m, d]: of no image.
        bias: 0 where a private key is real and -inf where it only fills its size class, w = t + m.

    Returns:
        What each task's query read, heads side by side.
    """
    queries = queries * scale
    num_frozen, num_tokens = frozen.keys.shape[-2], tokens.keys.shape[-2]
    by_task = queries.permute(2, 1, 0, 3)  # [S, H, B, d]: a task's memory is one matrix for all images
    private = torch.cat(
        [
            (queries.unsqueeze(-2) * tokens.keys).sum(-1),
            (by_task @ memory.keys.transpose(-1, -2)).permute(2, 1, 0, 3),
        ],
        dim=-1,
    )
    if bias is not None:
        private = private + bias
    scores = torch.cat([queries @ frozen.keys.transpose(-1, -2), private], dim=-1)
    weights = scores.softmax(dim=-1)
    on_frozen, on_tokens, on_memory = weights.tensor_split((num_frozen, num_frozen + num_tokens), dim=-1)
    read = (
        on_frozen @ frozen.values
        + (on_tokens.unsqueeze(-1) * tokens.values).sum(-2)
        + (on_memory.permute(2, 1, 0, 3) @ memory.values).permute(2, 1, 0, 3)
    )
    return read.transpose(1, 2).flatten(2)


def finish(block: Any, tokens: Float[Tensor, "B S D"], read: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
    """The rest of the block: projection, residuals, LayerScale and MLP, all the backbone's own."""
    tokens = tokens + block.ls1(block.attn.proj(block.attn.norm(read)))
    result: Tensor = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return result


def memory_key_values(backbone: FrozenBackbone, block: Any, memory: Float[Tensor, "S m D"]) -> KeyValue:
    """Keys and values of memory tokens, [S, H, m, d]: put through norm1 and qkv like any token."""
    _, keys, values = project(backbone, block, memory)
    return KeyValue(keys, values)
