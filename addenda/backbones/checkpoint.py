"""Reads a weights file as named tensors, and finds the tensors of one network among them; nothing is unpickled."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from addenda.exceptions import BackboneError

INDEX = ".safetensors.index.json"
FOLDER_FILES = ("model.safetensors", f"model{INDEX}", "pytorch_model.bin", "model.pth")
"""What a folder of weights is searched for, in this order."""

AVERAGES = {"ema", "teacher", "target", "averaged", "avg"}
"""Words in the names of a running average of a network's weights, which is meant where a file holds both."""


def weights_file(path: Path) -> Path:
    """The weights file at a path, which may be a folder; BackboneError if there is none."""
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not found:
            raise BackboneError(
                f"Folder {str(path)!r} has no weights file; it must hold one of {listed(FOLDER_FILES)}."
            )
        return found[0]
    if not path.is_file():
        raise BackboneError(f"Weights file {str(path)!r} does not exist.")
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads every tensor of a safetensors file, of the shards that an index names, or of a torch checkpoint.

    Nested dictionaries give names joined by dots; anything else than tensors is left out. BackboneError if the file is
    unreadable, contains pickled objects or no tensors, or two tensors have one name.
    """
    try:
        if path.name.endswith(INDEX):
            content: Any = _shards(path)
        elif path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm stores its options as one
                content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, Mapping):
            raise TypeError(f"it contains a {type(content).__name__}, not named tensors")
        tensors: dict[str, Tensor] = {}
        for name, tensor in _flat(content):
            if name in tensors:
                raise ValueError(f"two tensors have the name {name!r}")
            tensors[name] = tensor
        if not tensors:
            raise ValueError("it contains no named tensors")
    except (
        RuntimeError, SafetensorError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise BackboneError(
            f"Weights file {str(path)!r} cannot be read: {first_line(error)}. It must be a safetensors file or "
            "a torch checkpoint that contains only tensors."
        ) from error
    return tensors


def _shards(index: Path) -> dict[str, Tensor]:
    weight_map = json.loads(index.read_bytes())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"its index names {shard!r}, which is not beside it")
        tensors |= load_file(index.with_name(shard))
    if missing := weight_map.keys() - tensors.keys():
        raise ValueError(f"its shards lack {listed(sorted(missing))}")
    return tensors


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(name, str) and isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


_CHUNKED = re.compile(r"\bblocks\.\d+\.(?=\d+\.)")


def without_chunks(tensors: Mapping[str, Tensor], names: Collection[str]) -> Mapping[str, Tensor]:
    """Renames the blocks of a model whose training grouped them, as DINOv2's does: blocks.1.7. is blocks.7."""
    if any(_CHUNKED.search(name) for name in names):  # the model's own
        return tensors
    renamed = {_CHUNKED.sub("blocks.", name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise ValueError("several of its tensors would have one name")
    return renamed


def network(tensors: Mapping[str, Tensor], names: Collection[str]) -> str:
    """The prefix of the tensors of one network, such as "module."; most of its `names` must be among them."""
    starts = ((name, match.end()) for name in tensors for match in re.finditer(r"^|\.", name))
    found = Counter(name[:start] for name, start in starts if name[start:] in names)
    most = max(found.values(), default=0)
    if 2 * most < len(names):
        return ""
    return single_network([prefix for prefix, count in found.items() if 2 * count > most])


def single_network(prefixes: Sequence[str]) -> str:
    """The only prefix, or the only one of a running average; ValueError if there are several."""
    averages = [prefix for prefix in prefixes if AVERAGES & set(re.split(r"[._]", prefix))]
    chosen = averages if len(averages) == 1 else prefixes
    if len(chosen) > 1:
        raise ValueError(f"it has several networks, under {listed(chosen)}; save the one that is meant to its own file")
    return chosen[0]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names have a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def summary(names: Iterable[str], prefix: str) -> str:
    """Counts tensors by where their names leave a prefix: 'text_model (12), logit_scale (1)'."""
    counts: Counter[str] = Counter()
    for name in names:
        shared = prefix
        while not name.startswith(shared):
            shared = shared[: shared.rstrip(".").rfind(".") + 1]
        counts[shared + name.removeprefix(shared).partition(".")[0]] += 1
    return listed([f"{part} ({count})" for part, count in sorted(counts.items())], quoted=False)


def listed(names: Collection[str], quoted: bool = True) -> str:
    """Up to four names, and how many more there are."""
    shown = [repr(name) if quoted else name for name in list(names)[:4]]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its class."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
