"""The numerics fingerprint: everything besides its inputs on which the bits of a result depend."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.backbones import FrozenBackbone, plain
from addenda.combined.forward import HeadFunction, forward_pass
from addenda.combined.heads import Head, load_head
from addenda.combined.probe_inputs import probe_images, probe_tasks
from addenda.combined.shapes import TILE, SizeClass, micro_batch
from addenda.combined.tiles import Layout, TileStore
from addenda.registry import canonical_json, digest


def runtime_settings(backbone: FrozenBackbone) -> dict[str, Any]:
    """Settings that can change bits and that a caller may change at any time.

    The first four are always included. Others are included only if they differ from their default, so that
    fingerprints recorded before a setting was known stay valid.
    """
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's older and newer settings disagree
        matmul = "mixed"
    return {
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "float32_matmul_precision": matmul,
        "fused_attention": backbone.fused_attention,
        **{name: value for name, (value, *defaults) in _switches(backbone.device).items() if value not in defaults},
    }


def _switches(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Current value of each setting, followed by its defaults: torch's, or those set when a GPU backbone is loaded."""
    mkldnn, sdp = torch.backends.mkldnn, torch.backends.cuda
    full = ("none", "ieee")  # torch's two names for full precision
    switches: dict[str, tuple[Any, ...]] = {
        "default_dtype": (str(torch.get_default_dtype()), "torch.float32"),
        "flush_denormal": (not _DENORMAL.mul(0.5).count_nonzero(), False),
        "flash_sdp": (sdp.flash_sdp_enabled(), True),
        "mem_efficient_sdp": (sdp.mem_efficient_sdp_enabled(), True),
        "math_sdp": (sdp.math_sdp_enabled(), True),
        "cudnn_sdp": (sdp.cudnn_sdp_enabled(), True),
        # Since torch 2.9.
        "fp32_precision": (getattr(torch.backends, "fp32_precision", "none"), *full),
        "mkldnn_fp32_precision": (getattr(mkldnn, "fp32_precision", "none"), *full),
        "conv_fp32_precision": (getattr(getattr(mkldnn, "conv", None), "fp32_precision", "none"), *full),
        "matmul_fp32_precision": (getattr(getattr(mkldnn, "matmul", None), "fp32_precision", "none"), *full),
    }
    if device.type == "cuda":
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        switches |= {
            "cudnn_tf32": (cudnn.allow_tf32, False),
            "cudnn_benchmark": (cudnn.benchmark, False),
            "cudnn_deterministic": (cudnn.deterministic, True),
            "bf16_reduction": (matmul.allow_bf16_reduced_precision_reduction, True),
            "fp16_reduction": (matmul.allow_fp16_reduced_precision_reduction, True),
        }
    return switches


def reduced_precision(settings: Mapping[str, Any]) -> list[str]:
    """Those of some settings that allow float32 to be computed in lower precision."""
    return [
        f"{name} {value}"
        for name, value in settings.items()
        if name.endswith("precision") and name != "precision" and value not in ("highest", "none")
    ]


_DENORMAL = torch.full((1,), 1e-39, dtype=torch.float32, device="cpu")
_SAMPLE = torch.linspace(-1, 1, 256, dtype=torch.float32, device="cpu").reshape(1, 1, 16, 16)
_SAMPLE_LAYER = nn.Linear(16, 16, bias=False, device="meta")  # a module, so that global module hooks apply too
_SAMPLE_LAYER.weight = nn.Parameter(_SAMPLE[0, 0].flip(0), requires_grad=False)


def operations_sample() -> bytes:
    """Result bytes of the operations of a forward pass on a tiny fixed input, in a few microseconds.

    No list of settings is complete: this also detects replaced operations and unlisted settings, unless they affect
    only large shapes.
    """
    with plain(torch.device("cpu")):
        matrix = _SAMPLE[0, 0]
        attended = F.scaled_dot_product_attention(_SAMPLE, _SAMPLE, _SAMPLE)[0, 0]
        hidden = F.gelu(F.layer_norm(_SAMPLE_LAYER(F.linear(attended, matrix)), (16,)))
        return (hidden.softmax(-1) @ matrix).numpy().tobytes()


def numerics_settings(backbone: FrozenBackbone) -> dict[str, Any]:
    """Versions, device and settings that can change bits."""
    device = backbone.device
    return {
        "torch": torch.__version__,
        "timm": _timm_version(),
        "device": _device(device),
        **runtime_settings(backbone),
        "precision": backbone.precision_name,
        "tile": TILE,
        "micro_batch": micro_batch(device),
    }


def numerics(backbone: FrozenBackbone) -> dict[str, Any]:
    """The versions, device and settings that can change bits, and the digest of a fixed computation.

    Versions and settings alone have missed changes of bits. So the frozen stream, task streams (without adapters, and
    with them if the backbone can carry them) and heads are also run on the probe images, and cached in the backbone. A
    backbone without task tokens runs its pooled and layer features.
    """
    settings = numerics_settings(backbone)
    key = ("probe", canonical_json(settings), operations_sample())
    if key not in backbone.memo:
        backbone.memo[key] = _probe_digest(backbone)
    return settings | {"probe": backbone.memo[key]}


def _probe_digest(backbone: FrozenBackbone) -> str:
    backbone.check_as_loaded()
    images = probe_images(backbone)
    images = images[torch.arange(micro_batch(backbone.device), dtype=torch.int64, device="cpu") % len(images)]
    if backbone.token_obstacle() is not None:
        features = forward_pass(backbone, images, pooled=True, layers=True).features
        assert features is not None
        return tensor_digest(features)
    shapes = {} if backbone.adapter_obstacle() else backbone.adapter_shapes()
    # Gated MLPs could carry no adapters at first; a probe with adapters would change the numerics of their registries.
    ranks = (0, 8) if shapes and shapes["fc1"][1] == shapes["fc2"][0] else (0,)
    tasks = [probe_tasks(backbone, SizeClass(tokens=2, memory=8, rank=rank))[0] for rank in ranks]
    heads = {task.sha256: _feature_and_logits(load_head(backbone, task)) for task in tasks}
    outputs, pooled, _ = forward_pass(backbone, images, Layout(TileStore(backbone), tasks), heads, pooled=True)
    assert pooled is not None
    return tensor_digest(torch.cat([pooled.float(), *outputs.values()], dim=1))


def _feature_and_logits(head: Head) -> HeadFunction:
    return lambda feature, *rest: torch.cat([feature.float(), head(feature, *rest).float()], dim=1)


def numerics_fingerprint(numerics: Mapping[str, Any]) -> str:
    """sha256 of the result of `numerics`."""
    return digest(canonical_json(dict(numerics)).encode())


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a float32 tensor's bytes."""
    return digest(tensor.detach().cpu().contiguous().numpy().tobytes())


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return _cpu() if device.type == "cpu" else f"{device.type} of {_cpu()}, {platform.platform()}"


@cache
def _timm_version() -> str:
    """Timm's version; reading it takes milliseconds, and importing timm is left to `backbones`."""
    return metadata.version("timm")


@cache
def _cpu() -> str:
    """CPU model and the instruction set that torch uses."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = (
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        )
        model = next(names, model)
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
