"""Which timm models can carry task tokens, and why the others cannot."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer

WORKING = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2")


def obstacle(model: Any) -> str | None:
    """Says which property keeps a model from being a backbone; None if nothing does.

    A task's stream is the backbone's own blocks with one query token, so every block has to be the standard
    pre-norm one: other blocks mix tokens in ways that the shared-prefix attention does not reproduce.
    """
    if type(model) is not VisionTransformer:
        return f"it is a {type(model).__name__}, not timm's VisionTransformer"
    if not model.has_class_token:
        return "it has no class token, whose place the task's own token takes"
    if model.attn_pool is not None or model.global_pool not in ("token", "avg"):
        return (
            f"it pools by {model.global_pool!r}; only 'token' and 'avg' give a feature that a task token can give too"
        )
    if model.pool_include_prefix:
        return "its pooling includes the prefix tokens"
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(model.patch_embed).__name__}, not timm's PatchEmbed"
    if model.patch_embed.proj.in_channels != 3:
        return f"it takes {model.patch_embed.proj.in_channels} input channels, not 3"
    for block in model.blocks:
        if type(block) is not Block:
            return f"its blocks are {type(block).__name__}, not timm's standard Block"
        if type(block.attn) is not Attention:
            return f"its attention is {type(block.attn).__name__}, not timm's standard Attention"
        if getattr(block.attn, "gate", None) is not None:  # older timm has no gates
            return "its attention is gated"
    return None


def adapter_obstacle(model: Any) -> str | None:
    """Says which property keeps a backbone's blocks from carrying adapters; None if nothing does."""
    for block in model.blocks:
        if type(block.mlp) is not Mlp:
            return f"its MLPs are {type(block.mlp).__name__}, not timm's plain Mlp of fc1 and fc2"
    return None
