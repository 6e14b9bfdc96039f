"""Loads a timm backbone by name, with weights from the hub, a local file, or the package."""

from __future__ import annotations

import difflib
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer

from addenda.backbones.arithmetic import float32_on_cpu
from addenda.backbones.frozen import FrozenBackbone
from addenda.backbones.scope import SUPPORTED_EXAMPLES, convert, obstacle
from addenda.exceptions import BackboneError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GLYPHS = Path(__file__).with_name("glyphs.safetensors")
"""Weights of the `glyphs` backbone, a small letter-recognition ViT included in the package, for the demo and the tests.

They are trained by scripts/train_glyphs.py; docs/glyphs.md describes training and accuracy."""


def load_backbone(
    name: str,
    weights: str | Path | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    precision: str = "float32",
    device: str | torch.device = "auto",
) -> FrozenBackbone:
    """Loads a backbone and freezes it.

    Args:
        name: a timm model name, with or without its pretrained tag, or `"glyphs"`, which is part of the package.
        weights: a local `.safetensors`, `.pth`, `.pt` or `.bin` file; None takes timm's pretrained weights from the
            hub or its cache.
        mean: normalisation mean of pixel values in 0..1, one per channel or one for all; None takes timm's.
        std: normalisation standard deviation, likewise.
        precision: `"float32"` or `"bfloat16"`, the dtype of the backbone and its tasks.
        device: a torch device; `"auto"` selects CUDA if available, else the CPU.

    Returns:
        The frozen backbone, in eval mode, without gradients.

    Raises:
        BackboneError: the name is unknown or unsupported, the weights are unavailable or do not fit, or an argument is
            invalid.

    Examples:
        >>> backbone = load_backbone("glyphs", device="cpu")
        >>> backbone.depth, backbone.embed_dim
        (5, 128)
    """
    dtype = _dtype(precision)
    mean, std = ((value,) * 3 if isinstance(value, int | float) else value for value in (mean, std))
    for label, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise BackboneError(f"{label} takes one number, or three for the channels; got {len(values)}.")
        if values is not None and not all(map(math.isfinite, values)):
            raise BackboneError(f"{label} must be finite; got {tuple(values)}.")
    if std is not None and min(std) <= 0:
        raise BackboneError(f"std must be positive; got {tuple(std)}.")
    resolved_device = _device(device)
    with float32_on_cpu():
        if name == "glyphs":
            if weights is not None:
                raise BackboneError("Backbone 'glyphs' includes its weights; omit the weights argument.")
            model, source = _glyphs(), "embedded"
        elif weights is None:
            model, source = _from_hub(name), "hub"
        else:
            model, source = _from_file(name, Path(weights)), str(Path(weights).resolve())
    return FrozenBackbone(model, name=name, source=source, mean=mean, std=std, precision=dtype, device=resolved_device)


def untrained_backbone(name: str, precision: str = "float32", device: str | torch.device = "auto") -> FrozenBackbone:
    """A backbone with random weights, the same in every call, for measurements that do not depend on weights.

    Raises:
        BackboneError: the name or precision is unknown or unsupported, or the device cannot be used.
    """
    with float32_on_cpu(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _supported_model(name)
    return FrozenBackbone(model, name, "untrained", precision=_dtype(precision), device=_device(device))


def _dtype(precision: str) -> torch.dtype:
    if precision not in PRECISIONS:
        raise BackboneError(f"Precision {precision!r} is not known. Known: {', '.join(PRECISIONS)}.")
    return PRECISIONS[precision]


def _device(device: str | torch.device) -> torch.device:
    """Resolves and tries a device; configures CUDA, for the whole process, for reproducible bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is initialised
    try:
        resolved = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=resolved, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(
            f"Device {str(device)!r} cannot be used: {str(error).splitlines()[0].rstrip('.')}. Use auto, cpu or cuda:N."
        ) from error
    if resolved.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return resolved


def _supported_model(name: str, **options: Any) -> Any:
    """Builds a model, after checking it without allocating memory."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), n=3) or list(SUPPORTED_EXAMPLES)
        raise BackboneError(
            f"timm has no model {name!r}. Similar names: {', '.join(similar)}. See: addenda backbones list 'vit_*'"
        )
    reason = obstacle(timm.create_model(architecture, device="meta"))
    if reason is not None:
        raise BackboneError(
            f"Backbone {name!r} cannot be used: {reason}. Supported, for example: {', '.join(SUPPORTED_EXAMPLES)}."
        )
    try:
        return timm.create_model(name, **options)
    except RuntimeError as error:  # timm raises it for an unknown pretrained tag
        if options.get("pretrained"):
            raise
        raise BackboneError(f"timm cannot create {name!r}: {_first_line(error)}") from error


def glyphs_architecture(num_classes: int) -> VisionTransformer:
    """A timm ViT with 1.0 M parameters for 32 px images and patches of 4 px."""
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=128, depth=5, num_heads=4, num_classes=num_classes)


def _glyphs() -> Any:
    state = load_state_dict(str(GLYPHS), device="cpu")
    model: Any = glyphs_architecture(num_classes=len(state["head.bias"]))
    channels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic", **channels}
    model.load_state_dict(state)
    return model


def _from_hub(name: str) -> Any:
    try:
        return _supported_model(name, pretrained=True)
    except BackboneError:
        raise
    except Exception as error:  # each hub client has its own exception classes, which change
        raise BackboneError(
            f"No weights for {name!r}: they are not cached and the hub is unreachable, or they do not exist "
            f"({type(error).__name__}). Pass a local file: --weights FILE.safetensors (in Python: weights=...)."
        ) from error


def _from_file(name: str, path: Path) -> Any:
    if not path.is_file():
        raise BackboneError(f"Weights file {str(path)!r} does not exist.")
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
        if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
            raise TypeError("it contains more than named tensors")
    except (
        RuntimeError, SafetensorError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise BackboneError(
            f"Weights file {str(path)!r} cannot be read: {_first_line(error)}. It must be a safetensors file or "
            "a torch checkpoint that contains only tensors."
        ) from error
    head = f"{timm.get_pretrained_cfg_value(name.partition('.')[0], 'classifier') or 'head'}.weight"
    model = _supported_model(name, num_classes=len(state[head]) if head in state else 0)
    expected = model.state_dict()
    for key in ("patch_embed.proj.weight", "pos_embed"):  # timm would resample these silently, giving another model
        if key in state and key in expected and state[key].shape != expected[key].shape:
            raise BackboneError(
                f"Weights file {str(path)!r} does not fit {name!r}: {key} has shape {list(state[key].shape)}, not "
                f"{list(expected[key].shape)}. Name the model that the file is of: patch size or input size differs."
            )
    try:
        model.load_state_dict(convert(state, model))
    except (RuntimeError, KeyError, AttributeError, IndexError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise BackboneError(
            f"Weights file {str(path)!r} does not fit {name!r}: {' '.join(lines[1:3] or lines)[:300].rstrip('.')}. "
            "Name the model that the file is of."
        ) from error
    return model


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
