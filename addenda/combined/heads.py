"""Task heads on the device, applied with fixed shapes: one by one, or a group of one shape in batched products."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, is_traced, plain
from addenda.combined.shapes import HEAD_GROUP, HEAD_ROWS, HeadShape, head_shape, micro_batch
from addenda.registry import Task, check_unwritten

TENSORS = {
    "weight": "head_weight",
    "bias": "head_bias",
    "pooled_weight": "pooled_weight",
    "layer_down": "layer_down",
    "layer_weight": "layer_weight",
}
"""A head's tensors, and their names in its task."""


@dataclass(eq=False)
class Head:
    """A task's head in float32 or higher, with weights padded to a multiple of HEAD_ROWS rows."""

    shape: HeadShape
    num_labels: int
    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    pooled_weight: Float[Tensor, "C D"] | None = None
    layer_down: Float[Tensor, "r n"] | None = None
    layer_weight: Float[Tensor, "C k"] | None = None  # k = r, or n without `layer_down`
    group: HeadGroup | None = None  # its tensors are views of the group's

    def __call__(
        self, feature: Float[Tensor, "B D"], pooled: Float[Tensor, "B D"] | None, layers: Float[Tensor, "B n"] | None
    ) -> Float[Tensor, "B C"]:
        """Logits from rows of the task's feature (the pooled one if head-only), the pooled and the layer features."""
        logits = F.linear(feature, self.weight, self.bias)
        if self.pooled_weight is not None:
            assert pooled is not None
            logits = torch.addmm(logits, pooled, self.pooled_weight.T)
        if self.layer_weight is not None:
            assert layers is not None
            rows = layers if self.layer_down is None else F.linear(layers, self.layer_down)
            logits = torch.addmm(logits, rows, self.layer_weight.T)
        return logits[:, : self.num_labels]


class HeadGroup:
    """HEAD_GROUP heads of one shape. Where the self-test proved it, they have the bits of each head alone."""

    def __init__(self, heads: dict[str, Head]) -> None:
        """Moves the tensors of heads, by the task's sha256, into the group; replaces these heads in `heads`."""
        self.num_labels = {sha256: head.num_labels for sha256, head in heads.items()}
        self.tensors: dict[str, Tensor] = {
            name: torch.stack([getattr(head, name) for head in heads.values()])
            for name in TENSORS
            if getattr(next(iter(heads.values())), name) is not None
        }
        for slot, (sha256, head) in enumerate(heads.items()):
            views: dict[str, Any] = {name: each[slot] for name, each in self.tensors.items()}
            heads[sha256] = replace(head, group=self, **views)

    def __call__(
        self, features: Float[Tensor, "S B D"], pooled: Float[Tensor, "B D"] | None, layers: Float[Tensor, "B n"] | None
    ) -> Float[Tensor, "S B C"]:
        """Like `Head`, for one feature of each task; the result includes padded labels."""
        weight = {name: tensor.mT for name, tensor in self.tensors.items() if name != "bias"}

        def shared(rows: Tensor | None) -> Tensor:
            assert rows is not None
            return rows.expand(HEAD_GROUP, *rows.shape)  # not copied

        logits = torch.baddbmm(self.tensors["bias"].unsqueeze(1), features, weight["weight"])
        if "pooled_weight" in weight:
            logits = torch.baddbmm(logits, shared(pooled), weight["pooled_weight"])
        if "layer_weight" in weight:
            rows = shared(layers)
            rows = torch.bmm(rows, weight["layer_down"]) if "layer_down" in weight else rows
            logits = torch.baddbmm(logits, rows, weight["layer_weight"])
        return logits

    def divide(self, logits: Float[Tensor, "S N C"]) -> dict[str, Tensor]:
        """The logits of each task by its sha256, Float[N, C], without padding, in a tensor of its own."""
        rows = zip(self.num_labels.items(), logits.unbind(0), strict=True)
        return {sha256: each[:, :n].clone(memory_format=torch.contiguous_format) for (sha256, n), each in rows}


def load_head(backbone: FrozenBackbone, task: Task) -> Head:
    """A task's head on the backbone's device."""
    check_unwritten(task)
    dtype = torch.promote_types(backbone.precision, torch.float32)

    def pad(tensor: Tensor) -> Tensor:
        on_device = tensor.to(backbone.device, dtype)
        return F.pad(on_device, (0,) * (2 * (tensor.ndim - 1)) + (0, -len(tensor) % HEAD_ROWS))

    tensors: dict[str, Any] = {}
    with plain(backbone.device):
        for name, of_task in TENSORS.items():
            if (tensor := getattr(task, of_task)) is not None:
                tensors[name] = pad(tensor)
        if "layer_down" in tensors:
            missing = len(tensors["layer_down"]) - tensors["layer_weight"].shape[1]
            tensors["layer_weight"] = F.pad(tensors["layer_weight"], (0, missing))
    return Head(head_shape(task), len(task.labels), **tensors)


def head_rows(features: Tensor, backbone: FrozenBackbone) -> Tensor:
    """Features Float[..., B, D] as heads read them: in their dtype, padded with zeros to the canonical micro-batch.

    Rows are contiguous: on an Intel Xeon with two threads, MKL gives rows at other strides other bits.
    """
    rows = features.to(torch.promote_types(backbone.precision, torch.float32))
    if is_traced():
        return rows
    missing = micro_batch(backbone.device) - rows.shape[-2]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()


def group_heads(heads: dict[str, Head], proven: Container[HeadShape]) -> None:
    """Puts as many heads as possible of each proven shape into groups of HEAD_GROUP; complete groups stay as they are.

    Heads are replaced one group at a time, so that no second copy of all weights exists. One whose group is not
    complete any more gets a copy of its tensors, which frees the group's.
    """
    complete = set(complete_groups(heads))
    loose: dict[HeadShape, list[str]] = {}
    for sha256, head in heads.items():
        if head.group not in complete:
            loose.setdefault(head.shape, []).append(sha256)
    for shape, names in loose.items():
        num_grouped = len(names) - len(names) % HEAD_GROUP if shape in proven else 0
        for start in range(0, num_grouped, HEAD_GROUP):
            chunk = {sha256: heads[sha256] for sha256 in names[start : start + HEAD_GROUP]}
            HeadGroup(chunk)
            heads |= chunk
        for sha256 in names[num_grouped:]:
            head = heads[sha256]
            if head.group is not None:
                copies: dict[str, Any] = {
                    name: each.clone() for name in TENSORS if (each := getattr(head, name)) is not None
                }
                heads[sha256] = replace(head, group=None, **copies)


def complete_groups(heads: Mapping[str, object]) -> list[HeadGroup]:
    """The groups all of whose heads are among some heads, by the task's sha256."""
    groups = dict.fromkeys(head.group for head in heads.values() if isinstance(head, Head) and head.group is not None)
    return [group for group in groups if group.num_labels.keys() <= heads.keys()]


def random_head(shape: HeadShape, backbone: FrozenBackbone, seed: int) -> Head:
    """A head of random weights, without padding."""
    random = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(backbone.precision, torch.float32)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, dtype=torch.float32, device="cpu").to(backbone.device, dtype)

    rows, width, pooled, num_layer_features, rank = shape
    return Head(
        shape,
        rows,
        weight=draw(rows, width),
        bias=draw(rows),
        pooled_weight=draw(rows, width) if pooled else None,
        layer_down=draw(rank, num_layer_features) if rank else None,
        layer_weight=draw(rows, rank or num_layer_features) if num_layer_features else None,
    )
