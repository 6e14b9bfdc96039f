"""The one forward pass: the frozen stream, the tasks' streams beside it, and their heads. Nothing else runs these.

Whatever context a caller's code is in (autocast, gradients, inference mode, another default device), it computes as it
must for the bits that are promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, FrozenStream, KeyValue, Reading, plain
from addenda.combined.attention import attend, attention_weights
from addenda.combined.shapes import batch_size, micro_batch
from addenda.combined.tiles import Layout, Tile, TileStore

Observer = Callable[[int, KeyValue, KeyValue], None]
"""Called in each batch at each layer with its number, the frozen keys and values [B, H, P, d], and those of the tokens
that the layout offers [B, H, 1 + N, d]; row 0 is zeros."""
Onlooker = Callable[[int, int, Tensor], None]
"""Called in each batch at each layer and tile with their numbers, and how its slots attend, [B, H, S, P + w]."""
Read = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""A `Head`, or another function of a task's feature [B, D] (without a token the pooled one), the pooled one, and the
layer features [B, n]."""


class Passed(NamedTuple):
    """What came of a pass."""

    answers: dict[str, Tensor]  # what each head gave, by its task's sha256, Float[B, C]
    pooled: Tensor | None  # the backbone's own feature in its precision, Float[B, D], where it was asked for
    layers: Tensor | None  # the layer features, Float[B, n], likewise


def forward_pass(
    backbone: FrozenBackbone,
    images: Tensor | Iterable[KeyValue],
    layout: Layout | None = None,
    heads: Mapping[str, Read] | None = None,
    sizes: Sequence[int] | None = None,
    pooled: bool = False,
    layers: bool = False,
    observe: Observer | None = None,
    look: Onlooker | None = None,
) -> Passed:
    """Runs images through the backbone and the tasks of a layout.

    Args:
        backbone: the frozen backbone.
        images: Float[B, 3, H, W] of its input size, as its transform gives them; or what each layer offered for one
            batch of them, once more.
        layout: the slots of the tasks; None runs the frozen stream alone.
        heads: what answers for some of the layout's tasks, by their sha256.
        sizes: images that a batch may have, ascending, of which the last is the micro-batch; each batch is filled up
            with zeros to one of them. None fills up none.
        pooled: whether the pooled feature is wanted beside what the heads read.
        layers: whether the layer features are.
        observe: see `Observer`.
        look: see `Onlooker`.

    Raises:
        BackboneError: images of another shape.
    """
    layout, heads = layout or Layout(TileStore(backbone), ()), heads or {}
    asked = [task for task in layout.tasks if task.sha256 in heads]
    reading: Reading = "pooled" if pooled or any(task.reads_pooled for task in asked) else "nothing"
    read_layers = layers or any(task.num_layer_features for task in asked)
    answers: dict[str, list[Tensor]] = {sha256: [] for sha256 in heads}
    features: dict[str, list[Tensor]] = {"pooled": [], "layers": []}
    # A traced pass is inside such a context already.
    with nullcontext() if torch.compiler.is_compiling() else plain(backbone.device):
        for batch, count in _batches(backbone, images, sizes) if isinstance(images, Tensor) else ((images, None),):
            stream = backbone.stream(batch, reading, read_layers) if isinstance(batch, Tensor) else batch
            tiles = _task_streams(backbone, stream, layout, observe, look)
            feature, of_layers = None, None
            if isinstance(stream, FrozenStream):
                feature = stream.pooled if reading == "pooled" else None
                of_layers = stream.layers if read_layers else None
            for sha256, head in heads.items():
                own = feature
                if sha256 in layout.slot:
                    tile, slot = layout.slot[sha256]
                    own = tiles[tile][slot]
                assert own is not None
                answers[sha256].append(head(own, feature, of_layers)[:count])
            if pooled and feature is not None:
                features["pooled"].append(feature[:count])
            if layers and of_layers is not None:
                features["layers"].append(of_layers[:count])
        joined = {sha256: torch.cat(parts) for sha256, parts in answers.items()}
        return Passed(joined, *(torch.cat(parts) if parts else None for parts in features.values()))


def backbone_logits(backbone: FrozenBackbone, images: Tensor) -> Float[Tensor, "B C"]:
    """Stock timm's own logits of images Float[B, 3, H, W], computed in the canonical micro-batch."""
    with plain(backbone.device):
        cut = _batches(backbone, images, (micro_batch(backbone.device),))
        return torch.cat([backbone.backbone_logits(batch)[:count] for batch, count in cut])


def _batches(
    backbone: FrozenBackbone, images: Tensor, sizes: Sequence[int] | None
) -> Iterator[tuple[Tensor, int | None]]:
    """Cuts images into micro-batches, the last filled up with zeros to one of some sizes; each with its count."""
    backbone.check_images(images)
    if torch.compiler.is_compiling():
        yield images, None
        return
    for part in images.detach().as_subclass(Tensor).split(micro_batch(backbone.device)):
        # One memory layout, whatever the caller's is: strides decide which kernel computes.
        shape = (batch_size(len(part), sizes), *part.shape[1:])
        batch = torch.zeros(shape, dtype=backbone.precision, device=backbone.device)
        batch[: len(part)] = part
        yield batch, len(part)


def _task_streams(
    backbone: FrozenBackbone,
    stream: Iterable[KeyValue],
    layout: Layout,
    observe: Observer | None,
    look: Onlooker | None,
) -> list[Float[Tensor, "S B D"]]:
    """Runs a frozen stream to its end with all the task streams of a layout: for each tile its slots' features."""
    hidden: list[Tensor] = []
    for layer, frozen in enumerate(stream):
        batch, num_heads, _, head_dim = frozen.keys.shape
        block = backbone.blocks[layer]
        if layer == 0:
            hidden = [tile.class_tokens.unsqueeze(1).repeat(1, batch, 1) for tile in layout.tiles]
            zeros = frozen.keys.new_zeros(batch, num_heads, 1 + len(layout.offered), head_dim)
            offered = KeyValue(zeros, zeros.clone())
        if layout.tiles:
            prefix = KeyValue(frozen.keys.contiguous(), frozen.values.contiguous())
        # What others see is offered before any task attends: a child may stand in an earlier tile than its parent.
        updates = [tile.adapters(layer) for tile in layout.tiles]
        projected = {}
        for i, pairs in enumerate(layout.offers):
            if pairs:
                slots, rows = map(list, zip(*pairs, strict=True))
                projected[i] = backbone.family.project(block, hidden[i], updates[i])
                _, keys, values = projected[i]  # [S, H, B, d]
                offered.keys[:, :, rows] = keys[slots].permute(2, 1, 0, 3)
                offered.values[:, :, rows] = values[slots].permute(2, 1, 0, 3)
        for i, tile in enumerate(layout.tiles):
            parts = projected.pop(i) if i in projected else backbone.family.project(block, hidden[i], updates[i])
            seen = _seen(tile, KeyValue(*parts[1:]), offered)
            attention = block.attn.scale, parts[0], prefix, seen, tile.memory(layer), tile.bias
            if look is not None:
                look(layer, i, attention_weights(*attention))
            hidden[i] = backbone.family.finish(block, hidden[i], attend(*attention), updates[i])
        if observe is not None:
            observe(layer, frozen, offered)
    return [backbone.final_norm(tokens) for tokens in hidden]


def _seen(tile: Tile, own: KeyValue, offered: KeyValue) -> KeyValue:
    """The tokens that each slot of a tile sees in one layer beside the frozen ones: its own and its ancestors'."""
    seen = KeyValue(own.keys.unsqueeze(3), own.values.unsqueeze(3))  # [S, H, B, t, d]
    if tile.ancestors.shape[1]:
        kin = (part[:, :, tile.ancestors].permute(2, 1, 0, 3, 4) for part in offered)  # from [B, H, S, a, d]
        seen = KeyValue(*(torch.cat(pair, dim=3) for pair in zip(seen, kin, strict=True)))
    return seen
