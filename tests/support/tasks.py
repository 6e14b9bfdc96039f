"""Tasks with random tensors, at the scale of trained ones."""

from __future__ import annotations

import torch

from addenda.backbones import FrozenBackbone
from addenda.registry import LowRank, Task


def random_task(
    backbone: FrozenBackbone,
    name: str,
    memory: int = 5,
    classes: int = 3,
    parents: tuple[Task, ...] = (),
    seed: int = 0,
    pooled: bool = True,
    rank: int = 0,
    layers: int | None = None,
) -> Task:
    """A task with random tensors, at the scale of trained ones, and with adapters if `rank` is not 0.

    It has no adapters if the backbone does not support them, and is head-only if it cannot carry tokens. `layers` adds
    a layer head, full (0) or of that rank.
    """
    random = torch.Generator().manual_seed(seed)
    width = backbone.embed_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    def layer_head() -> dict[str, torch.Tensor]:
        features = backbone.num_layer_features
        if not layers:
            return {"layer_weight": normal(classes, features) * features**-0.5}
        return {"layer_weight": normal(classes, layers), "layer_down": normal(layers, features) * features**-0.5}

    def tokens() -> dict[str, torch.Tensor]:
        return {
            "class_token": backbone.class_token.float().cpu() + 0.1 * normal(width),
            "memory": 0.5 * normal(backbone.depth, memory, width),
        }

    return Task(
        name=name,
        backbone=backbone.fingerprint,
        labels=tuple(f"class {i}" for i in range(classes)),
        **(tokens() if backbone.blocks else {}),
        head_weight=normal(classes, width),
        head_bias=normal(classes),
        pooled_weight=normal(classes, width) if pooled and backbone.blocks else None,
        adapters=adapters(backbone, rank, seed) if rank and backbone.adapter_obstacle() is None else None,
        parents=parents,
        **({} if layers is None else layer_head()),
    )


def adapters(backbone: FrozenBackbone, rank: int, seed: int = 0) -> dict[str, LowRank]:
    """Random adapters whose updates are about half as large as the layers' outputs."""
    random = torch.Generator().manual_seed(1000 + seed)

    def normal(scale: float, *shape: int) -> torch.Tensor:
        return scale * torch.randn(backbone.depth, *shape, generator=random)

    return {
        site: LowRank(normal(fan_in**-0.5, rank, fan_in), normal(0.5 * rank**-0.5, fan_out, rank))
        for site, (fan_in, fan_out) in backbone.adapter_shapes().items()
    }
