"""The paper's own form of many tasks: one sequence of frozen tokens, task tokens and memory under one mask (Table 1).

The yardstick that Addenda is measured against, in time and, without the mask, in accuracy. `addenda.combined` uses none
of it. Memory joins the sequence before norm1, as the paper draws it, and one qkv product serves all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from addenda.backbones import FrozenBackbone
from addenda.registry import Task

DENSE_NAMES = {
    "class_token": "class_tokens.0", "memory": "memory.0", "head_weight": "head_weight.0",
    "head_bias": "head_bias.0", "pooled_weight": "pooled_weight.0",
}  # fmt: skip
"""A task's tensors, as the parameters of a DenseMask of one task."""


class DenseMask(nn.Module):
    """Tasks that extend none, answered through a mask of all tokens by all keys; what is learned are its parameters.

    Not `masked`, every token sees every other's, and the frozen ones are moved by the tasks. `precomputed` memory has
    its keys and values once, here, and learns nothing; the paper computes them for every image.
    """

    def __init__(
        self, backbone: FrozenBackbone, tasks: Sequence[Task], masked: bool = True, precomputed: bool = False
    ) -> None:
        super().__init__()
        assert tasks
        assert not any(task.parents or task.adapters for task in tasks)
        self._backbone, self._names = backbone, [task.name for task in tasks]

        def learned(tensor: Tensor | None) -> nn.Parameter:
            assert tensor is not None
            return nn.Parameter(tensor.detach().clone().to(backbone.device))

        self.class_tokens = nn.ParameterList(learned(task.class_token) for task in tasks)
        self.memory = nn.ParameterList(learned(task.memory) for task in tasks)
        self.head_weight = nn.ParameterList(learned(task.head_weight) for task in tasks)
        self.head_bias = nn.ParameterList(learned(task.head_bias) for task in tasks)
        pooled = {str(place): task.pooled_weight for place, task in enumerate(tasks)}
        self.pooled_weight = nn.ParameterDict({place: learned(one) for place, one in pooled.items() if one is not None})
        self._mask = self._make_mask().to(backbone.device) if masked else None
        self._precomputed: list[tuple[Tensor, ...]] | None = None
        if precomputed:
            with torch.no_grad():
                self._precomputed = [
                    backbone.family.project(block, self._layer(layer).unsqueeze(0))[1:]
                    for layer, block in enumerate(backbone.blocks)
                ]

    def _layer(self, layer: int) -> Float[Tensor, "M D"]:
        """The memory of all tasks in one layer."""
        return torch.cat([memory[layer] for memory in self.memory]).to(self._backbone.precision)

    def _make_mask(self) -> Bool[Tensor, "Q K"]:
        """Which query sees which key: rows are frozen and task tokens, columns those and all memory."""
        frozen, tasks = self._backbone.num_tokens, torch.arange(len(self._names), dtype=torch.int64, device="cpu")
        sizes = torch.tensor([memory.shape[1] for memory in self.memory], dtype=torch.int64, device="cpu")
        owner = torch.cat([tasks, tasks.repeat_interleave(sizes)])
        mask = torch.zeros(frozen + len(tasks), frozen + len(owner), dtype=torch.bool, device="cpu")
        mask[:, :frozen] = True
        mask[frozen:, frozen:] = tasks[:, None] == owner
        return mask

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B C"]]:
        """Logits of every task, in float32."""
        backbone = self._backbone
        tokens = backbone.embed(images)
        own = backbone.first_tokens(torch.stack(list(self.class_tokens)).to(backbone.precision))
        tokens = torch.cat([tokens, own.expand(len(images), -1, -1)], dim=1)
        for layer, block in enumerate(backbone.blocks):
            tokens = self._block(block, layer, tokens)
        features = backbone.final_norm(tokens[:, backbone.num_tokens :]).float()
        pooled = backbone.pool(tokens[:, : backbone.num_tokens]).float()
        logits = {}
        for place, name in enumerate(self._names):
            logits[name] = F.linear(features[:, place], self.head_weight[place], self.head_bias[place])
            if str(place) in self.pooled_weight:
                logits[name] = logits[name] + F.linear(pooled, self.pooled_weight[str(place)])
        return logits

    def _block(self, block: Any, layer: int, tokens: Tensor) -> Tensor:
        backbone, batch = self._backbone, len(tokens)
        if self._precomputed is None:
            everything = torch.cat([tokens, self._layer(layer).expand(batch, -1, -1)], dim=1)
            queries, keys, values = backbone.family.project(block, everything)
            queries = queries[:, :, : tokens.shape[1]]
        else:
            queries, keys, values = backbone.family.project(block, tokens)
            keys, values = (
                torch.cat([own, of_memory.expand(batch, -1, -1, -1)], dim=2)
                for own, of_memory in zip((keys, values), self._precomputed[layer], strict=True)
            )
        queries, keys = backbone.family.place(block, queries), backbone.family.place(block, keys)
        read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._mask, scale=block.attn.scale)
        return backbone.family.finish(block, tokens, read.transpose(1, 2).flatten(2))
