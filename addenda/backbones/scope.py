"""Which timm models can carry task tokens, and why the others cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.layers import PatchEmbed

from addenda.backbones.eva import EvaFamily
from addenda.backbones.family import Family
from addenda.backbones.vit import VisionTransformerFamily

FAMILIES: dict[type, type[Family]] = {family.TIMM_CLASS: family for family in (VisionTransformerFamily, EvaFamily)}
"""By the class of their models, and no subclass of it."""
WORKING = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2")


def obstacle(model: Any) -> str | None:
    """Says which property keeps a model from being a backbone; None if nothing does.

    A task's stream is the backbone's own blocks with one query token, so every block has to be a pre-norm one of plain
    attention: other blocks mix tokens in ways that the shared-prefix attention does not reproduce.
    """
    family = FAMILIES.get(type(model))
    if family is None:
        known = " or ".join(one.__name__ for one in FAMILIES)
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


def catalogue(pattern: str = "vit_*_patch16_224") -> list[tuple[str, str | None]]:
    """Checks every timm model of a family of backbones whose name matches a pattern, without weights or memory.

    Args:
        pattern: a shell-style pattern over timm's architecture names.

    Returns:
        (name, None) for a model that works, (name, what is missing) for one that does not.
    """
    modules = [timm_class.__module__.rpartition(".")[2] for timm_class in FAMILIES]
    names = [name for module in modules for name in timm.list_models(pattern, module=module)]
    return [(name, obstacle(timm.create_model(name, device="meta"))) for name in names]


HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def cached_weights(name: str) -> Path | None:
    """Where timm would find the pretrained weights of a model without a network; None where nowhere, or it has none.

    Args:
        name: a timm model name, with or without its pretrained tag.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return None
    if config.hf_hub_id:
        for file in (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES:
            found = try_to_load_from_cache(config.hf_hub_id, file)
            if isinstance(found, str):
                return Path(found)
    elif isinstance(config.url, str):
        fetched = Path(torch.hub.get_dir()) / "checkpoints" / Path(config.url).name
        return fetched if fetched.is_file() else None
    return None
