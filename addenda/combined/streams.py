"""Every task's stream through every layer, beside the frozen one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined.attention import attend
from addenda.combined.layout import Layout, Tile

Observer = Callable[[int, KeyValue, KeyValue], None]


@torch.no_grad()
def task_features(
    backbone: FrozenBackbone, stream: Iterable[KeyValue], layout: Layout, observe: Observer | None = None
) -> list[Float[Tensor, "S B D"]]:
    """Runs a frozen stream to its end and all the task streams of a layout with it.

    Args:
        backbone: the frozen backbone.
        stream: each layer's keys and values over one batch of images, [B, H, P, d].
        layout: the slots.
        observe: called at each layer with its number, the frozen keys and values, and those of the layout's offered
            tokens, [B, H, 1 + N, d]; row 0 is zeros.

    Returns:
        For each tile its slots' final features, through the backbone's final norms.
    """
    hidden: list[Tensor] = []
    for layer, frozen in enumerate(stream):
        batch, num_heads, _, head_dim = frozen.keys.shape
        if layer == 0:
            hidden = [tile.class_tokens.unsqueeze(1).repeat(1, batch, 1) for tile in layout.tiles]
            zeros = frozen.keys.new_zeros(batch, num_heads, 1 + len(layout.offered), head_dim)
            offered = KeyValue(zeros, zeros.clone())
        if layout.tiles:
            prefix = KeyValue(frozen.keys.contiguous(), frozen.values.contiguous())
        for i, tile in enumerate(layout.tiles):
            hidden[i] = _pass(backbone, layer, tile, hidden[i], prefix, offered, layout.offers[i])
        if observe is not None:
            observe(layer, frozen, offered)
    return [backbone.final_norm(tokens) for tokens in hidden]


def _pass(
    backbone: FrozenBackbone,
    layer: int,
    tile: Tile,
    tokens: Float[Tensor, "S B D"],
    frozen: KeyValue,
    offered: KeyValue,
    offers: tuple[list[int], list[int]],
) -> Float[Tensor, "S B D"]:
    """One tile through one block. Tokens that others see are offered before any task of the tile attends."""
    block: Any = backbone.blocks[layer]
    queries, keys, values = backbone.project(block, tokens)  # [S, H, B, d]
    slots, rows = offers
    if slots:
        offered.keys[:, :, rows] = keys[slots].permute(2, 1, 0, 3)
        offered.values[:, :, rows] = values[slots].permute(2, 1, 0, 3)
    seen = KeyValue(keys.unsqueeze(3), values.unsqueeze(3))  # [S, H, B, t, d]
    if tile.ancestors.shape[1]:
        kin = (part[:, :, tile.ancestors].permute(2, 1, 0, 3, 4) for part in offered)  # from [B, H, S, a, d]
        seen = KeyValue(*(torch.cat(pair, dim=3) for pair in zip(seen, kin, strict=True)))
    read = attend(block.attn.scale, queries, frozen, seen, tile.memory[layer], tile.bias)
    return backbone.finish(block, tokens, read)
