"""Every task's stream through every layer, beside the frozen one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, FrozenStream, KeyValue
from addenda.combined.attention import attend, finish, project
from addenda.combined.layout import Layout

Observer = Callable[[int, KeyValue, KeyValue], None]


@torch.no_grad()
def task_features(
    backbone: FrozenBackbone, stream: FrozenStream, layout: Layout, observe: Observer | None = None
) -> Float[Tensor, "B N D"]:
    """Runs a frozen stream to its end and all the task streams of a layout with it.

    Args:
        backbone: the frozen backbone.
        stream: its pass over one micro-batch, not yet begun.
        layout: N slots in tiles.
        observe: called at each layer with its number, the frozen keys and values [B, H, P, d] and those of the task
            tokens [B, H, N, d].

    Returns:
        Each slot's final feature, through the backbone's final norms.
    """
    hidden: list[Tensor] = []
    for layer, frozen in enumerate(stream):
        block = backbone.blocks[layer]
        if layer == 0:
            batch = len(frozen.keys)
            hidden = [tile.class_tokens.expand(batch, -1, -1).contiguous() for tile in layout.tiles]
        # A child reads its parents' tokens of this same layer, so every tile is projected before any attends.
        projected = [project(backbone, block, tokens) for tokens in hidden]
        shape = (len(frozen.keys), backbone.num_heads, 0, frozen.keys.shape[-1])
        empty = frozen.keys.new_empty(shape)
        keys = torch.cat([empty, *(k for _, k, _ in projected)], dim=2)
        values = torch.cat([empty, *(v for _, _, v in projected)], dim=2)
        if observe is not None:
            observe(layer, frozen, KeyValue(keys, values))
        for i, tile in enumerate(layout.tiles):
            tokens = KeyValue(keys[:, :, tile.visible], values[:, :, tile.visible])
            read = attend(block.attn.scale, projected[i][0], frozen, tokens, tile.memory[layer], tile.bias)
            hidden[i] = finish(block, hidden[i], read)
    if not hidden:
        return torch.empty(0, 0, backbone.embed_dim, device=backbone.device)
    return torch.cat([backbone.final_norm(tokens) for tokens in hidden], dim=1)
