"""Where a task's token looks: its attention over an image's patches."""

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
    """How much a task's token attends to each patch in the last layer, the mean over heads.

    One softmax goes over all that the token sees; an image's map sums to less than 1, since the rest goes to the
    backbone's class token and registers, the task's own token and memory, and those that it extends.

    Args:
        backbone: the backbone that the task was learned on.
        task: the task; it is computed alone with what it extends.
        images: as the backbone's transform gives them.

    Raises:
        RegistryError: the task is head-only: it has no token.
    """
    if task.class_token is None:
        raise RegistryError(f"Task {task.ref!r} is head-only: it has no token of its own that could look anywhere.")
    layout = Layout(TileStore(backbone), [task], sizes=None)
    at = layout.slot[task.sha256]
    kept: list[Tensor] = []

    def look(layer: int, tile: int, weights: Float[Tensor, "N heads S K"]) -> None:
        if (layer, tile) == (backbone.depth - 1, at[0]):
            kept.append(weights[:, :, at[1]].float().mean(1))

    forward_pass(backbone, images, layout, look=look)
    rows, columns = backbone.grid_size
    patches = slice(backbone.num_tokens - rows * columns, backbone.num_tokens)
    found: Tensor = torch.cat(kept)[:, patches].unflatten(-1, (rows, columns)).cpu()
    return found
