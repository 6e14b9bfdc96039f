"""The attention pool of timm with a latent query, computed with bits that depend on no other image."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from addenda.backbones.arithmetic import MIN_ROWS


def pools_by_latent_query(model: Any) -> bool:
    """Whether a model pools by attention with one latent query, as timm's VisionTransformer and Eva build it."""
    return isinstance(model.attn_pool, AttentionPoolLatent) and model.attn_pool.latent_len == 1


def pool_by_latent_query(model: Any, normed: Float[Tensor, "B P D"]) -> Float[Tensor, "B D"]:
    """Computes timm's `forward_head` before the classifier, with MIN_ROWS equal queries per image.

    With a single query, on two threads fused attention gives an image other bits at another position in the batch, and
    the linear layers give one image other bits alone.
    """
    pool, tokens = model.attn_pool, normed[:, _num_excluded(model) :]
    heads = (pool.num_heads, pool.head_dim)
    queries = pool.q(pool.latent.expand(tokens.shape[0], MIN_ROWS, -1)).unflatten(-1, heads).transpose(1, 2)
    keys, values = pool.kv(tokens).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
    queries, keys = pool.q_norm(queries), pool.k_norm(keys)
    if pool.fused_attn:
        attended = F.scaled_dot_product_attention(queries, keys, values)
    else:
        attended = (queries * pool.scale @ keys.transpose(-2, -1)).softmax(dim=-1) @ values
    pooled = pool.proj(attended.transpose(1, 2).flatten(2))
    pooled = pooled + pool.mlp(pool.norm(pooled))
    feature: Tensor = model.fc_norm(pooled[:, 0])
    return feature


def pool_operations(model: Any, num_queries: int) -> int:
    """Multiply-adds of pooling one image by attention; 0 for other pooling."""
    pool, width = model.attn_pool, model.embed_dim
    num_tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    if pool is None:
        return 0
    num_tokens -= _num_excluded(model)
    if not isinstance(pool, AttentionPoolLatent):  # each token attends to all, without any linear layer
        return int(2 * num_tokens * num_tokens * width)
    linear = {name: layer.weight.numel() for name, layer in pool.named_modules() if isinstance(layer, nn.Linear)}
    return int(num_tokens * linear.pop("kv") + num_queries * (2 * num_tokens * width + sum(linear.values())))


def _num_excluded(model: Any) -> int:
    """The prefix tokens that are not pooled: all in a VisionTransformer that does not say otherwise, none in an Eva."""
    return 0 if getattr(model, "pool_include_prefix", True) else int(model.num_prefix_tokens)
