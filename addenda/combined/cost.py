"""What one task adds, counted: bytes and multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from addenda.backbones import FrozenBackbone


@dataclass(frozen=True)
class TaskCost:
    """The price of one task that extends none, without its head and the padding of a last tile.

    Attributes:
        token_bytes: its class token and memory, stored in float32.
        operations: multiply-adds for one image.
        backbone_operations: multiply-adds of the backbone's own pass over one image.
    """

    token_bytes: int
    operations: int
    backbone_operations: int

    @property
    def relative_operations(self) -> float:
        """Share of the backbone's pass."""
        return self.operations / self.backbone_operations


def task_cost(backbone: FrozenBackbone, num_memory_tokens: int) -> TaskCost:
    """Counts the price of one task (design, section 2): its linear layers, and one query over the keys that it sees."""
    width, tokens = backbone.embed_dim, backbone.num_tokens
    linear = sum(
        module.weight.numel()
        for block in backbone.blocks
        for module in block.modules()
        if isinstance(module, nn.Linear)
    )
    embed = backbone.model.patch_embed
    seen = tokens + 1 + num_memory_tokens
    return TaskCost(
        token_bytes=4 * width * (1 + backbone.depth * num_memory_tokens),
        operations=linear + 2 * backbone.depth * seen * width,
        backbone_operations=tokens * (linear + 2 * backbone.depth * tokens * width)
        + embed.num_patches * embed.proj.weight.numel(),
    )
