"""The task streams of several candidates over kept activations, with gradients: an epoch for the price of a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import MIN_ROWS, BlockAdapters, FrozenBackbone, KeyValue
from addenda.combined.attention import memory_key_values, private_read, private_scores
from addenda.learner.activations import Batch


def stream_features(
    backbone: FrozenBackbone,
    batch: Batch,
    class_tokens: Float[Tensor, "S D"],
    memory: Float[Tensor, "S L m D"],
    parent_memory: Sequence[KeyValue] = (),
    adapters: Sequence[BlockAdapters] = (),
) -> Float[Tensor, "S B D"]:
    """The task streams of S candidates over some images.

    Args:
        backbone: the frozen backbone.
        batch: the images' frozen keys and values; tokens of the tasks to extend are among them.
        class_tokens: one for each candidate.
        memory: each candidate's memory tokens.
        parent_memory: for each layer the memory of the tasks to extend, [1, H, m', d]; empty if there is none.
        adapters: for each layer the candidates' own; empty if they have none.

    Returns:
        Each candidate's final feature, in float32.
    """
    precision = backbone.precision
    tokens = backbone.first_tokens(class_tokens.to(precision)).unsqueeze(1).expand(-1, len(batch), -1)
    for layer, block in enumerate(backbone.blocks):
        updates = adapters[layer] if adapters else None
        queries, keys, values = backbone.project(block, tokens, updates)  # [S, H, B, d]
        # One by one: a few rows more or less beside them would change the bits of a candidate's memory.
        own = [memory_key_values(backbone, block, rows.to(precision)) for rows in memory[:, layer].split(1)]
        inherited = [layers.expand(len(memory), -1, -1, -1) for layers in parent_memory[layer]] if parent_memory else []
        beside = KeyValue(
            *(
                torch.cat([torch.cat(parts), *inherited[i : i + 1]], dim=2)
                for i, parts in enumerate(zip(*own, strict=True))
            )
        )
        private = KeyValue(keys.unsqueeze(3), values.unsqueeze(3))
        queries = queries * block.attn.scale
        read, weights = _FrozenAttention.apply(batch, layer, queries, private_scores(queries, private, beside))
        read = read + private_read(weights, private, beside)
        tokens = backbone.finish(block, tokens, read.transpose(1, 2).flatten(2), updates)
    return backbone.final_norm(tokens).float()


class _FrozenAttention(torch.autograd.Function):
    """One softmax over frozen and private keys, of which it reads the frozen values.

    The frozen keys and values are fetched a few images at a time, in the backward pass again: all at once they would
    fill memory many times over, and a processor's caches not at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        batch: Batch,
        layer: int,
        queries: Float[Tensor, "S H B d"],
        private: Float[Tensor, "S H B w"],
    ) -> tuple[Tensor, Tensor]:
        """Returns what each query read of the frozen values, [S, H, B, d], and the weights of its private keys."""
        read, weights = torch.empty_like(queries), torch.empty_like(private)
        ctx.batch, ctx.layer, ctx.weights = batch, layer, []
        for part in batch.parts:
            scores = _rows(queries[:, :, part]) @ batch.fetch(layer, 0, part).transpose(-1, -2)
            joined = torch.cat([scores, _rows(private[:, :, part])], dim=-1).softmax(-1)  # [c, H, R, P + w]
            on_frozen = joined[..., : scores.shape[-1]]
            read[:, :, part] = _slots(on_frozen @ batch.fetch(layer, 1, part), len(queries))
            weights[:, :, part] = _slots(joined[..., scores.shape[-1] :], len(queries))
            ctx.weights.append(joined)
        return read, weights

    @staticmethod
    def backward(ctx: Any, read: Tensor, weights: Tensor) -> tuple[None, None, Tensor, Tensor]:
        """The softmax's own gradient; keys and values are constants."""
        queries, private = torch.empty_like(read), torch.empty_like(weights)
        for part, joined in zip(ctx.batch.parts, ctx.weights, strict=True):
            of_frozen = _rows(read[:, :, part]) @ ctx.batch.fetch(ctx.layer, 1, part).transpose(-1, -2)
            gradient = torch.cat([of_frozen, _rows(weights[:, :, part])], dim=-1)
            scores = torch.ops.aten._softmax_backward_data(gradient, joined, -1, joined.dtype)
            num_frozen = of_frozen.shape[-1]
            queries[:, :, part] = _slots(scores[..., :num_frozen] @ ctx.batch.fetch(ctx.layer, 0, part), len(queries))
            private[:, :, part] = _slots(scores[..., num_frozen:], len(private))
        return None, None, queries, private


def _rows(by_slot: Float[Tensor, "S H c k"]) -> Float[Tensor, "c H R k"]:
    """A candidate a row, by image and head; filled up to MIN_ROWS, since fewer have other bits."""
    filled = F.pad(by_slot.permute(2, 1, 0, 3), (0, 0, 0, max(0, MIN_ROWS - len(by_slot))))
    return filled.contiguous()


def _slots(by_image: Float[Tensor, "c H R k"], count: int) -> Float[Tensor, "S H c k"]:
    """The way back."""
    return by_image[:, :, :count].permute(2, 1, 0, 3)
