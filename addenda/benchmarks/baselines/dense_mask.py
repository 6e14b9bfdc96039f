"""The paper's implementation of many tasks: frozen tokens, task tokens and memory in one masked sequence (Table 1).

The reference for speed and, without the mask, for accuracy; `addenda.combined` does not use it. Memory joins the
sequence before norm1, as in the paper, and one qkv product serves all tokens.
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
"""Names of a task's tensors as parameters of a DenseMask with one task."""


class DenseMask(nn.Module):
    """Predict tasks without parents in one sequence under a dense attention mask; task tensors are trainable.

    Args:
        backbone: the frozen backbone.
        tasks: tasks without parents or adapters.
        masked: False lets every token attend to every other, so that tasks change the frozen tokens.
        precomputed: compute the keys and values of memory once, here, so that it is not trainable. The paper computes
            them for every image.
    """

    def __init__(
        self, backbone: FrozenBackbone, tasks: Sequence[Task], masked: bool = True, precomputed: bool = False
    ) -> None:
        super().__init__()
        assert tasks
        assert not any(task.parents or task.adapters for task in tasks)
        self._backbone, self._names = backbone, [task.name for task in tasks]

        def parameter(tensor: Tensor | None) -> nn.Parameter:
            assert tensor is not None
            return nn.Parameter(tensor.detach().clone().to(backbone.device))

        self.class_tokens = nn.ParameterList(parameter(task.class_token) for task in tasks)
        self.memory = nn.ParameterList(parameter(task.memory) for task in tasks)
        self.head_weight = nn.ParameterList(parameter(task.head_weight) for task in tasks)
        self.head_bias = nn.ParameterList(parameter(task.head_bias) for task in tasks)
        pooled = {str(i): task.pooled_weight for i, task in enumerate(tasks)}
        self.pooled_weight = nn.ParameterDict({i: parameter(w) for i, w in pooled.items() if w is not None})
        self._mask = self._make_mask().to(backbone.device) if masked else None
        self._precomputed: list[tuple[Tensor, ...]] | None = None
        if precomputed:
            with torch.no_grad():
                self._precomputed = [
                    backbone.family.project(block, self._layer_memory(layer).unsqueeze(0))[1:]
                    for layer, block in enumerate(backbone.blocks)
                ]

    def _layer_memory(self, layer: int) -> Float[Tensor, "M D"]:
        """Memory tokens of all tasks in one layer."""
        return torch.cat([memory[layer] for memory in self.memory]).to(self._backbone.precision)

    def _make_mask(self) -> Bool[Tensor, "Q K"]:
        """Attention mask; rows are frozen and task tokens, columns these and all memory tokens."""
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
        class_tokens = backbone.first_tokens(torch.stack(list(self.class_tokens)).to(backbone.precision))
        tokens = torch.cat([tokens, class_tokens.expand(len(images), -1, -1)], dim=1)
        for layer, block in enumerate(backbone.blocks):
            tokens = self._block(block, layer, tokens)
        features = backbone.final_norm(tokens[:, backbone.num_tokens :]).float()
        pooled = backbone.pool(tokens[:, : backbone.num_tokens]).float()
        logits = {}
        for i, name in enumerate(self._names):
            logits[name] = F.linear(features[:, i], self.head_weight[i], self.head_bias[i])
            if str(i) in self.pooled_weight:
                logits[name] = logits[name] + F.linear(pooled, self.pooled_weight[str(i)])
        return logits

    def _block(self, block: Any, layer: int, tokens: Tensor) -> Tensor:
        backbone, batch = self._backbone, len(tokens)
        if self._precomputed is None:
            with_memory = torch.cat([tokens, self._layer_memory(layer).expand(batch, -1, -1)], dim=1)
            queries, keys, values = backbone.family.project(block, with_memory)
            queries = queries[:, :, : tokens.shape[1]]
        else:
            queries, keys, values = backbone.family.project(block, tokens)
            keys, values = (
                torch.cat([of_tokens, of_memory.expand(batch, -1, -1, -1)], dim=2)
                for of_tokens, of_memory in zip((keys, values), self._precomputed[layer], strict=True)
            )
        queries, keys = backbone.family.place(block, queries), backbone.family.place(block, keys)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._mask, scale=block.attn.scale)
        return backbone.family.finish(block, tokens, attended.transpose(1, 2).flatten(2))
