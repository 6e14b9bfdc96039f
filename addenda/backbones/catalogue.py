"""The timm names that can be backbones."""

from __future__ import annotations

import timm

from addenda.backbones.scope import obstacle


def catalogue(pattern: str = "vit_*_patch16_224") -> list[tuple[str, str | None]]:
    """Checks every timm VisionTransformer whose name matches a pattern, without weights or memory.

    Args:
        pattern: a shell-style pattern over timm's architecture names.

    Returns:
        (name, None) for a model that works, (name, what is missing) for one that does not.
    """
    names = timm.list_models(pattern, module="vision_transformer")
    return [(name, obstacle(timm.create_model(name, device="meta"))) for name in names]
