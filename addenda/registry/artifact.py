"""A task as bytes: safetensors with one canonical-JSON manifest, no times and no metrics in it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from addenda.exceptions import IntegrityError
from addenda.registry.objectives import OBJECTIVES
from addenda.registry.task import ADAPTED, LowRank, Task

FORMAT = 1
_TENSORS = ("class_token", "memory", "head_weight", "head_bias", "pooled_weight")
_ADAPTERS = tuple(f"adapters.{site}.{part}" for site in ADAPTED for part in LowRank._fields)


def digest(data: bytes) -> str:
    """The sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def encode(task: Task) -> bytes:
    """Turns a task into its artifact; one that was stored has its own header, whatever safetensors would write now.

    The manifest is one metadata value: several are saved in random order.
    """
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in _tensors_of(task).items()
    }
    header: bytes | None = vars(task).get("header")
    if header is not None:
        places = json.loads(header[8:])
        del places["__metadata__"]
        order = sorted(places, key=lambda name: places[name]["data_offsets"])
        return header + b"".join(tensors[name].numpy().tobytes() for name in order)
    manifest = {
        "format": FORMAT,
        "backbone": task.backbone,
        "labels": list(task.labels),
        "objective": task.objective,
        "extends": [parent.sha256 for parent in task.parents],
    }
    if task.temperature != 1.0:  # a task without one keeps the bytes that it had before there were temperatures
        manifest["temperature"] = float(task.temperature)
    check_reading(manifest)
    check_tensors(manifest, tensors)
    artifact: bytes = save(tensors, metadata={"addenda": canonical_json(manifest)})
    return artifact


def decode(data: bytes, sha256: str, parent: Callable[[str], Task], record: Mapping[str, Any]) -> Task:
    """Turns an artifact back into a task.

    Args:
        data: the artifact.
        sha256: what it must hash to.
        parent: gives the task of a parent's sha256.
        record: the fields that the artifact does not hold: name, version, config, metrics, data.

    Raises:
        IntegrityError: the bytes hash to something else, or are not a valid artifact.
    """
    manifest, tensors = read(data, sha256)
    with _valid():
        task = Task(
            backbone=manifest["backbone"],
            labels=tuple(manifest["labels"]),
            objective=manifest["objective"],
            temperature=manifest.get("temperature", 1.0),
            parents=tuple(parent(p) for p in manifest["extends"]),
            **{name: tensor for name, tensor in tensors.items() if name in _TENSORS},
            adapters=MappingProxyType(_adapters(tensors)) if _ADAPTERS[0] in tensors else None,
            **record,
        )
    vars(task).update(sha256=sha256, header=data[: _header_bytes(data)])
    return task


def check_unwritten(task: Task) -> None:
    """Raises IntegrityError where a task's tensors in memory no longer hash to its sha256: somebody wrote to them."""
    found = digest(encode(task))
    if found != task.sha256:
        raise IntegrityError(
            f"The tensors of task {task.ref!r} in memory have been written to: they hash to {found[:12]}…, and its "
            f"sha256 is {task.sha256[:12]}…. Load it again, or make another task of them (dataclasses.replace)."
        )


def read(data: bytes, sha256: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An artifact's manifest and tensors, checked; raises IntegrityError as `decode` does."""
    found = digest(data)
    if found != sha256:
        raise IntegrityError(
            f"its artifact was stored with sha256 {sha256[:16]}… and now hashes to {found[:16]}…: the stored bytes "
            "have changed. Restore the registry from a backup"
        )
    with _valid():
        tensors = load(data)
        header = json.loads(data[8 : _header_bytes(data)])
        manifest = json.loads(header["__metadata__"]["addenda"])
        listed = (manifest["labels"], manifest["extends"])
        if not all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in listed):
            raise IntegrityError("its artifact's labels and parents are no lists of texts")
        if manifest["format"] != FORMAT:
            raise IntegrityError(f"its artifact has format {manifest['format']}; this version reads {FORMAT}")
        check_reading(manifest)
        check_tensors(manifest, tensors)
        return manifest, tensors


def _header_bytes(data: bytes) -> int:
    """Where an artifact's tensors begin."""
    return 8 + int.from_bytes(data[:8], "little")


def _tensors_of(task: Task) -> dict[str, Tensor]:
    """A task's tensors by their names in the artifact."""
    held = {name: tensor for name in _TENSORS if (tensor := getattr(task, name)) is not None}
    for site, update in (task.adapters or {}).items():
        held |= {f"adapters.{site}.{part}": tensor for part, tensor in update._asdict().items()}
    return held


@contextmanager
def _valid() -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise IntegrityError("its artifact is not valid: its manifest is nested too deeply") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"its artifact is not valid: {error}") from error


def check_reading(manifest: Mapping[str, Any]) -> None:
    """Raises IntegrityError unless the objective is known and the temperature is a finite number above 0, or absent."""
    if manifest["objective"] not in OBJECTIVES:
        known = ", ".join(map(repr, OBJECTIVES))
        raise IntegrityError(f"its objective is {manifest['objective']!r}; this version knows {known}")
    temperature = manifest.get("temperature", 0.5)
    if not isinstance(temperature, float) or not math.isfinite(temperature) or temperature <= 0:
        raise IntegrityError(f"its temperature is {temperature!r}; it must be a finite number above 0")
    if temperature == 1.0:
        raise IntegrityError("its artifact stores the temperature 1.0, which equal content leaves out")


def check_tensors(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises IntegrityError unless the tensors fit each other and the labels, and are finite."""
    if len(set(manifest["labels"])) != len(manifest["labels"]) or not manifest["labels"]:
        raise IntegrityError(f"its labels are none or repeat each other: {manifest['labels'][:10]}")
    known = (*_TENSORS, *_ADAPTERS)
    unknown = set(tensors) - set(known)
    if unknown or not {"head_weight", "head_bias"} <= set(tensors):
        raise IntegrityError(f"its artifact holds the tensors {sorted(tensors)}; known are {sorted(known)}")
    head, bias, token = tensors["head_weight"], tensors["head_bias"], tensors.get("class_token")
    memory, pooled = tensors.get("memory"), tensors.get("pooled_weight")
    width = head.shape[-1] if head.ndim else 0
    fits = (
        head.ndim == 2
        and tuple(bias.shape) == (len(manifest["labels"]),) == (len(head),)
        and (token is None) == (memory is None)
        and (token is None or tuple(token.shape) == (width,))
        and (memory is None or (memory.ndim == 3 and memory.shape[2] == width))
        and (pooled is None or (token is not None and pooled.shape == head.shape))
    )
    if not fits:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise IntegrityError(f"its tensors do not fit {len(manifest['labels'])} labels or each other: {shapes}")
    if set(tensors) & set(_ADAPTERS):
        _check_adapters(tensors, width)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise IntegrityError(f"its {name} must be finite float32; it is {tensor.dtype}, or holds NaN or infinity")


def _check_adapters(tensors: Mapping[str, Tensor], width: int) -> None:
    """Raises IntegrityError unless adapters are whole and fit the layers, each other and one rank."""
    missing = [name for name in _ADAPTERS if name not in tensors]
    if missing:
        raise IntegrityError(f"its adapters lack {missing}: a task has all of {list(_ADAPTERS)}, or none")
    memory = tensors.get("memory")
    if memory is None:
        raise IntegrityError("it has adapters and no class token, whose way through the blocks they update")
    sites = _adapters(tensors)
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


def _adapters(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The adapters among an artifact's tensors."""
    return {site: LowRank(*(tensors[f"adapters.{site}.{part}"] for part in LowRank._fields)) for site in ADAPTED}
