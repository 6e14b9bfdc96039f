"""Addenda adds vision tasks to a frozen Vision Transformer; every earlier task keeps its outputs, bit for bit.

Method: Sandler et al., "Fine-tuning Image Transformers using Learnable Memory", CVPR 2022, arXiv 2203.15243.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addenda.backbones import FrozenBackbone, load_backbone
    from addenda.combined import CombinedModel
    from addenda.learner import LearnConfig, Learner
    from addenda.registry import Registry, Task

__version__ = "0.1.0"
__all__ = ["CombinedModel", "FrozenBackbone", "LearnConfig", "Learner", "Registry", "Task", "load_backbone"]

_HOME = {
    "CombinedModel": "addenda.combined",
    "FrozenBackbone": "addenda.backbones",
    "LearnConfig": "addenda.learner",
    "Learner": "addenda.learner",
    "Registry": "addenda.registry",
    "Task": "addenda.registry",
    "load_backbone": "addenda.backbones",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import addenda` starts no framework."""
    if name not in _HOME:
        raise AttributeError(f"module 'addenda' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
