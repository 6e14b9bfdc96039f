"""What the bits of a result depend on beside its content: the numerics fingerprint."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined.heads import Head
from addenda.combined.layout import TILE, Layout, SizeClass, TileStore, micro_batch
from addenda.combined.probes import probe_images, probe_task
from addenda.combined.streams import task_features
from addenda.registry import canonical_json, digest


def arithmetic() -> dict[str, Any]:
    """Settings of this process that move bits and that a caller may change at any time."""
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's older and its newer way, differently
        matmul = "mixed"
    return {
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "float32_matmul_precision": matmul,
    }


def settings(backbone: FrozenBackbone) -> dict[str, Any]:
    """Versions, device and settings that can move a bit."""
    device = backbone.device
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "timm": version("timm"),
        "device": f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if cuda else _cpu(),
        **arithmetic(),
        "fused_attention": bool(backbone.blocks[0].attn.fused_attn),
        "precision": str(backbone.precision).removeprefix("torch."),
        "tile": TILE,
        "micro_batch": micro_batch(device),
    }


def numerics(backbone: FrozenBackbone) -> dict[str, Any]:
    """Everything that can move a bit without a change of content, and the digest of a fixed computation.

    Versions and settings alone missed changes that moved bits, so the frozen stream, tasks' streams (without adapters,
    and with them where the backbone can carry them) and heads run over the probe images too; once for each backbone and
    its settings.
    """
    described = settings(backbone)
    key = ("probe", canonical_json(described))
    if key not in backbone.memo:
        backbone.memo[key] = _probe(backbone)
    return described | {"probe": backbone.memo[key]}


@torch.no_grad()
def _probe(backbone: FrozenBackbone) -> str:
    images = probe_images(backbone).to(backbone.device)
    images = images[torch.arange(micro_batch(backbone.device)) % len(images)]
    ranks = (0, 8) if backbone.adapter_obstacle() is None else (0,)
    tasks = [probe_task(backbone, SizeClass(tokens=2, memory=8, rank=rank)) for rank in ranks]
    layout = Layout(TileStore(backbone), tasks)
    with torch.autocast(backbone.device.type, enabled=False):
        stream = backbone.stream(images, "pooled")
        tiles = task_features(backbone, stream, layout)
        found = [stream.pooled]
        for task in tasks:
            tile, slot = layout.slot[task.sha256]
            found += [tiles[tile][slot], Head(backbone, task)(tiles[tile][slot], stream.pooled)]
    return tensor_digest(torch.cat([part.float() for part in found], dim=1))


def numerics_fingerprint(described: Mapping[str, Any]) -> str:
    """sha256 over a description that `numerics` gave."""
    return digest(canonical_json(dict(described)).encode())


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over a float32 tensor's bytes."""
    return digest(tensor.detach().cpu().contiguous().numpy().tobytes())


@cache
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
