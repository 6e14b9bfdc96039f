"""The paper's way to run many tasks: one sequence of frozen tokens, task tokens and memory under one mask (Table 1).

The yardstick of `addenda bench cost`: memory joins the sequence before norm1, as the paper draws it, one qkv product
serves all tokens. `addenda.combined` uses none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.registry import Task


class DenseMask:
    """Tasks that extend none, answered through a mask of all tokens by all keys.

    Args:
        backbone: the frozen backbone.
        tasks: the tasks; none may extend another.
        precomputed: whether memory keys and values are computed once, here, or for every image, as the paper writes it.
    """

    def __init__(self, backbone: FrozenBackbone, tasks: Sequence[Task], precomputed: bool) -> None:
        assert not any(task.parents or task.class_token is None for task in tasks)
        self._backbone, self._tasks = backbone, list(tasks)
        tokens = torch.stack([task.class_token for task in tasks if task.class_token is not None])
        self._tokens = backbone.first_tokens(tokens.to(backbone.device, backbone.precision))
        self._memory = [
            torch.cat([task.memory[layer] for task in tasks if task.memory is not None]).to(
                backbone.device, backbone.precision
            )
            for layer in range(backbone.depth)
        ]
        self._mask = self._make_mask().to(backbone.device)
        self._precomputed = [
            backbone.project(block, memory.unsqueeze(0))[1:] if precomputed else None
            for block, memory in zip(backbone.blocks, self._memory, strict=True)
        ]

    def _make_mask(self) -> Bool[Tensor, "Q K"]:
        """Which query sees which key: rows are frozen and task tokens, columns those and all memory."""
        frozen, tasks = self._backbone.num_tokens, len(self._tasks)
        sizes = torch.tensor([task.num_memory_tokens for task in self._tasks])
        owner = torch.cat([torch.arange(tasks), torch.arange(tasks).repeat_interleave(sizes)])
        mask = torch.zeros(frozen + tasks, frozen + len(owner), dtype=torch.bool)
        mask[:, :frozen] = True
        mask[frozen:, frozen:] = torch.arange(tasks)[:, None] == owner
        return mask

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B C"]]:
        """Logits of every task."""
        backbone, model = self._backbone, self._backbone.model
        tokens = model.patch_embed(images.to(backbone.device, backbone.precision))
        tokens = model.norm_pre(model._pos_embed(tokens))
        tokens = torch.cat([tokens, self._tokens.expand(len(images), -1, -1)], dim=1)
        for block, memory, known in zip(backbone.blocks, self._memory, self._precomputed, strict=True):
            tokens = self._block(block, tokens, memory, known)
        features = backbone.final_norm(tokens[:, backbone.num_tokens :]).float()
        pooled = model.forward_head(model.norm(tokens[:, : backbone.num_tokens]), pre_logits=True).float()
        logits = {}
        for place, task in enumerate(self._tasks):
            logits[task.name] = F.linear(features[:, place], task.head_weight.to(features), task.head_bias.to(features))
            if task.pooled_weight is not None:
                logits[task.name] = logits[task.name] + F.linear(pooled, task.pooled_weight.to(pooled))
        return logits

    def _block(self, block: Any, tokens: Tensor, memory: Tensor, known: tuple[Tensor, ...] | None) -> Tensor:
        backbone, batch = self._backbone, len(tokens)
        if known is None:
            everything = torch.cat([tokens, memory.expand(batch, -1, -1)], dim=1)
            queries, keys, values = backbone.project(block, everything)
            queries = queries[:, :, : tokens.shape[1]]
        else:
            queries, keys, values = backbone.project(block, tokens)
            keys, values = (
                torch.cat([own, of_memory.expand(batch, -1, -1, -1)], dim=2)
                for own, of_memory in zip((keys, values), known, strict=True)
            )
        read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._mask, scale=block.attn.scale)
        return backbone.finish(block, tokens, read.transpose(1, 2).flatten(2))
