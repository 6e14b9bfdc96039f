"""A task as bytes: safetensors with one canonical-JSON manifest, no times and no metrics in it."""

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
from addenda.registry.store.header import end, parts
from addenda.registry.store.objectives import OBJECTIVES

FORMATS = {False: 1, True: 2}
"""An artifact's format, by whether its task reads layer features: version 0.1, which reads 1, knows nothing of them."""
TENSORS = ("class_token", "memory", "head_weight", "head_bias", "pooled_weight", "layer_weight", "layer_down")

ADAPTED = ("q", "proj", "fc1", "fc2")
"""The linear layers of a block that a task's adapters update, by timm's names; `q` is a third of its `qkv`."""


class LowRank(NamedTuple):
    """Low-rank updates of one linear layer in each of L blocks: its f(x) becomes f(x) + (x @ down.T) @ up.T.

    Attributes:
        down: Float[L, r, in].
        up: Float[L, out, r].
    """

    down: Float[Tensor, "L r in"]
    up: Float[Tensor, "L out r"]


_ADAPTERS = tuple(f"adapters.{site}.{part}" for site in ADAPTED for part in LowRank._fields)


def pack(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], header: bytes | None) -> bytes:
    """An artifact of float32 tensors on the CPU; a stored one keeps its header, whatever safetensors writes now."""
    if header is not None:
        _, places = parts(header)
        order = sorted(places, key=lambda name: places[name]["data_offsets"])
        return header + b"".join(tensors[name].numpy().tobytes() for name in order)
    _check(manifest, tensors)
    # One metadata value: several are saved in random order.
    described = {"format": FORMATS["layer_weight" in tensors], **manifest}
    return bytes(save(dict(tensors), metadata={"addenda": canonical_json(described)}))


def read(data: bytes, sha256: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An artifact's manifest and tensors, checked; raises IntegrityError where they are not valid."""
    found = digest(data)
    if found != sha256:
        raise IntegrityError(
            f"its artifact was stored with sha256 {sha256[:16]}… and now hashes to {found[:16]}…: the stored bytes "
            "have changed. Restore the registry from a backup"
        )
    try:
        tensors = load(data)
        manifest, _ = parts(data[: end(data)])
        listed = (manifest["labels"], manifest["extends"])
        if not all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in listed):
            raise IntegrityError("its artifact's labels and parents are no lists of texts")
        if not isinstance(manifest["backbone"], str):
            raise IntegrityError("its artifact's backbone is no text")
        if manifest["format"] not in FORMATS.values():
            raise IntegrityError(f"its artifact has format {manifest['format']}; this version reads 1 and 2")
        if manifest["format"] != FORMATS["layer_weight" in tensors]:
            raise IntegrityError(f"its artifact has format {manifest['format']} and the tensors {sorted(tensors)}")
        _check(manifest, tensors)
        return manifest, tensors
    except RecursionError as error:
        raise IntegrityError("its artifact is not valid: its manifest is nested too deeply") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"its artifact is not valid: {error}") from error


def _check(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises IntegrityError unless logits can be read, and tensors fit each other and the labels, and are finite."""
    labels, objective, temperature = manifest["labels"], manifest["objective"], manifest.get("temperature", 0.5)
    if objective not in OBJECTIVES:
        known = ", ".join(map(repr, OBJECTIVES))
        raise IntegrityError(f"its objective is {objective!r}; this version knows {known}")
    if not isinstance(temperature, float) or not math.isfinite(temperature) or temperature <= 0:
        raise IntegrityError(f"its temperature is {temperature!r}; it must be a finite number above 0")
    if temperature == 1.0:
        raise IntegrityError("its artifact stores the temperature 1.0, which equal content leaves out")
    if len(set(labels)) != len(labels) or not labels:
        raise IntegrityError(f"its labels are none or repeat each other: {labels[:10]}")
    known_tensors = {*TENSORS, *_ADAPTERS}
    if not {"head_weight", "head_bias"} <= set(tensors) <= known_tensors:
        raise IntegrityError(f"its artifact holds the tensors {sorted(tensors)}; known are {sorted(known_tensors)}")
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
            raise IntegrityError(f"its {name} must be finite float32; it is {tensor.dtype}, or holds NaN or infinity")


def _check_adapters(tensors: Mapping[str, Tensor], width: int) -> None:
    """Raises IntegrityError unless adapters are whole and fit the layers, each other and one rank."""
    if missing := [name for name in _ADAPTERS if name not in tensors]:
        raise IntegrityError(f"its adapters lack {missing}: a task has all of {list(_ADAPTERS)}, or none")
    memory = tensors.get("memory")
    if memory is None:
        raise IntegrityError("it has adapters and no class token, whose way through the blocks they update")
    sites = adapters(tensors)
    shapes = {site: [list(part.shape) for part in update] for site, update in sites.items()}
    depth, fits = len(memory), all(part.ndim == 3 for update in sites.values() for part in update)
    if fits:
        rank, heads, hidden = sites["q"].down.shape[1], sites["q"].up.shape[1], sites["fc1"].up.shape[1]
        ends = {"q": (width, heads), "proj": (heads, width), "fc1": (width, hidden), "fc2": (hidden, width)}
        expected = {site: [[depth, rank, fan_in], [depth, fan_out, rank]] for site, (fan_in, fan_out) in ends.items()}
        fits = rank > 0 and shapes == expected
    if not fits:
        raise IntegrityError(
            f"its adapters, down and up, do not fit {depth} layers of {width} dimensions, each other, or one rank of 1 "
            f"or more: {shapes}"
        )


def adapters(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The adapters among an artifact's tensors, which has them all."""
    return {site: LowRank(*(tensors[f"adapters.{site}.{part}"] for part in LowRank._fields)) for site in ADAPTED}
