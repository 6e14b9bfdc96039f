"""The artifact of a task: safetensors with a canonical-JSON manifest, without times or metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from addenda.exceptions import IntegrityError
from addenda.registry.store.digests import canonical_json, digest
from addenda.registry.store.header import header_size, parse_header
from addenda.registry.store.objectives import MEANINGS

FORMATS = {False: 1, True: 2}
"""The artifact's format, by whether the task has a layer head; version 0.1 reads only format 1."""
TENSORS = ("class_token", "memory", "head_weight", "head_bias", "pooled_weight", "layer_weight", "layer_down")

ADAPTED = ("q", "proj", "fc1", "fc2")
"""The linear layers of a block that adapters update, by timm's names; `q` is a third of timm's `qkv`."""


class LowRank(NamedTuple):
    """Low-rank updates of one linear layer in each of L blocks: f(x) becomes f(x) + (x @ down.T) @ up.T.

    Attributes:
        down: Float[L, r, in].
        up: Float[L, out, r].
    """

    down: Float[Tensor, "L r in"]
    up: Float[Tensor, "L out r"]


_ADAPTERS = tuple(f"adapters.{site}.{factor}" for site in ADAPTED for factor in LowRank._fields)


def pack(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], header: bytes | None) -> bytes:
    """Encodes float32 CPU tensors as an artifact.

    A stored task's `header` is reused, so that its bytes do not depend on the installed version of safetensors.
    """
    if header is not None:
        _, entries = parse_header(header)
        order = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        return header + b"".join(tensors[name].numpy().tobytes() for name in order)
    _check(manifest, tensors)
    # Only one metadata value, since safetensors saves several in random order.
    with_format = {"format": FORMATS["layer_weight" in tensors], **manifest}
    return bytes(save(dict(tensors), metadata={"addenda": canonical_json(with_format)}))


def read(data: bytes, sha256: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decodes and checks an artifact; returns its manifest and tensors, or raises IntegrityError."""
    actual = digest(data)
    if actual != sha256:
        raise IntegrityError(
            f"its artifact was stored with sha256 {sha256[:16]}… and now has sha256 {actual[:16]}…: the stored bytes "
            "have changed. Restore the registry from a backup"
        )
    try:
        tensors = load(data)
        manifest, _ = parse_header(data[: header_size(data)])
        lists = (manifest["labels"], manifest["extends"])
        if not all(isinstance(items, list) and all(isinstance(item, str) for item in items) for items in lists):
            raise IntegrityError("its artifact's labels and parents must be lists of strings")
        if not isinstance(manifest["backbone"], str):
            raise IntegrityError("its artifact's backbone must be a string")
        if manifest["format"] not in FORMATS.values():
            raise IntegrityError(
                f"its artifact has format {manifest['format']}; this version reads 1 and 2. Upgrade Addenda"
            )
        if manifest["format"] != FORMATS["layer_weight" in tensors]:
            raise IntegrityError(
                f"its artifact has format {manifest['format']}, which does not fit its tensors {sorted(tensors)}"
            )
        _check(manifest, tensors)
        return manifest, tensors
    except RecursionError as error:
        raise IntegrityError("its artifact is not valid: its manifest is nested too deeply") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"its artifact is not valid: {error}") from error


def _check(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Checks the manifest and that tensors are finite and fit each other and the labels; raises IntegrityError."""
    labels, objective, temperature = manifest["labels"], manifest["objective"], manifest.get("temperature", 0.5)
    if objective not in MEANINGS:
        known = ", ".join(map(repr, MEANINGS))
        raise IntegrityError(f"its objective is {objective!r}; this version supports {known}. Upgrade Addenda")
    if not isinstance(temperature, float) or not math.isfinite(temperature) or temperature <= 0:
        raise IntegrityError(f"its temperature is {temperature!r}; it must be a finite number above 0")
    if temperature == 1.0:
        raise IntegrityError("its artifact stores the default temperature 1.0, which must be omitted")
    if len(set(labels)) != len(labels) or not labels:
        raise IntegrityError(f"its labels are empty or contain duplicates: {labels[:10]}")
    known_tensors = {*TENSORS, *_ADAPTERS}
    if not {"head_weight", "head_bias"} <= set(tensors) <= known_tensors:
        raise IntegrityError(
            f"its artifact has the tensors {sorted(tensors)}; it needs a head and at most {sorted(known_tensors)}"
        )
    head, bias, token = tensors["head_weight"], tensors["head_bias"], tensors.get("class_token")
    memory, pooled = tensors.get("memory"), tensors.get("pooled_weight")
    layers, down = tensors.get("layer_weight"), tensors.get("layer_down")
    width = head.shape[-1] if head.ndim else 0
    fits = (
        head.ndim == 2
        and tuple(bias.shape) == (len(labels),) == (len(head),)
        and (token is None) == (memory is None)
        and (token is None or tuple(token.shape) == (width,))
        and (memory is None or (memory.ndim == 3 and memory.shape[2] == width))
        and (pooled is None or (token is not None and pooled.shape == head.shape))
        and (layers is None or (layers.ndim == 2 and len(layers) == len(labels)))
        and (down is None or (layers is not None and down.ndim == 2 and layers.shape[1] == len(down) > 0))
    )
    if not fits:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise IntegrityError(f"its tensors do not fit {len(labels)} labels or each other: {shapes}")
    if set(tensors) & set(_ADAPTERS):
        _check_adapters(tensors, width)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise IntegrityError(
                f"its {name} must be finite float32; it is {tensor.dtype}, or contains NaN or infinity"
            )


def _check_adapters(tensors: Mapping[str, Tensor], width: int) -> None:
    """Raises IntegrityError unless the adapters are complete, fit the layers and each other, and have one rank."""
    if missing := [name for name in _ADAPTERS if name not in tensors]:
        raise IntegrityError(f"its adapters lack {missing}: a task has all of {list(_ADAPTERS)}, or none")
    memory = tensors.get("memory")
    if memory is None:
        raise IntegrityError("it has adapters but no class token; adapters apply to the class token only")
    sites = adapters(tensors)
    shapes = {site: [list(factor.shape) for factor in update] for site, update in sites.items()}
    depth, fits = len(memory), all(factor.ndim == 3 for update in sites.values() for factor in update)
    if fits:
        rank, heads, hidden = sites["q"].down.shape[1], sites["q"].up.shape[1], sites["fc2"].down.shape[2]
        first = 2 * hidden if sites["fc1"].up.shape[1] == 2 * hidden else hidden  # twice as wide in a gated MLP
        ends = {"q": (width, heads), "proj": (heads, width), "fc1": (width, first), "fc2": (hidden, width)}
        expected = {site: [[depth, rank, fan_in], [depth, fan_out, rank]] for site, (fan_in, fan_out) in ends.items()}
        fits = rank > 0 and shapes == expected
    if not fits:
        raise IntegrityError(
            f"its adapters (down, up) do not fit {depth} layers of width {width} or each other, or do not have one "
            f"rank of at least 1: {shapes}"
        )


def adapters(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The adapters among an artifact's tensors."""
    return {site: LowRank(*(tensors[f"adapters.{site}.{factor}"] for factor in LowRank._fields)) for site in ADAPTED}
