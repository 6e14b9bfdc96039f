"""What the bits of a result depend on beside its content: the numerics fingerprint."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined.layout import TILE
from addenda.registry import canonical_json, digest

NUM_PROBES = 4


def micro_batch(device: torch.device) -> int:
    """Images in the one canonical batch shape of a device."""
    return 64 if device.type == "cuda" else 4


def probe_images(backbone: FrozenBackbone) -> Float[Tensor, "N 3 H W"]:
    """NUM_PROBES fixed images: seeded blocks of colour with noise on them, the same on every machine."""
    _, height, width = backbone.preprocessing["input_size"]
    random = np.random.RandomState(2203)
    blocks = random.uniform(-1, 1, (NUM_PROBES, 3, 8, 8)).repeat(-(-height // 8), 2).repeat(-(-width // 8), 3)
    noise = random.uniform(-0.25, 0.25, (NUM_PROBES, 3, height, width))
    return torch.from_numpy((blocks[:, :, :height, :width] + noise).astype(np.float32))


def numerics(backbone: FrozenBackbone) -> dict[str, Any]:
    """Everything that can move a bit without a change of content, and the digest of a fixed computation.

    Versions and settings alone missed changes that moved bits, so the probe images' features are hashed too.
    """
    device = backbone.device
    images = probe_images(backbone).to(device)
    filled = torch.cat([images, images.new_zeros(max(0, micro_batch(device) - NUM_PROBES), *images.shape[1:])])
    stream = backbone.stream(filled[: micro_batch(device)])
    for _ in stream:
        pass
    return {
        "torch": torch.__version__,
        "timm": version("timm"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "fused_attention": bool(backbone.blocks[0].attn.fused_attn),
        "precision": str(backbone.precision).removeprefix("torch."),
        "tile": TILE,
        "micro_batch": micro_batch(device),
        "probe": tensor_digest(stream.pooled.float()),
    }


def numerics_fingerprint(described: Mapping[str, Any]) -> str:
    """sha256 over a description that `numerics` gave."""
    return digest(canonical_json(dict(described)).encode())


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over a float32 tensor's bytes."""
    return digest(tensor.detach().cpu().contiguous().numpy().tobytes())


def _cpu() -> str:
    """The CPU's model and the instruction set that torch uses on it."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = (
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        )
        model = next(names, model)
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
