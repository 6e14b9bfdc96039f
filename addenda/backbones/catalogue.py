"""The timm names that can be backbones."""

from __future__ import annotations

import timm

from addenda.backbones.scope import FAMILIES, obstacle


def catalogue(pattern: str = "vit_*_patch16_224") -> list[tuple[str, str | None]]:
    """Checks every timm model of a family of backbones whose name matches a pattern, without weights or memory.

    Args:
        pattern: a shell-style pattern over timm's architecture names.

    Returns:
        (name, None) for a model that works, (name, what is missing) for one that does not.
    """
    modules = [family.TIMM_CLASS.__module__.rpartition(".")[2] for family in FAMILIES]
    names = [name for module in modules for name in timm.list_models(pattern, module=module)]
    return [(name, obstacle(timm.create_model(name, device="meta"))) for name in names]
