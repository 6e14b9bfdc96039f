"""A registry of many small tasks on four backbones."""

from __future__ import annotations

import torch

from addenda.benchmarks.registry.registry_timings import fill
from addenda.registry import Registry, Task

BACKBONES = [f"{number:064x}" for number in range(1, 5)]


def fill_registry(location: str, count: int) -> str:
    """Creates a registry with rows as wide as real ones, so that reading a whole table is slow."""
    sizes = {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_tokens": 5, "num_parameters": 1}
    tensors = (torch.ones(2, 8), torch.zeros(2), torch.ones(8), torch.ones(2, 1, 8))
    template = Task("line", BACKBONES[0], ("no", "yes"), *tensors, metrics={"losses": [0.12345] * 180})
    with Registry.open(location) as registry:
        for number, fingerprint in enumerate(BACKBONES):
            settings = {"name": f"vit_{number}", "source": "hub", "precision": "float32", "preprocessing": {}}
            registry.add_backbone({"fingerprint": fingerprint, **settings, **sizes})
        fill(registry, template, BACKBONES, count)
    return location
