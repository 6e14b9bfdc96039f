"""Which timm models can carry task tokens, and why the others cannot."""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp, PatchEmbed

from addenda.backbones.eva import EvaFamily
from addenda.backbones.family import Family
from addenda.backbones.vit import VisionTransformerFamily

FAMILIES: tuple[type[Family], ...] = (VisionTransformerFamily, EvaFamily)
"""Every family of models that can be backbones."""

WORKING = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2")


def family_of(model: Any) -> type[Family] | None:
    """The family of a model, by its class and no subclass; None if it has none."""
    return next((family for family in FAMILIES if type(model) is family.TIMM_CLASS), None)


def obstacle(model: Any) -> str | None:
    """Says which property keeps a model from being a backbone; None if nothing does.

    A task's stream is the backbone's own blocks with one query token, so every block has to be a pre-norm one of plain
    attention: other blocks mix tokens in ways that the shared-prefix attention does not reproduce.
    """
    family = family_of(model)
    if family is None:
        known = " or ".join(one.TIMM_CLASS.__name__ for one in FAMILIES)
        return f"it is a {type(model).__name__}, not timm's {known}"
    if model.cls_token is None:
        return "it has no class token, whose place the task's own token takes"
    if model.attn_pool is not None or model.global_pool not in ("token", "avg"):
        return (
            f"it pools by {model.global_pool!r}; only 'token' and 'avg' give a feature that a task token can give too"
        )
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(model.patch_embed).__name__}, not timm's PatchEmbed"
    if model.patch_embed.proj.in_channels != 3:
        return f"it takes {model.patch_embed.proj.in_channels} input channels, not 3"
    return family.obstacle(model)


def adapter_obstacle(model: Any) -> str | None:
    """Says which property keeps a backbone's blocks from carrying adapters; None if nothing does."""
    for block in model.blocks:
        if type(block.mlp) is not Mlp:
            return f"its MLPs are {type(block.mlp).__name__}, not timm's plain Mlp of fc1 and fc2"
    return None
