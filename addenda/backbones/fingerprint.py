"""Backbone fingerprint: one digest of architecture, input size, weights and preprocessing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from addenda.backbones.family import Family
from addenda.backbones.stages import layer_settings, stage_structure


def fingerprint(model: Any, family: type[Family] | None, preprocessing: dict[str, Any]) -> str:
    """Hashes the content that determines the bits of a feature; file names and library versions are excluded.

    Without a family, the model has no blocks for task tokens.
    """
    structure = {"preprocessing": preprocessing, **stage_structure(model)}
    if family is not None:
        structure = _block_structure(model, family, preprocessing)
    return _hash(model.state_dict(), json.dumps(structure, sort_keys=True).encode())


def _block_structure(model: Any, family: type[Family], preprocessing: dict[str, Any]) -> dict[str, Any]:
    block = model.blocks[0]
    return {
        "class": type(model).__name__,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "patch_size": list(model.patch_embed.patch_size),
        "global_pool": model.global_pool,
        "no_embed_class": model.no_embed_class,
        "norm": [type(block.norm1).__name__, getattr(block.norm1, "eps", None)],
        "mlp": [type(block.mlp).__name__, type(getattr(block.mlp, "act", None)).__name__],
        "preprocessing": preprocessing,
        **({} if type(model.patch_embed) is PatchEmbed else {"stem": layer_settings(model.patch_embed)}),
        **_pooling(model),
        **family.structure(model),
    }


def _pooling(model: Any) -> dict[str, Any]:
    """Settings of pooling that are in no checkpoint; none for pooling by class token or mean over patches."""
    settings: dict[str, Any] = {}
    if getattr(model, "pool_include_prefix", False):
        settings["pool_include_prefix"] = True
    if model.attn_pool is not None:
        pool = model.attn_pool
        settings["attn_pool"] = [type(pool).__name__, pool.num_heads, pool.pool]
    return settings


def hash_contents(model: Any) -> str:
    """sha256 over every tensor of a model, also those that no checkpoint has, such as the angles of rotations."""
    return _hash({**dict(model.named_buffers()), **model.state_dict()})


def _hash(tensors: Mapping[str, Any], start: bytes = b"") -> str:
    """sha256 over the name, dtype, shape and bytes of tensors."""
    digest = hashlib.sha256(start)
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


_NUMERICS_SETTINGS = {"fused_attn"}
"""Module attributes that belong to the numerics settings, and may be set before a model is made."""


class ModuleState:
    """Detects changes of modules that can change bits: classes, settings, hooks, children, weight memory.

    It is checked before every forward pass, so it compares a few flat lists; only `where` goes module by module.
    """

    def __init__(self, named_modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._names, self._modules = zip(*named_modules, strict=True)
        owners = [vars(module) for module in self._modules]
        self._settings = [
            (owner, name)
            for owner in owners
            for name in ("forward", "_compiled_call_impl", *(n for n, value in owner.items() if _is_setting(n, value)))
        ]
        # A module never replaces these dictionaries.
        self._hooks = [owner[kind] for kind in ("_forward_hooks", "_forward_pre_hooks") for owner in owners]
        self._children = [owner["_modules"] for owner in owners]
        self._tensors = [owner[kind] for kind in ("_parameters", "_buffers") for owner in owners if owner[kind]]
        pairs = zip(self._names, self._modules, strict=True) if len(self._names) > 1 else ()
        self._by_module = [ModuleState([pair]) for pair in pairs]
        self.record()

    def record(self) -> None:
        """Records the present state as the reference."""
        self._recorded_tensors = self._all_tensors()  # referenced, so that no other tensor can get the same id
        self._recorded_state, self._recorded_versions = self._state(), self._versions()
        self._recorded_layouts = self._layouts()
        for state in self._by_module:
            state.record()

    @property
    def changed(self) -> bool:
        """Whether a module was replaced, reconfigured, hooked, compiled, moved or cast."""
        return self._state() != self._recorded_state or (self.written and self._layouts() != self._recorded_layouts)

    @property
    def written(self) -> bool:
        """Whether a weight may have been written to or its memory replaced."""
        return self._versions() != self._recorded_versions

    def where(self) -> str:
        """The name of the first module that has changed."""
        changed = (state for state in self._by_module or [self] if state.changed or state.written)
        return next((state._names[0] for state in changed), "") or "model"

    def _state(self) -> tuple[list[Any], ...]:
        return (
            [module.__class__ for module in self._modules],
            [owner.get(name) for owner, name in self._settings],
            [hook for hooks in self._hooks for hook in hooks.values()],
            [id(child) for children in self._children for child in children.values()],
        )

    def _versions(self) -> list[tuple[int, ...]]:
        """Each tensor's identity, memory and number of writes, which inference tensors do not count."""
        return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._all_tensors()]

    def _layouts(self) -> list[tuple[Any, ...]]:
        return [(tensor.dtype, tensor.device, tensor.stride()) for tensor in self._all_tensors()]

    def _all_tensors(self) -> list[Tensor]:
        return [tensor for tensors in self._tensors for tensor in tensors.values() if tensor is not None]


def _is_setting(name: str, value: object) -> bool:
    return not name.startswith("_") and name not in _NUMERICS_SETTINGS and isinstance(value, int | float | str | tuple)
