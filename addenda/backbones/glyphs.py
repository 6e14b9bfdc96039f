"""`glyphs`: the small letter-reading ViT that the package carries, for the demo and the tests.

Made by scripts/train_glyphs.py; docs/glyphs.md says how, and how good it is.
"""

from __future__ import annotations

from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

WEIGHTS = Path(__file__).with_name("glyphs.safetensors")
MEAN = STD = (0.5, 0.5, 0.5)


def architecture(num_classes: int) -> VisionTransformer:
    """A ViT of 1.0 M parameters for 32 px images in patches of 4 (timm's own class)."""
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=128, depth=5, num_heads=4, num_classes=num_classes)
