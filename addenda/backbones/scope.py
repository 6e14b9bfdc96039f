"""Which timm models are supported as backbones, and why others are not."""

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
"""Families by timm class; subclasses are not supported."""
SUPPORTED_EXAMPLES = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2")


def obstacle(model: Any) -> str | None:
    """Returns why a model cannot be a backbone, or None if it can.

    The task stream runs one query token through the backbone's blocks, so every block must be pre-norm with plain
    attention. Shared-prefix attention does not reproduce other ways of mixing tokens.
    """
    family = FAMILIES.get(type(model))
    if family is None:
        supported = " or ".join(timm_class.__name__ for timm_class in FAMILIES)
        return f"it is a {type(model).__name__}, not timm's {supported}"
    if not model.global_pool:
        return "it does not pool its tokens into one feature"
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(model.patch_embed).__name__}, not timm's PatchEmbed"
    if model.patch_embed.proj.in_channels != 3:
        return f"it takes {model.patch_embed.proj.in_channels} input channels, not 3"
    return family.obstacle(model)


def catalogue(pattern: str = "vit_*_patch16_224") -> list[tuple[str, str | None]]:
    """Checks every timm ViT and Eva whose name matches a pattern, without loading weights or allocating memory.

    Args:
        pattern: a shell-style pattern over timm's architecture names.

    Returns:
        (name, None) for a supported model, (name, reason) for an unsupported one.
    """
    modules = [timm_class.__module__.rpartition(".")[2] for timm_class in FAMILIES]
    names = [name for module in modules for name in timm.list_models(pattern, module=module)]
    return [(name, obstacle(timm.create_model(name, device="meta"))) for name in names]


HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def cached_weights(name: str) -> Path | None:
    """Path of a model's pretrained weights in the local cache; None if they are not cached or do not exist.

    Args:
        name: a timm model name, with or without its pretrained tag.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return None
    if config.hf_hub_id:
        for file in (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES:
            cached = try_to_load_from_cache(config.hf_hub_id, file)
            if isinstance(cached, str):
                return Path(cached)
    elif isinstance(config.url, str):
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(config.url).name
        return path if path.is_file() else None
    return None
