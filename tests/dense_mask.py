"""The paper's Table 1, literally: one sequence, one N x N mask, one softmax, in float64. Written for the tests alone.

Nothing of `addenda.combined` is used here, so that the two agree only if both are right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from addenda.registry import Task

Changed = Callable[[str, Tensor, Tensor], Tensor]
"""A layer's name, its inputs and its outputs; gives the outputs as the tasks' adapters change them."""


def ancestors(task: Task) -> set[Task]:
    """Everything that a task extends, near or far."""
    return {found for parent in task.parents for found in (parent, *ancestors(parent))}


class DenseMask:
    """Answers tasks through [frozen tokens, C_1, M_1, C_2, M_2, ...] and a full mask.

    Args:
        model: a stock timm model; it is copied.
    """

    def __init__(self, model: VisionTransformer) -> None:
        self.model = copy.deepcopy(model).double().eval()

    @torch.no_grad()
    def __call__(self, images: Tensor, asked: Sequence[Task]) -> dict[str, Tensor]:
        """Logits of the tasks asked for, by name; what they extend is in the sequence too."""
        everyone = dict.fromkeys(task for one in asked for task in (*ancestors(one), one))
        tasks = [task for task in everyone if task.class_token is not None]
        frozen, queries = self.first_tokens(images, tasks)
        for layer, block in enumerate(self.model.blocks):
            frozen, queries = self.one_layer(block, layer, frozen, queries, tasks)
        pooled = self.model.forward_head(self.model.norm(frozen), pre_logits=True)
        features = self.model.fc_norm(self.model.norm(queries))
        logits = {}
        for task in asked:
            feature = pooled if task.class_token is None else features[:, tasks.index(task)]
            logits[task.name] = feature @ task.head_weight.double().T + task.head_bias.double()
            if task.pooled_weight is not None:
                logits[task.name] = logits[task.name] + pooled @ task.pooled_weight.double().T
        return logits

    def first_tokens(self, images: Tensor, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
        model = self.model
        frozen = model.norm_pre(model._pos_embed(model.patch_embed(images.double())))
        queries = frozen.new_zeros(len(images), len(tasks), model.embed_dim)
        for place, task in enumerate(tasks):
            position = 0 if model.no_embed_class or model.pos_embed is None else model.pos_embed[0, 0]
            queries[:, place] = model.norm_pre(task.class_token.double() + position)
        return frozen, queries

    def one_layer(
        self, block: Block, layer: int, frozen: Tensor, queries: Tensor, tasks: Sequence[Task]
    ) -> tuple[Tensor, Tensor]:
        num_frozen, batch = frozen.shape[1], len(frozen)
        parts = [frozen]
        for place, task in enumerate(tasks):
            parts += [queries[:, place : place + 1], task.memory[layer].double().expand(batch, -1, -1)]
        starts, _ = positions(num_frozen, tasks)

        def changed(site: str, inputs: Tensor, outputs: Tensor) -> Tensor:
            """A layer's outputs with the tasks' own updates, in their tokens' rows alone."""
            outputs = outputs.clone()
            for task, row in starts.items():
                if task.adapters is not None:
                    down, up = (part[layer].double() for part in task.adapters[site])
                    outputs[:, row] += torch.einsum("or,ri,bi->bo", up, down, inputs[:, row])
            return outputs

        after = self.block(block, torch.cat(parts, dim=1), self.mask(num_frozen, tasks), changed)
        return after[:, :num_frozen], after[:, [starts[task] for task in tasks]]

    def mask(self, num_frozen: int, tasks: Sequence[Task]) -> Tensor:
        """Which row sees which column. A memory row, discarded after the layer, sees itself: it may not be empty."""
        starts, total = positions(num_frozen, tasks)
        mask = torch.eye(total, dtype=torch.bool)
        mask[:num_frozen, :num_frozen] = True
        for task, start in starts.items():
            mask[start, :num_frozen] = True
            for seen in (task, *ancestors(task)):
                if seen in starts:
                    mask[start, starts[seen] : starts[seen] + 1 + seen.num_memory_tokens] = True
        return mask

    def block(self, block: Block, tokens: Tensor, mask: Tensor, changed: Changed) -> Tensor:
        attn, mlp = block.attn, block.mlp
        normed = block.norm1(tokens)
        q, k, v = attn.qkv(normed).chunk(3, dim=-1)
        q = changed("q", normed, q)
        q, k, v = (part.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for part in (q, k, v))
        scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-1, -2) / attn.head_dim**0.5
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        read = (weights / weights.sum(-1, keepdim=True)) @ v
        read = attn.norm(read.transpose(1, 2).flatten(2))
        tokens = tokens + block.ls1(changed("proj", read, attn.proj(read)))
        normed = block.norm2(tokens)
        hidden = mlp.norm(mlp.act(changed("fc1", normed, mlp.fc1(normed))))
        return tokens + block.ls2(changed("fc2", hidden, mlp.fc2(hidden)))


def positions(num_frozen: int, tasks: Sequence[Task]) -> tuple[dict[Task, int], int]:
    """Where each task's token stands in the sequence, its memory behind it; and the sequence's length."""
    starts, end = {}, num_frozen
    for task in tasks:
        starts[task] = end
        end += 1 + task.num_memory_tokens
    return starts, end
