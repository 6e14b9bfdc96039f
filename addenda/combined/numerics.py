"""What the bits of a result depend on beside its content: the numerics fingerprint."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.backbones import FrozenBackbone, plain
from addenda.combined.forward import Read, forward_pass
from addenda.combined.heads import Head
from addenda.combined.probe_inputs import probe_images, probe_task
from addenda.combined.shapes import TILE, SizeClass, micro_batch
from addenda.combined.tiles import Layout, TileStore
from addenda.registry import canonical_json, digest


def arithmetic(backbone: FrozenBackbone) -> dict[str, Any]:
    """Settings of this process and of the backbone's blocks that move bits and that a caller may change at any time.

    Beside the first four a setting is named only where it is not torch's own default, so that a fingerprint made before
    the setting was known is still that of the default.
    """
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's older and its newer way, differently
        matmul = "mixed"
    return {
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "float32_matmul_precision": matmul,
        "fused_attention": backbone.fused_attention,
        **{name: found for name, (found, *defaults) in _switches(backbone.device).items() if found not in defaults},
    }


def _switches(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Settings that move bits: as they are, and torch's default or what loading a backbone on a GPU sets."""
    mkldnn, sdp = torch.backends.mkldnn, torch.backends.cuda
    full = ("none", "ieee")  # torch names it in two ways
    found: dict[str, tuple[Any, ...]] = {
        "default_dtype": (str(torch.get_default_dtype()), "torch.float32"),
        "flush_denormal": (not _SMALL.mul(0.5).count_nonzero(), False),
        "flash_sdp": (sdp.flash_sdp_enabled(), True),
        "mem_efficient_sdp": (sdp.mem_efficient_sdp_enabled(), True),
        "math_sdp": (sdp.math_sdp_enabled(), True),
        "cudnn_sdp": (sdp.cudnn_sdp_enabled(), True),
        # torch has had these since 2.9
        "fp32_precision": (getattr(torch.backends, "fp32_precision", "none"), *full),
        "mkldnn_fp32_precision": (getattr(mkldnn, "fp32_precision", "none"), *full),
        "conv_fp32_precision": (getattr(getattr(mkldnn, "conv", None), "fp32_precision", "none"), *full),
        "matmul_fp32_precision": (getattr(getattr(mkldnn, "matmul", None), "fp32_precision", "none"), *full),
    }
    if device.type == "cuda":
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        found |= {
            "cudnn_tf32": (cudnn.allow_tf32, False),
            "cudnn_benchmark": (cudnn.benchmark, False),
            "cudnn_deterministic": (cudnn.deterministic, True),
            "bf16_reduction": (matmul.allow_bf16_reduced_precision_reduction, True),
            "fp16_reduction": (matmul.allow_fp16_reduced_precision_reduction, True),
        }
    return found


def lowered(described: Mapping[str, Any]) -> list[str]:
    """The settings among some of `arithmetic` that let float32 be computed in less than float32."""
    return [
        f"{name} {value}"
        for name, value in described.items()
        if name.endswith("precision") and name != "precision" and value not in ("highest", "none")
    ]


_SMALL = torch.full((1,), 1e-39, dtype=torch.float32, device="cpu")
_SQUARE = torch.linspace(-1, 1, 256, dtype=torch.float32, device="cpu").reshape(1, 1, 16, 16)
_LAYER = nn.Linear(16, 16, bias=False, device="meta")  # a hook on all modules listens to it too
_LAYER.weight = nn.Parameter(_SQUARE[0, 0].flip(0), requires_grad=False)


def touch() -> bytes:
    """The bytes of a few microseconds' work by the operations of a forward pass.

    No list of settings is complete: what replaces an operation or moves its bits otherwise shows here, unless it
    matters to large shapes alone.
    """
    with plain(torch.device("cpu")):
        read = F.scaled_dot_product_attention(_SQUARE, _SQUARE, _SQUARE)
        found = F.gelu(F.layer_norm(_LAYER(F.linear(read[0, 0], _SQUARE[0, 0])), (16,))).softmax(-1) @ _SQUARE[0, 0]
        return found.numpy().tobytes()


def settings(backbone: FrozenBackbone) -> dict[str, Any]:
    """Versions, device and settings that can move a bit."""
    device = backbone.device
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "timm": version("timm"),
        "device": f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if cuda else _cpu(),
        **arithmetic(backbone),
        "precision": backbone.precision_name,
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
    key = ("probe", canonical_json(described), touch())
    if key not in backbone.memo:
        backbone.memo[key] = _probe(backbone)
    return described | {"probe": backbone.memo[key]}


def _probe(backbone: FrozenBackbone) -> str:
    backbone.check_as_loaded()
    images = probe_images(backbone)
    images = images[torch.arange(micro_batch(backbone.device), dtype=torch.int64, device="cpu") % len(images)]
    ranks = (0, 8) if backbone.adapter_obstacle() is None else (0,)
    tasks = [probe_task(backbone, SizeClass(tokens=2, memory=8, rank=rank)) for rank in ranks]
    reads = {task.sha256: _feature_and_logits(Head(backbone, task)) for task in tasks}
    answers, pooled, _ = forward_pass(backbone, images, Layout(TileStore(backbone), tasks), reads, pooled=True)
    assert pooled is not None
    return tensor_digest(torch.cat([pooled.float(), *answers.values()], dim=1))


def _feature_and_logits(head: Head) -> Read:
    return lambda feature, *read: torch.cat([feature.float(), head(feature, *read).float()], dim=1)


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
