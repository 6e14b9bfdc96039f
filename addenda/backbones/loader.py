"""Loads a timm backbone by name, with weights from the hub, a local file, or the package."""

from __future__ import annotations

import difflib
import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
from huggingface_hub.constants import ENDPOINT
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer

from addenda.backbones.arithmetic import float32_on_cpu
from addenda.backbones.checkpoint import first_line, weights_file
from addenda.backbones.frozen import FrozenBackbone
from addenda.backbones.scope import SUPPORTED_EXAMPLES, cached_weights, convert, obstacle
from addenda.backbones.weights import load_weights
from addenda.exceptions import BackboneError

LOCAL = "local-dir:"
"""timm's prefix of the name of a model in a folder."""
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
    img_size: int | Sequence[int] | None = None,
    crop_pct: float | None = None,
) -> FrozenBackbone:
    """Loads a backbone and freezes it.

    Args:
        name: a timm model name, with or without its pretrained tag; `"hf-hub:ORG/NAME"` or `"local-dir:FOLDER"`, as in
            timm; or `"glyphs"`, which is part of the package.
        weights: a local `.safetensors`, `.pth`, `.pt` or `.bin` file, an index of shards, or a folder with one of
            them; None takes timm's pretrained weights from the hub or its cache.
        mean: normalisation mean of pixel values in 0..1, one per channel or one for all; None takes timm's.
        std: normalisation standard deviation, likewise.
        precision: `"float32"` or `"bfloat16"`, the dtype of the backbone and its tasks.
        device: a torch device; `"auto"` selects CUDA if available, else the CPU.
        img_size: input size in pixels, or height and width, to which position embeddings are resampled as in timm;
            None takes the model's.
        crop_pct: share of an image's shorter side that the centre crop keeps, at most 1; None takes timm's.

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
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise BackboneError(f"crop_pct must be above 0 and at most 1; got {crop_pct}.")
    resolved_device, conversion = _device(device), ""
    if name.startswith(LOCAL) and name != LOCAL:
        moved = weights is not None and Path(weights).is_dir()
        folder = Path(str(weights) if moved else name.removeprefix(LOCAL)).resolve()
        name, weights = f"{LOCAL}{folder}", weights or folder  # absolute, for whoever loads a record of it
    with float32_on_cpu():
        if name == "glyphs":
            if weights is not None:
                raise BackboneError("Backbone 'glyphs' includes its weights; omit the weights argument.")
            model, source = _glyphs(img_size), "embedded"
        elif weights is None:
            model, source = _from_hub(name, img_size), "hub"
        else:
            file, source = weights_file(Path(weights)), str(Path(weights).resolve())
            model = _supported_model(name, img_size, num_classes=0)
            conversion = load_weights(model, name, file, resample=img_size is not None)
    return FrozenBackbone(model, name, source, mean, std, dtype, resolved_device, conversion, crop_pct)


def untrained_backbone(
    name: str,
    precision: str = "float32",
    device: str | torch.device = "auto",
    img_size: int | Sequence[int] | None = None,
) -> FrozenBackbone:
    """A backbone with random weights, the same in every call, for measurements that do not depend on weights.

    Raises:
        BackboneError: the name, precision or size is unknown or unsupported, or the device cannot be used.
    """
    with float32_on_cpu(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _supported_model(name, img_size)
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
            f"Device {str(device)!r} cannot be used: {first_line(error)}. Use auto, cpu, cuda:N or mps."
        ) from error
    if resolved.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return resolved


def _supported_model(name: str, img_size: int | Sequence[int] | None = None, **options: Any) -> Any:
    """Builds a model, after checking it without allocating memory."""
    if ":" not in name and not timm.is_model(architecture := name.partition(".")[0]):
        similar = difflib.get_close_matches(architecture, timm.list_models(), n=3) or list(SUPPORTED_EXAMPLES)
        raise BackboneError(
            f"timm has no model {name!r}. Similar names: {', '.join(similar)}. See: addenda backbones list 'vit_*'"
        )
    model = _described(name)
    reason = obstacle(model)
    if reason is not None:
        raise BackboneError(
            f"Backbone {name!r} cannot be used: {reason}. Supported, for example: {', '.join(SUPPORTED_EXAMPLES)}."
        )
    if img_size is not None:
        options |= _input_size(name, img_size, model)
    try:
        if options.get("pretrained") and cached_weights(name) is None and not getproxies():
            socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)  # without a network the hub's client tries a minute
        return timm.create_model(name, **options)
    except RuntimeError as error:  # timm raises it for an unknown pretrained tag
        if options.get("pretrained"):
            raise
        raise BackboneError(f"timm cannot create {name!r}: {first_line(error)}") from error


def _described(name: str) -> Any:
    """The model of a name, without memory; its config.json is read if the name is of a folder or of the hub."""
    try:
        return timm.create_model(name if ":" in name else name.partition(".")[0], device="meta")
    except Exception as error:  # each hub client has its own exception classes, which change
        raise BackboneError(
            f"timm cannot read the model of {name!r} ({type(error).__name__}: {first_line(error)[:100]}). Its "
            "config.json must be timm's; for others name the timm model, and pass --weights FILE (in Python: "
            "weights=...)."
        ) from error


def _input_size(name: str, img_size: int | Sequence[int], model: Any) -> dict[str, Any]:
    """Arguments that give a timm model an input size; none if it is its own, which some models do not take."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2:
        raise BackboneError(f"Input size {size} must be one number, or height and width.")
    patches: Any = getattr(model, "patch_embed", None)
    if getattr(patches, "img_size", None) is None:  # a convolutional network, which takes any size
        return {"pretrained_cfg_overlay": {"input_size": (3, *size)}}
    for pixels, patch in zip(size, patches.patch_size, strict=True):
        if pixels < patch or pixels % patch:
            raise BackboneError(
                f"Input size {pixels} does not fit {name!r}: it must be a multiple of its patch size {patch}, such as "
                f"{max(1, round(pixels / patch)) * patch}."
            )
    return {} if size == tuple(patches.img_size) else {"img_size": size}


def glyphs_architecture(num_classes: int, img_size: int | tuple[int, int] = 32) -> VisionTransformer:
    """A timm ViT with 1.0 M parameters for images of 32 px by default, and patches of 4 px."""
    return VisionTransformer(
        img_size=img_size, patch_size=4, embed_dim=128, depth=5, num_heads=4, num_classes=num_classes
    )


def _glyphs(img_size: int | Sequence[int] | None) -> Any:
    state = load_state_dict(str(GLYPHS), device="cpu")
    classes = len(state["head.bias"])
    model: Any = glyphs_architecture(classes)
    if img_size is not None and (changed := _input_size("glyphs", img_size, model)):
        model = glyphs_architecture(classes, **changed)
        state = convert(state, model)
    channels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic", **channels}
    model.load_state_dict(state)
    return model


def _from_hub(name: str, img_size: int | Sequence[int] | None) -> Any:
    try:
        return _supported_model(name, img_size, pretrained=True)
    except BackboneError:
        raise
    except Exception as error:  # each hub client has its own exception classes, which change
        raise BackboneError(
            f"No weights for {name!r}: they are not cached and the hub is unreachable, or they do not exist "
            f"({type(error).__name__}). Pass a local file: --weights FILE.safetensors (in Python: weights=...)."
        ) from error
