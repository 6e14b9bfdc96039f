"""What tasks cost, counted: bytes and multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from addenda.backbones import MIN_ROWS, FrozenBackbone
from addenda.combined.model import CombinedModel


@dataclass(frozen=True)
class TaskCost:
    """The price of one task that extends none, without its head and the padding of a last tile."""

    token_bytes: int  # of its class token, memory and adapters, stored in float32
    operations: int  # multiply-adds for one image
    backbone_operations: int  # those of the backbone's own pass over one image
    num_layer_features: int  # which a layer head reads; for each class it has as many weights, and multiply-adds

    @property
    def relative_operations(self) -> float:
        """Share of the backbone's pass."""
        return self.operations / self.backbone_operations


def task_cost(backbone: FrozenBackbone, num_memory_tokens: int, adapter_rank: int = 0) -> TaskCost:
    """Counts the price of one task: its linear layers and their updates, and one query over the keys that it sees.

    Args:
        backbone: the backbone.
        num_memory_tokens: m, in each layer.
        adapter_rank: r, of the updates of its linear layers; 0 without.

    Raises:
        BackboneError: a rank, and a backbone whose blocks cannot carry adapters.
    """
    adapters = backbone.depth * _updates(backbone, adapter_rank)
    width, tokens = backbone.embed_dim, backbone.num_tokens
    modules = [module for block in backbone.blocks for module in block.modules()]
    linear = sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))
    seen = tokens + 1 + num_memory_tokens
    return TaskCost(
        token_bytes=4 * (width * (1 + backbone.depth * num_memory_tokens) + adapters),
        operations=linear + adapters + 2 * backbone.depth * seen * width,
        backbone_operations=tokens * (linear + 2 * backbone.depth * tokens * width) + backbone.patch_operations,
        num_layer_features=backbone.num_layer_features,
    )


def _updates(backbone: FrozenBackbone, rank: int) -> int:
    """Numbers in the adapters of one block, each of which is one multiply-add for a token."""
    return rank * sum(sum(ends) for ends in backbone.adapter_shapes().values()) if rank else 0


def pass_operations(model: CombinedModel, filled: bool = True) -> int:
    """Multiply-adds of one combined pass, for one image of a full batch.

    Args:
        model: what is run.
        filled: whether to count what only fills tiles, size classes and heads up; without it, it is the method's own.
    """
    backbone, width = model.backbone, model.backbone.embed_dim
    cost = task_cost(backbone, 0)
    per_token = cost.operations - 2 * backbone.depth * (backbone.num_tokens + 1) * width  # its linear layers
    operations = cost.backbone_operations
    if backbone.pools_class_token:  # the last block: keys and values of all, the rest of a few
        seen = 2 * backbone.num_tokens * width
        of_block, offered = per_token // backbone.depth, backbone.family.LAST_PROJECTIONS * width * width
        operations -= backbone.num_tokens * (of_block - offered + seen)
        if any(task.reads_pooled for task in model.tasks.values()):
            operations += (MIN_ROWS if filled else 1) * (of_block - offered + seen)
    for tile in model.layout.tiles:
        num_slots, num_private = tile.bias.shape
        queries = num_slots if filled else len(tile.slots)
        private = num_slots * num_private if filled else int((tile.bias[: len(tile.slots)] == 0).sum())
        keys = queries * backbone.num_tokens + private
        operations += queries * per_token + 2 * backbone.depth * width * keys
        if filled:
            operations += num_slots * backbone.depth * _updates(backbone, tile.rank)
    if not filled:
        running = {member.sha256: member for task in model.tasks.values() for member in (*task.closure, task)}
        operations += sum(backbone.depth * _updates(backbone, member.adapter_rank) for member in running.values())
    for head in model.heads:
        rows = len(head.weight) if filled else head.num_labels
        operations += rows * width * (1 if head.pooled_weight is None else 2)
        if head.layer_weight is not None:
            operations += rows * head.layer_weight.shape[1]
        if head.layer_down is not None:
            operations += head.layer_down.numel()
    return operations


def loaded_bytes(model: CombinedModel) -> int:
    """What the tasks weigh on the device: tokens, memory, adapters, masks and heads, all filling included."""
    tensors: list[Tensor | None] = []
    for tile in model.layout.tiles:
        tensors += [tile.class_tokens, tile.ancestors, tile.bias]
        tensors += [part for layer in tile.memories for part in layer]
        tensors += [part for layer in tile.updates for adapter in layer for part in adapter]
    for head in model.heads:
        tensors += [head.weight, head.bias, head.pooled_weight, head.layer_weight, head.layer_down]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
