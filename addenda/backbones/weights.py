"""Loads the tensors of a weights file into a timm model, converting the names of other libraries and of training."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from addenda.backbones.checkpoint import (
    first_line,
    listed,
    network,
    read_tensors,
    single_network,
    summary,
    under,
    without_chunks,
)
from addenda.backbones.nearest import nearest
from addenda.backbones.scope import convert
from addenda.backbones.transformers_names import check_config, names_of, renamed
from addenda.exceptions import BackboneError

TRANSFORMERS = "transformers'"
UNREAD = re.compile(r"(head|classifier|fc|lm_head|pooler|attn_pool|decoder\w*|mask_token|embeddings\.position_ids)\b")
"""Tensors that a model without them does not need: those of other heads, of training, and counters."""


class _MisfitError(ValueError):
    """The tensors are of another architecture than the model."""


class _Network(NamedTuple):
    """The tensors of one network, without their prefix."""

    tensors: dict[str, Tensor]
    prefix: str
    names: str = ""  # whose names they have, if not timm's
    converter_prefix: str = ""  # under which timm's converter expects them


def load_weights(model: Any, name: str, path: Path, resample: bool) -> str:
    """Loads a weights file into a model, and gives the model a classifier if the file has a fitting one.

    Unless `resample`, position embeddings for another input size are refused. Returns what was converted and left out,
    in one line; empty if the file holds just the model's tensors.
    """
    tensors = read_tensors(path)
    found = _Network(tensors, "")
    try:
        found = _single_network(tensors, model)
        if found.names.startswith(TRANSFORMERS):
            check_config(path.parent, model)
        resampled = _check_sizes(found.tensors, model, resample)
        with redirect_stdout(io.StringIO()):  # timm prints what its DINOv3 models lack
            prefixed = {found.converter_prefix + key: value for key, value in found.tensors.items()}
            state = convert(prefixed, model)
        unread = _fitting(state, model)
        model.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        own_advice = isinstance(error, ValueError) and not isinstance(error, _MisfitError)
        advice = "" if own_advice else f" {nearest(found.tensors, name)}"
        raise BackboneError(
            f"Weights file {str(path)!r} does not fit {name!r}: {first_line(error)}.{advice}"
        ) from error
    left_out = [key for key in tensors if not key.startswith(found.prefix)] + [found.prefix + key for key in unread]
    said = [f"its tensors under {found.prefix!r}"] if found.prefix else []
    said += [f"{found.names} names"] if found.names else []
    said += [resampled] if resampled else []
    said += [f"left out {summary(left_out, found.prefix)}"] if left_out else []
    return "; ".join(said)


def _single_network(tensors: Mapping[str, Tensor], model: Any) -> _Network:
    """Finds the tensors of a network like the model, by transformers', OpenAI's or timm's names."""
    if (found := names_of(tensors)) is not None:
        kind, prefix = found
        return _Network(renamed(kind, under(prefix, tensors)), prefix, f"{TRANSFORMERS} {kind.title}")
    first, last = "conv1.weight", "transformer.resblocks.0.ln_1.weight"
    prefixes = [key.removesuffix(first) for key in tensors if f".{key}".endswith(f".{first}")]
    if prefixes := [prefix for prefix in prefixes if prefix + last in tensors]:
        prefix = single_network(prefixes)
        return _Network(under(prefix, tensors), prefix, "OpenAI's CLIP", "visual.")
    names = model.state_dict().keys()
    tensors = without_chunks(tensors, names)
    prefix = network(tensors, names)
    return _Network(under(prefix, tensors), prefix)


def _check_sizes(tensors: Mapping[str, Tensor], model: Any, resample: bool) -> str:
    """Refuses what timm would resample unasked; returns what it will resample."""
    expected = model.state_dict()
    kernel, wanted = tensors.get("patch_embed.proj.weight"), expected.get("patch_embed.proj.weight")
    kernel = tensors.get("conv1.weight") if kernel is None else kernel
    if kernel is not None and wanted is not None and kernel.ndim == 4 and kernel.shape[2:] != wanted.shape[2:]:
        raise _MisfitError(f"its patches have {_pixels(kernel.shape[2:])}, the model's {_pixels(wanted.shape[2:])}")
    if "storage_tokens" in tensors and "blocks.0.attn.q_bias" not in expected:
        biases = [value.chunk(3) for key, value in tensors.items() if key.endswith("attn.qkv.bias")]
        if any(queries.any() or values.any() for queries, _, values in biases):  # keys' biases are masked
            raise _MisfitError("its queries and values have biases, which the model lacks")
    for name, table in expected.items():
        given = tensors.get(name) if name.endswith("relative_position_bias_table") else None
        if given is not None and given.shape != table.shape and not resample:
            raise _MisfitError(f"{name!r} has shape {list(given.shape)}, not {list(table.shape)}")
    positions, own = tensors.get("pos_embed"), expected.get("pos_embed")
    positions = tensors.get("positional_embedding") if positions is None else positions
    if positions is None or own is None:
        return ""
    count = positions.shape[-2] - ("register_tokens" in tensors)  # DINOv2's class token has one, in timm it has none
    if count == own.shape[1]:
        return ""
    patches = count - (own.shape[1] - model.patch_embed.num_patches)
    side = math.isqrt(max(0, patches))
    if side**2 != patches:
        raise _MisfitError(f"it has {count} position embeddings, the model {own.shape[1]}")
    patch_height, patch_width = model.patch_embed.patch_size
    size, own_size = (side * patch_height, side * patch_width), model.patch_embed.img_size
    if not resample:
        raise ValueError(
            f"its input size is {size[0]}, the model's {own_size[0]}; --img-size {size[0]} takes the file's size, "
            f"--img-size {own_size[0]} resamples its position embeddings (in Python: img_size=...)"
        )
    return f"position embeddings resampled from {size[0]} x {size[1]} to {_pixels(own_size)}"


def _fitting(state: dict[str, Tensor], model: Any) -> list[str]:
    """Gives the model the file's classifier, removes what the model lacks and need not read, and refuses the rest."""
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    weight, bias = (state.get(f"{classifier}.{kind}") for kind in ("weight", "bias"))
    if weight is not None and bias is not None and weight.shape[1:] == (model.num_features,):
        model.reset_classifier(len(weight))
    expected: dict[str, Tensor] = model.state_dict()
    unread = [key for key in state if key not in expected and UNREAD.match(key)]
    for key in unread:
        del state[key]
    if missing := expected.keys() - state.keys():
        raise _MisfitError(f"it lacks {listed(sorted(missing))}")
    if unknown := state.keys() - expected.keys():
        raise _MisfitError(f"the model has no {listed(sorted(unknown))}")
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise _MisfitError(f"{key!r} has shape {list(state[key].shape)}, not {list(tensor.shape)}")
        if tensor.is_floating_point() and not state[key].is_floating_point():
            raise ValueError(f"{key!r} is quantised ({state[key].dtype}); dequantise the file")
    return unread


def _pixels(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]} pixels"
