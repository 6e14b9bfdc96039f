"""Fixed images and tasks for golden probes, numerics fingerprint and self-test, the same on every machine."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined.shapes import SizeClass
from addenda.registry import LowRank, Task

NUM_PROBES = 4


def probe_images(backbone: FrozenBackbone) -> Float[Tensor, "N 3 H W"]:
    """NUM_PROBES images of coloured blocks with noise."""
    _, height, width = backbone.preprocessing["input_size"]
    random = np.random.RandomState(2203)
    blocks = random.uniform(-1, 1, (NUM_PROBES, 3, 8, 8)).repeat(-(-height // 8), 2).repeat(-(-width // 8), 3)
    noise = random.uniform(-0.25, 0.25, (NUM_PROBES, 3, height, width))
    return torch.from_numpy((blocks[:, :, :height, :width] + noise).astype(np.float32))


def probe_tasks(backbone: FrozenBackbone, size: SizeClass, count: int = 1) -> list[Task]:
    """Tasks that fill their size class; all extend the same ancestors, which have class tokens only."""
    ancestors = tuple(_task(backbone, 0, 0, (), seed=1000 + i) for i in range(size.tokens - 1))
    return [_task(backbone, size.memory, size.rank, ancestors, seed) for seed in range(count)]


def _task(backbone: FrozenBackbone, num_memory: int, rank: int, parents: tuple[Task, ...], seed: int) -> Task:
    random = np.random.RandomState(seed)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    return Task(
        name=f"probe-{seed}",
        backbone=backbone.fingerprint,
        labels=("one", "other"),
        class_token=backbone.class_token.float().cpu() + 0.1 * normal(backbone.embed_dim),
        memory=0.5 * normal(backbone.depth, num_memory, backbone.embed_dim),
        head_weight=normal(2, backbone.embed_dim),
        head_bias=normal(2),
        pooled_weight=normal(2, backbone.embed_dim),
        adapters={
            site: LowRank(normal(backbone.depth, rank, fan_in) / fan_in**0.5, normal(backbone.depth, fan_out, rank))
            for site, (fan_in, fan_out) in (backbone.adapter_shapes() if rank else {}).items()
        }
        or None,
        parents=parents,
    )
