"""Copies of a timm model: without its classifier, with a new one to be trained, and without our hooks."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

from torch import nn


def headless(model: Any) -> Any:
    """A copy without its classifier, which shares everything else."""
    classifier = model.get_classifier()
    name = next((name for name, module in model.named_modules() if module is classifier), "")
    result = module = copy(model)
    *parents, last = name.split(".")
    for parent in parents:
        module._modules = {**module._modules, parent: copy(module._modules[parent])}
        module = module._modules[parent]
    if name:
        module._modules = {**module._modules, last: nn.Identity()}
    return result


def with_new_head(model: Any, num_classes: int) -> nn.Module:
    """The model, to be trained in float32, with a new classifier that is initialised to zeros."""
    model.reset_classifier(num_classes)
    for parameter in model.get_classifier().parameters():
        nn.init.zeros_(parameter)
    trainable: nn.Module = model.float().requires_grad_(True)
    return trainable


def without_hooks(model: Any, family: object) -> Any:
    """A deep copy without the hooks, which are bound to the family."""
    copied: Any = deepcopy(model, {id(family): family})
    for module in copied.modules():
        module._forward_hooks.clear()
    return copied
