"""Whether timm's pretrained weights lie on this machine already."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from huggingface_hub import try_to_load_from_cache

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
