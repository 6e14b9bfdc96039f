"""The `glyphs` backbone: a small letter-recognition ViT included in the package, for the demo and the tests.

It is trained by scripts/train_glyphs.py; docs/glyphs.md describes training and accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer

WEIGHTS = Path(__file__).with_name("glyphs.safetensors")
PREPROCESSING = {
    "input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3,
}  # fmt: skip


def architecture(num_classes: int) -> VisionTransformer:
    """A timm ViT with 1.0 M parameters for 32 px images and patches of 4 px."""
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=128, depth=5, num_heads=4, num_classes=num_classes)


def model() -> Any:
    """The trained model."""
    state = load_state_dict(str(WEIGHTS), device="cpu")
    trained: Any = architecture(num_classes=len(state["head.bias"]))
    trained.pretrained_cfg = PREPROCESSING
    trained.load_state_dict(state)
    return trained
