"""Every task's stream through every layer, beside the frozen one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined.attention import attend, attention_weights
from addenda.combined.layout import Layout, Tile

Observer = Callable[[int, KeyValue, KeyValue], None]
Onlooker = Callable[[int, int, Tensor], None]


@torch.no_grad()
def task_features(
    backbone: FrozenBackbone,
    stream: Iterable[KeyValue],
    layout: Layout,
    observe: Observer | None = None,
    look: Onlooker | None = None,
) -> list[Float[Tensor, "S B D"]]:
    """Runs a frozen stream to its end and all the task streams of a layout with it.

    Args:
        backbone: the frozen backbone.
        stream: each layer's keys and values over one batch of images, [B, H, P, d].
        layout: the slots.
        observe: called at each layer with its number, the frozen keys and values, and those of the layout's offered
            tokens, [B, H, 1 + N, d]; row 0 is zeros.
        look: called at each layer and tile with their numbers, and how its slots attend, [B, H, S, P + w].

    Returns:
        For each tile its slots' final features, through the backbone's final norms.
    """
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
        projected = {}
        for i, (slots, rows) in enumerate(layout.offers):
            if slots:
                projected[i] = backbone.family.project(block, hidden[i], layout.tiles[i].block_adapters(layer))
                _, keys, values = projected[i]  # [S, H, B, d]
                offered.keys[:, :, rows] = keys[slots].permute(2, 1, 0, 3)
                offered.values[:, :, rows] = values[slots].permute(2, 1, 0, 3)
        for i, tile in enumerate(layout.tiles):
            adapters = tile.block_adapters(layer)
            parts = projected.pop(i) if i in projected else backbone.family.project(block, hidden[i], adapters)
            seen = _seen(tile, KeyValue(*parts[1:]), offered)
            attention = block.attn.scale, parts[0], prefix, seen, tile.memory[layer], tile.bias
            if look is not None:
                look(layer, i, attention_weights(*attention))
            read = attend(*attention)
            hidden[i] = backbone.family.finish(block, hidden[i], read, adapters)
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
