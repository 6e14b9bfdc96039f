"""A tiny random ViT, for processes that a test starts too: importing it brings neither pytest nor the shape checker."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer


def tiny_vit(seed: int = 0, **options: object) -> VisionTransformer:
    """A random ViT for 32 px images: 17 tokens, 48 dimensions, 3 blocks, 3 heads."""
    torch.manual_seed(seed)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
    return VisionTransformer(**{**settings, **options}).eval()
