"""The timm model whose shapes are nearest to those of a weights file, for the error that refuses the file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
from torch import Tensor
from torch.overrides import TorchFunctionMode

from addenda.backbones.scope import FAMILIES

_TRAITS = {
    "embed_dim": (r"patch_embed\.proj\.weight|conv1\.weight", 0),
    "patch size": (r"patch_embed\.proj\.weight|conv1\.weight", 3),
    "MLP width": (r".*blocks\.0\.mlp\.(fc2|w3|c_proj)\.weight", 1),
    "class token": (r"cls_token|class_embedding", None),
    "registers": (r"reg_token|register_tokens|storage_tokens", 1),
    "LayerScale": (r".*blocks\.0\.(ls_?1\.gamma|gamma_1)", None),
    "norm before the blocks": (r"(norm_pre|ln_pre)\.weight", None),
    "norm of queries": (r"blocks\.0\.attn\.q_norm\.weight", None),
}
"""What tells architectures apart: the name of the tensor that shows it, and the axis of its size (None: existence)."""


def nearest(tensors: Mapping[str, Tensor], name: str) -> str:
    """A sentence that says which timm model a file's tensors fit, or fit best, for someone who asked for `name`."""
    traits = _traits(tensors)
    if not traits["embed_dim"]:
        return "Its tensors have neither timm's names nor any that Addenda converts."
    differing = {
        candidate: [trait for trait, value in traits.items() if own[trait] != value]
        for candidate, own in _catalogue(traits["patch size"]).items()
    }
    if not differing:
        return f"No timm ViT has patches of {traits['patch size']} pixels."
    asked = name.partition(".")[0]
    best = min(differing, key=lambda candidate: (len(differing[candidate]), candidate != asked, len(candidate)))
    if not differing[best] and best == asked:
        return "Its shapes are otherwise those of the model; the file is incomplete, or of a variant."
    if not differing[best]:
        return f"Name the model that the file is of: by its shapes {best!r}, or one like it."
    return f"Name the model that the file is of; {best!r} is nearest, but differs in {' and '.join(differing[best])}."


@cache
def _catalogue(patch_size: int) -> dict[str, dict[str, int]]:
    """The traits of every ViT of timm with such patches."""
    modules = [timm_class.__module__.rpartition(".")[2] for timm_class in FAMILIES]
    names = [name for module in modules for name in timm.list_models(f"*patch{patch_size}[_.]*", module=module)]
    with _Uninitialised():
        return {name: _traits(timm.create_model(name, device="meta", num_classes=0).state_dict()) for name in names}


def _traits(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    def size(pattern: str, axis: int | None) -> int:
        shapes = [tuple(tensor.shape) for key, tensor in tensors.items() if re.fullmatch(pattern, key)]
        if not shapes or axis is None:
            return len(shapes)
        return shapes[0][axis] if axis < len(shapes[0]) else 0

    traits = {trait: size(*shown) for trait, shown in _TRAITS.items()}
    traits["blocks"] = len({match[1] for key in tensors if (match := re.match(r".*blocks\.(\d+)\.", key))})
    positions = [tensor for key, tensor in tensors.items() if re.fullmatch("pos_embed|positional_embedding", key)]
    # Of one side of the grid, whichever other tokens have a position too.
    traits["positions"] = math.isqrt(positions[0].shape[-2]) if positions and positions[0].ndim > 1 else 0
    return traits


class _Uninitialised(TorchFunctionMode):
    """Skips the initialisation of weights, which on the meta device takes most of the time of making a model."""

    SKIPPED = frozenset({"uniform_", "normal_", "trunc_normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
