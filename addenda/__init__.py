"""Addenda adds vision tasks to a frozen Vision Transformer; every earlier task keeps its outputs, bit for bit.

Method: Sandler et al., "Fine-tuning Image Transformers using Learnable Memory", CVPR 2022, arXiv 2203.15243.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from addenda import exceptions

if TYPE_CHECKING:
    from addenda.backbones import FrozenBackbone, load_backbone
    from addenda.combined import CombinedModel, Router
    from addenda.learner import Augmentation, LearnConfig, Learner
    from addenda.registry import Registry, Task, TaskFilter

__version__ = "0.2.0"
__all__ = [
    "Augmentation",
    "CombinedModel",
    "FrozenBackbone",
    "LearnConfig",
    "Learner",
    "Registry",
    "Router",
    "Task",
    "TaskFilter",
    "exceptions",
    "load_backbone",
]
_NAMES = {
    "backbones": ("FrozenBackbone", "load_backbone"),
    "combined": ("CombinedModel", "Router"),
    "learner": ("Augmentation", "LearnConfig", "Learner"),
    "registry": ("Registry", "Task", "TaskFilter"),
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import addenda` loads no framework."""
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"addenda.{module}"), name)
    raise AttributeError(f"module 'addenda' has no attribute {name!r}")
