"""Counts what tasks cost, in bytes and multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from addenda.backbones import MIN_ROWS, FrozenBackbone
from addenda.combined.model import CombinedModel


@dataclass(frozen=True)
class TaskCost:
    """Cost of one task that extends no other, without its head and tile padding."""

    token_bytes: int  # class token, memory and adapters in float32
    operations: int  # multiply-adds per image
    backbone_operations: int  # multiply-adds of the backbone's forward pass per image
    num_layer_features: int  # weights, and multiply-adds per image, of a layer head for each class

    @property
    def relative_operations(self) -> float:
        """Multiply-adds relative to the backbone's forward pass."""
        return self.operations / self.backbone_operations


def task_cost(backbone: FrozenBackbone, num_memory_tokens: int, adapter_rank: int = 0) -> TaskCost:
    """Counts the cost of one task: linear layers, their adapters, and the attention of one query.

    Args:
        backbone: the backbone.
        num_memory_tokens: m, memory tokens per layer.
        adapter_rank: r, rank of the adapters; 0 for none.

    Raises:
        BackboneError: `adapter_rank` is not 0 and the blocks cannot carry adapters.
    """
    adapters = backbone.depth * _adapter_weights(backbone, adapter_rank)
    width, tokens = backbone.embed_dim, backbone.num_tokens
    modules = [module for block in backbone.blocks for module in block.modules()]
    linear = sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))
    num_keys = tokens + 1 + num_memory_tokens
    outside_blocks = backbone.patch_operations() + backbone.pool_operations()
    return TaskCost(
        token_bytes=4 * (width * (1 + backbone.depth * num_memory_tokens) + adapters),
        operations=linear + adapters + 2 * backbone.depth * num_keys * width,
        backbone_operations=tokens * (linear + 2 * backbone.depth * tokens * width) + outside_blocks,
        num_layer_features=backbone.num_layer_features,
    )


def _adapter_weights(backbone: FrozenBackbone, rank: int) -> int:
    """Weights in the adapters of one block; each costs one multiply-add per token."""
    return rank * sum(sum(shape) for shape in backbone.adapter_shapes().values()) if rank else 0


def pass_operations(model: CombinedModel, filled: bool = True) -> int:
    """Multiply-adds of one combined forward pass, per image of a full batch.

    Args:
        model: the combined model.
        filled: whether to include the padding of tiles, size classes and heads; False counts the method alone.
    """
    backbone, width = model.backbone, model.backbone.embed_dim
    cost = task_cost(backbone, 0)
    per_token = cost.operations - 2 * backbone.depth * (backbone.num_tokens + 1) * width  # its linear layers
    operations = cost.backbone_operations
    if backbone.pools_class_token:  # the last block computes keys and values of all tokens, but few outputs
        attention = 2 * backbone.num_tokens * width
        of_block, projections = per_token // backbone.depth, backbone.family.LAST_PROJECTIONS * width * width
        operations -= backbone.num_tokens * (of_block - projections + attention)
        if any(task.reads_pooled for task in model.tasks.values()):
            operations += (MIN_ROWS if filled else 1) * (of_block - projections + attention)
    operations -= backbone.pool_operations()
    if any(task.reads_pooled for task in model.tasks.values()):
        operations += backbone.pool_operations(MIN_ROWS if filled else 1)
    for tile in model.layout.tiles:
        num_slots, num_private = tile.bias.shape
        queries = num_slots if filled else len(tile.slots)
        private = num_slots * num_private if filled else int((tile.bias[: len(tile.slots)] == 0).sum())
        keys = queries * backbone.num_tokens + private
        operations += queries * per_token + 2 * backbone.depth * width * keys
        if filled:
            operations += num_slots * backbone.depth * _adapter_weights(backbone, tile.rank)
    if not filled:
        computed = {member.sha256: member for task in model.tasks.values() for member in (*task.closure, task)}
        ranks = [member.adapter_rank for member in computed.values()]
        operations += sum(backbone.depth * _adapter_weights(backbone, rank) for rank in ranks)
    for head in model.heads:
        rows = len(head.weight) if filled else head.num_labels
        operations += rows * width * (1 if head.pooled_weight is None else 2)
        if head.layer_weight is not None:
            operations += rows * head.layer_weight.shape[1]
        if head.layer_down is not None:
            operations += head.layer_down.numel()
    return operations


def loaded_bytes(model: CombinedModel) -> int:
    """Device memory of the tasks in bytes: tokens, memory, adapters, masks and heads, with all padding."""
    tensors: list[Tensor | None] = []
    for tile in model.layout.tiles:
        tensors += [tile.class_tokens, tile.ancestors, tile.bias]
        tensors += [tensor for layer in tile.memories for tensor in layer]
        tensors += [tensor for layer in tile.updates for adapter in layer for tensor in adapter]
    for head in model.heads:
        tensors += [head.weight, head.bias, head.pooled_weight, head.layer_weight, head.layer_down]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
