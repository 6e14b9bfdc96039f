"""What a backbone is, as one digest: architecture, input size, weights and preprocessing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

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
