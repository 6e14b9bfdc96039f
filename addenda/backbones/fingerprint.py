"""What a backbone is, as one digest: architecture, input size, weights and preprocessing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from addenda.backbones.family import Family


def fingerprint(model: Any, family: type[Family], preprocessing: dict[str, Any]) -> str:
    """Hashes what the bits of a feature depend on, by content: never a file's name or a library's version."""
    block = model.blocks[0]
    structure = {
        "class": type(model).__name__,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "patch_size": list(model.patch_embed.patch_size),
        "global_pool": model.global_pool,
        "no_embed_class": model.no_embed_class,
        "norm": [type(block.norm1).__name__, getattr(block.norm1, "eps", None)],
        "mlp": [type(block.mlp).__name__, type(getattr(block.mlp, "act", None)).__name__],
        "preprocessing": preprocessing,
        **family.structure(model),
    }
    return hash_state(model, json.dumps(structure, sort_keys=True).encode())


def hash_state(model: Any, start: bytes = b"") -> str:
    """sha256 over every tensor of a model, by name."""
    digest = hashlib.sha256(start)
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


_APART = {"fused_attn"}
"""What of a module's own numbers and words is part of the numerics instead, and may be set before a model is made."""


class Wiring:
    """What of a model's modules decides bits beside the values of weights: what they are, hold and call.

    Asked before every pass: so what is compared then lies in few flat lists, and module by module only in `where`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names, self._modules = zip(*model.named_modules(), strict=True)
        self._held = [vars(module) for module in self._modules]
        self._settings = [
            (held, name)
            for held in self._held
            for name in ("forward", "_compiled_call_impl", *(n for n, value in held.items() if _is_setting(n, value)))
        ]
        # Lists of dictionaries that modules keep for life.
        self._hooks = [held[kind] for kind in ("_forward_hooks", "_forward_pre_hooks") for held in self._held]
        self._children = [held["_modules"] for held in self._held]
        self._tensors = [held[kind] for kind in ("_parameters", "_buffers") for held in self._held if held[kind]]
        self.note()

    def note(self) -> None:
        """Takes the model as it is now for what was loaded."""
        self._kept = self._all()  # no other tensor gets the id of one of these
        self._before, self._weights, self._details = self._state(), self._written(), self._detailed()
        self._layouts = self._laid_out()

    @property
    def changed(self) -> bool:
        """Whether a module is no longer what it was: replaced, set otherwise, hooked, compiled, moved or cast."""
        return self._state() != self._before or (self.written and self._laid_out() != self._layouts)

    @property
    def written(self) -> bool:
        """Whether a weight may have been written to, or its memory exchanged."""
        return self._written() != self._weights

    def where(self) -> str:
        """The name of the first module that is no longer as it was."""
        pairs = zip(self._names, self._details, self._detailed(), strict=True)
        return next((name for name, before, now in pairs if before != now), "") or "model"

    def _state(self) -> tuple[list[Any], ...]:
        return (
            [module.__class__ for module in self._modules],
            [held.get(name) for held, name in self._settings],
            list(map(len, self._hooks)),
            [id(child) for children in self._children for child in children.values()],
        )

    def _written(self) -> list[tuple[int, ...]]:
        return [_memory(tensor) for tensor in self._all()]

    def _laid_out(self) -> list[tuple[Any, ...]]:
        return [_layout(tensor) for tensor in self._all()]

    def _all(self) -> list[Tensor]:
        return [tensor for held in self._tensors for tensor in held.values() if tensor is not None]

    def _detailed(self) -> list[tuple[Any, ...]]:
        """The same, module by module."""
        own: dict[int, list[Any]] = {id(held): [] for held in self._held}
        for held, name in self._settings:
            own[id(held)].append(held.get(name))
        found = []
        for module, held in zip(self._modules, self._held, strict=True):
            tensors = [one for kind in ("_parameters", "_buffers") for one in held[kind].values() if one is not None]
            found.append((
                module.__class__, own[id(held)], len(held["_forward_hooks"]), len(held["_forward_pre_hooks"]),
                list(map(id, held["_modules"].values())),
                [(_layout(one), _memory(one)) for one in tensors],
            ))  # fmt: skip
        return found


def _memory(tensor: Tensor) -> tuple[int, ...]:
    """Where a tensor's numbers are, and how often they were written to; one of inference mode does not count that."""
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.stride()


def _is_setting(name: str, value: object) -> bool:
    return not name.startswith("_") and name not in _APART and isinstance(value, int | float | str | tuple)
