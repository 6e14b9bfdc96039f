"""Loading a timm backbone by name, with weights from timm's hub, a local file, or the package itself."""

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

from addenda.backbones import glyphs
from addenda.backbones.arithmetic import building
from addenda.backbones.frozen import FrozenBackbone
from addenda.backbones.scope import FAMILIES, WORKING, obstacle
from addenda.exceptions import BackboneError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        name: a timm model name, with or without its pretrained tag, or `"glyphs"`, which the package carries.
        weights: a local `.safetensors`, `.pth`, `.pt` or `.bin` file; None takes timm's pretrained weights from the
            hub or its cache.
        mean: of the normalisation, pixel values in 0..1, one for each channel or one for all; None takes timm's for
            this model.
        std: standard deviation, likewise.
        precision: `"float32"` or `"bfloat16"`, in which the backbone and its tasks compute.
        device: a torch device; `"auto"` is CUDA where there is one, else the CPU.

    Returns:
        The frozen backbone, in eval mode, without gradients.

    Raises:
        BackboneError: the name is unknown or out of scope, the weights are not to be had or do not fit, or an
            argument is not valid.

    Examples:
        >>> backbone = load_backbone("glyphs", device="cpu")
        >>> backbone.depth, backbone.embed_dim
        (5, 128)
    """
    dtype = _dtype(precision)
    mean, std = ((value,) * 3 if isinstance(value, int | float) else value for value in (mean, std))
    for label, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise BackboneError(f"{label} takes one number or three, one for each channel; got {len(values)}.")
        if values is not None and not all(map(math.isfinite, values)):
            raise BackboneError(f"{label} must be finite; got {tuple(values)}.")
    if std is not None and min(std) <= 0:
        raise BackboneError(f"std must be positive; got {tuple(std)}.")
    chosen = _device(device)
    with building():
        if name == "glyphs":
            if weights is not None:
                raise BackboneError("Backbone 'glyphs' carries its own weights; leave the weights out.")
            model, source = glyphs.model(), "embedded"
        elif weights is None:
            model, source = _from_hub(name), "hub"
        else:
            model, source = _from_file(name, Path(weights)), str(Path(weights).resolve())
    return FrozenBackbone(model, name=name, source=source, mean=mean, std=std, precision=dtype, device=chosen)


def untrained_backbone(name: str, precision: str = "float32", device: str | torch.device = "auto") -> FrozenBackbone:
    """A backbone with random weights, for measurements of what no weight changes; the same at every call.

    Raises:
        BackboneError: the name or precision is unknown or out of scope, or the device cannot be used.
    """
    with building(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _in_scope(name)
    return FrozenBackbone(model, name, "untrained", precision=_dtype(precision), device=_device(device))


def _dtype(precision: str) -> torch.dtype:
    if precision not in PRECISIONS:
        raise BackboneError(f"Precision {precision!r} is not known. Known: {', '.join(PRECISIONS)}.")
    return PRECISIONS[precision]


def _device(device: str | torch.device) -> torch.device:
    """The device asked for, tried; CUDA is set up, for the whole process, so that bits can be kept."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=chosen, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"Device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    if chosen.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return chosen


def _in_scope(name: str, **options: Any) -> Any:
    """Builds a model, checked before its memory is taken."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3) or list(WORKING)
        raise BackboneError(
            f"timm knows no model {name!r}. Near it: {', '.join(near)}. See: addenda backbones list 'vit_*'"
        )
    why = obstacle(timm.create_model(architecture, device="meta"))
    if why is not None:
        raise BackboneError(
            f"Backbone {name!r} cannot carry task tokens: {why}. Two that work: {WORKING[0]}, {WORKING[1]}."
        )
    try:
        return timm.create_model(name, **options)
    except RuntimeError as error:  # timm's word for a pretrained tag that it does not know
        if options.get("pretrained"):
            raise
        raise BackboneError(f"timm cannot make {name!r}: {_first_line(error)}") from error


def _from_hub(name: str) -> Any:
    try:
        return _in_scope(name, pretrained=True)
    except BackboneError:
        raise
    except Exception as error:  # each hub client has its own exception classes, and they change
        raise BackboneError(
            f"No weights for {name!r}: timm's hub could not be reached and its cache does not hold them, or there are "
            f"none ({type(error).__name__}). Give a local file: --weights FILE.safetensors (in Python: weights=...)."
        ) from error


def _from_file(name: str, path: Path) -> Any:
    if not path.is_file():
        raise BackboneError(f"Weights file {str(path)!r} does not exist.")
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
        if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
            raise TypeError("it holds more than named tensors")
    except (
        RuntimeError, SafetensorError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise BackboneError(
            f"Weights file {str(path)!r} cannot be read: {_first_line(error)}. It must be a safetensors file or "
            "a torch checkpoint that holds tensors only."
        ) from error
    model = _in_scope(name, num_classes=len(state["head.weight"]) if "head.weight" in state else 0)
    own = model.state_dict()
    for key in ("patch_embed.proj.weight", "pos_embed"):  # timm would resample it: another model, silently
        if key in state and key in own and state[key].shape != own[key].shape:
            raise BackboneError(
                f"Weights file {str(path)!r} does not fit {name!r}: {key} is {list(state[key].shape)}, not "
                f"{list(own[key].shape)}. It is of another patch or input size."
            )
    try:
        model.load_state_dict(FAMILIES[type(model)].convert(state, model))
    except (RuntimeError, KeyError, AttributeError, IndexError) as error:
        reasons = [line.strip() for line in str(error).splitlines()]
        raise BackboneError(
            f"Weights file {str(path)!r} does not fit {name!r}: {' '.join(reasons[1:3] or reasons)[:300]}"
        ) from error
    return model


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
