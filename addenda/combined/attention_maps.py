"""Attention maps: the attention of a task's class token over an image's patches."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined.forward import forward_pass
from addenda.combined.tiles import Layout, TileStore
from addenda.exceptions import RegistryError
from addenda.registry import Task


def attention_map(
    backbone: FrozenBackbone, task: Task, images: Float[Tensor, "N 3 H W"]
) -> Float[Tensor, "N rows columns"]:
    """Attention weights of a task's class token over the patches in the last layer, averaged over heads.

    An image's map sums to less than 1: the softmax also covers the backbone's class token and registers, and the tokens
    and memory of the task and of the tasks that it extends.

    Args:
        backbone: the backbone that the task was learned on.
        task: the task, which is computed with only the tasks that it extends.
        images: images from the backbone's transform.

    Raises:
        RegistryError: the task is head-only, without a class token.
    """
    if task.class_token is None:
        raise RegistryError(
            f"Task {task.ref!r} is head-only: without class token there is no attention map. Choose a task with one."
        )
    layout = Layout(TileStore(backbone), [task], sizes=None)
    task_tile, slot = layout.slot[task.sha256]
    batches: list[Tensor] = []

    def observe_attention(layer: int, tile: int, weights: Float[Tensor, "N heads S K"]) -> None:
        if (layer, tile) == (backbone.depth - 1, task_tile):
            batches.append(weights[:, :, slot].float().mean(1))

    forward_pass(backbone, images, layout, observe_attention=observe_attention)
    rows, columns = backbone.grid_size
    patches = slice(backbone.num_tokens - rows * columns, backbone.num_tokens)
    maps: Tensor = torch.cat(batches)[:, patches].unflatten(-1, (rows, columns)).cpu()
    return maps
