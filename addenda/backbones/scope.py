"""Which timm models are supported as backbones, and why others are not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.data import resolve_model_data_config
from timm.layers import HybridEmbed, PatchEmbed
from torch import Tensor

from addenda.backbones.eva import EvaFamily
from addenda.backbones.family import Family
from addenda.backbones.stages import stage_obstacle
from addenda.backbones.vit import VisionTransformerFamily

FAMILIES: dict[type, type[Family]] = {family.TIMM_CLASS: family for family in (VisionTransformerFamily, EvaFamily)}
"""Families by timm class, whose models carry task tokens; subclasses do not."""
SUPPORTED_EXAMPLES = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2")


def token_obstacle(model: Any) -> str | None:
    """Returns why a model cannot carry task tokens, or None if it can.

    The task stream runs one query token through the backbone's blocks, so every block must be pre-norm with plain
    attention. Shared-prefix attention does not reproduce other ways of mixing tokens.
    """
    family = FAMILIES.get(type(model))
    if family is None:
        supported = " or ".join(timm_class.__name__ for timm_class in FAMILIES)
        return f"it is a {type(model).__name__}, not timm's {supported}"
    if not model.global_pool:
        return "it does not pool its tokens into one feature"
    if type(model.patch_embed) not in (PatchEmbed, HybridEmbed):
        return f"its patches come from a {type(model.patch_embed).__name__}, not timm's PatchEmbed or HybridEmbed"
    if (channels := input_size(model)[0]) != 3:
        return f"it takes {channels} input channels, not 3"
    return family.obstacle(model)


def obstacle(model: Any) -> str | None:
    """Returns why a model cannot be a backbone, not even for layer heads, or None if it can."""
    return None if token_obstacle(model) is None else stage_obstacle(model, input_size(model))


def input_size(model: Any) -> list[int]:
    """Channels, height and width of a model's images."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    channels, *configured = resolve_model_data_config(model)["input_size"]
    return [int(getattr(model, "in_chans", channels)), *(size or configured)]


def convert(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Renames a checkpoint's tensors to a model's names, as timm does for its class."""
    family = FAMILIES.get(type(model))
    module = sys.modules[type(model).__module__]
    converter = getattr(module, "checkpoint_filter_fn", None) if family is None else family.convert
    converted: dict[str, Tensor] = state if converter is None else converter(state, model)
    return converted


class Listed(NamedTuple):
    """A timm model in the catalogue, and why it cannot carry layer heads or tokens; None if it can."""

    name: str
    timm_class: str
    layer_heads: str | None
    tokens: str | None


def catalogue(pattern: str = "vit_*_patch16_224") -> Iterator[Listed]:
    """Checks every timm model whose name matches a pattern, without loading weights or allocating memory.

    Args:
        pattern: a shell-style pattern over timm's architecture names.
    """
    for name in timm.list_models(pattern):
        try:
            model = timm.create_model(name, device="meta")
        except Exception as error:  # a model's own code may raise anything
            reason = f"timm cannot create it: {error}"
            yield Listed(name, "", reason, reason)
        else:
            yield Listed(name, type(model).__name__, obstacle(model), token_obstacle(model))


HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def cached_weights(name: str) -> Path | None:
    """Path of a model's pretrained weights in the local cache; None if they are not cached or do not exist.

    Args:
        name: a timm model name, with or without its pretrained tag, or "hf-hub:ORG/NAME".
    """
    if name.startswith("hf-hub:"):
        repository, _, revision = name.removeprefix("hf-hub:").partition("@")
        return _in_hub_cache(repository, HUB_FILES, revision or None)
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return None
    if config.hf_hub_id:
        return _in_hub_cache(config.hf_hub_id, (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES)
    if isinstance(config.url, str):
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(config.url).name
        return path if path.is_file() else None
    return None


def _in_hub_cache(repository: str, files: Sequence[str], revision: str | None = None) -> Path | None:
    found = (try_to_load_from_cache(repository, file, revision=revision) for file in files)
    return next((Path(path) for path in found if isinstance(path, str)), None)
