"""Copies of a timm model: without its classifier, with a new one to be trained, and without our hooks."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import torch
from torch import nn

from addenda.backbones.arithmetic import plain
from addenda.backbones.family import Family


def headless(model: Any) -> Any:
    """A copy without its classifiers, which shares everything else."""
    result = copy(model)
    for classifier in _classifiers(model):
        name = next((name for name, module in model.named_modules() if module is classifier), "")
        *parents, last = name.split(".")
        module = result
        for parent in parents:
            module._modules = {**module._modules, parent: copy(module._modules[parent])}
            module = module._modules[parent]
        if name:
            module._modules = {**module._modules, last: nn.Identity()}
    return result


def with_new_head(model: Any, num_classes: int) -> nn.Module:
    """The model, to be trained in float32, with a new classifier that is initialised to zeros."""
    model.reset_classifier(num_classes)
    for classifier in _classifiers(model):
        for parameter in classifier.parameters():
            nn.init.zeros_(parameter)
    trainable: nn.Module = model.float().requires_grad_(True)
    return trainable


def _classifiers(model: Any) -> tuple[nn.Module, ...]:
    """A timm model's classifier; a distilled one has two."""
    classifier = model.get_classifier()
    return classifier if isinstance(classifier, tuple) else (classifier,)


def hooked(model: nn.Module) -> str | None:
    """Returns which module has a hook that is not of a backbone of ours: no fingerprint would show what it does."""
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not isinstance(getattr(hook, "__self__", None), Family):
                return f"its module {name or 'model'!r} has a forward hook; remove it"
    return None


def replace_inference_tensors(model: nn.Module) -> None:
    """Replaces tensors made in inference mode by equal normal ones: torch does not count the writes to them."""
    with plain(torch.device("cpu")):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_inference():
                    module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_inference():
                    module._buffers[name] = buffer.clone()


def without_hooks(model: Any, family: object) -> Any:
    """A deep copy without the hooks, which are bound to the family."""
    copied: Any = deepcopy(model, {id(family): family})
    for module in copied.modules():
        module._forward_hooks.clear()
    return copied
