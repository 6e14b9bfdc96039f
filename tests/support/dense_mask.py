"""A literal implementation of the paper's Table 1 for tests: one sequence, one N x N mask, one softmax, in float64.

It uses nothing from `addenda.combined`, so that the two agree only if both are right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from timm.layers import Mlp, SwiGLU
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from addenda.registry import Task

Changed = Callable[[str, Tensor, Tensor], Tensor]
"""Takes a layer's name, inputs and outputs; returns the outputs with the tasks' adapters applied."""


def ancestors(task: Task) -> set[Task]:
    """All tasks that a task extends, directly or indirectly."""
    return {ancestor for parent in task.parents for ancestor in (parent, *ancestors(parent))}


class DenseMask:
    """Computes the logits of tasks from [frozen tokens, C_1, M_1, C_2, M_2, ...] under a full mask.

    Args:
        model: a stock timm model; it is copied.
    """

    def __init__(self, model: VisionTransformer | Eva) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.rotation: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor, requested: Sequence[Task]) -> dict[str, Tensor]:
        """Returns logits by task name; the sequence also contains the tasks that the requested ones extend."""
        closure = dict.fromkeys(member for task in requested for member in (*ancestors(task), task))
        tasks = [task for task in closure if task.class_token is not None]
        frozen, queries = self.first_tokens(images, tasks)
        for layer, block in enumerate(self.model.blocks):
            frozen, queries = self.one_layer(block, layer, frozen, queries, tasks)
        pooled = self.model.forward_head(self.model.norm(frozen), pre_logits=True)
        features = self.model.fc_norm(self.model.norm(queries))
        logits = {}
        for task in requested:
            feature = pooled if task.class_token is None else features[:, tasks.index(task)]
            logits[task.name] = feature @ task.head_weight.double().T + task.head_bias.double()
            if task.pooled_weight is not None:
                logits[task.name] = logits[task.name] + pooled @ task.pooled_weight.double().T
        return logits

    def first_tokens(self, images: Tensor, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
        model = self.model
        frozen = model._pos_embed(model.patch_embed(images.double()))
        if isinstance(model, Eva):
            frozen, self.rotation = frozen
        frozen = model.norm_pre(frozen)
        queries = frozen.new_zeros(len(images), len(tasks), model.embed_dim)
        has_position = model.pos_embed is not None and model.cls_token is not None and not model.no_embed_class
        for index, task in enumerate(tasks):
            position = model.pos_embed[0, 0] if has_position else 0
            queries[:, index] = model.norm_pre(task.class_token.double() + position)
        return frozen, queries

    def one_layer(
        self, block: nn.Module, layer: int, frozen: Tensor, queries: Tensor, tasks: Sequence[Task]
    ) -> tuple[Tensor, Tensor]:
        num_frozen, batch = frozen.shape[1], len(frozen)
        sequence = [frozen]
        for index, task in enumerate(tasks):
            sequence += [queries[:, index : index + 1], task.memory[layer].double().expand(batch, -1, -1)]
        starts, _ = positions(num_frozen, tasks)

        def changed(site: str, inputs: Tensor, outputs: Tensor) -> Tensor:
            """Applies the tasks' adapters to a layer's outputs, only in the rows of their tokens."""
            outputs = outputs.clone()
            for task, row in starts.items():
                if task.adapters is not None:
                    down, up = (factor[layer].double() for factor in task.adapters[site])
                    outputs[:, row] += torch.einsum("or,ri,bi->bo", up, down, inputs[:, row])
            return outputs

        mask = self.mask(num_frozen, tasks)
        if isinstance(self.model, Eva):
            after = self.eva_block(block, layer, torch.cat(sequence, dim=1), mask, changed)
        else:
            after = self.block(block, torch.cat(sequence, dim=1), mask, changed)
        return after[:, :num_frozen], after[:, [starts[task] for task in tasks]]

    def mask(self, num_frozen: int, tasks: Sequence[Task]) -> Tensor:
        """Which row attends to which column. A memory row attends to itself, because a row must not be empty."""
        starts, total = positions(num_frozen, tasks)
        mask = torch.eye(total, dtype=torch.bool)
        mask[:num_frozen, :num_frozen] = True
        for task, start in starts.items():
            mask[start, :num_frozen] = True
            for member in (task, *ancestors(task)):
                if member in starts:
                    mask[start, starts[member] : starts[member] + 1 + member.num_memory_tokens] = True
        return mask

    def block(self, block: nn.Module, tokens: Tensor, mask: Tensor, changed: Changed) -> Tensor:
        attn, mlp = block.attn, block.mlp
        normed = block.norm1(tokens)
        q, k, v = attn.qkv(normed).chunk(3, dim=-1)
        q = changed("q", normed, q)
        q, k, v = (rows.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for rows in (q, k, v))
        read = attn.norm(attention(attn.q_norm(q), attn.k_norm(k), v, mask))
        tokens = tokens + block.ls1(changed("proj", read, attn.proj(read)))
        normed = block.norm2(tokens)
        hidden = self.hidden(mlp, normed, changed)
        return tokens + block.ls2(changed("fc2", hidden, mlp.fc2(hidden)))

    def eva_block(self, block: nn.Module, layer: int, tokens: Tensor, mask: Tensor, changed: Changed) -> Tensor:
        attn, mlp = block.attn, block.mlp
        normed = block.norm1(tokens)
        if attn.qkv is None:
            q, k, v = (project(normed) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
        else:
            q, k, v = attn.qkv(normed).chunk(3, dim=-1)
            if getattr(attn, "q_bias", None) is not None:  # keys have no bias
                q, v = q + attn.q_bias, v + attn.v_bias
        q = changed("q", normed, q)
        q, k, v = (rows.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for rows in (q, k, v))
        q, k = attn.q_norm(q), attn.k_norm(k)
        if self.rotation is not None:
            rotation = self.rotation[layer] if self.model.rope_mixed else self.rotation
            patches = slice(self.model.num_prefix_tokens, self.model.num_prefix_tokens + rotation.shape[-2])
            for rows in (q, k):
                rows[:, :, patches] = turned(rows[:, :, patches], rotation, attn.rotate_half)
        read = attn.norm(attention(q, k, v, mask))
        gammas = (1.0 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2))
        tokens = tokens + next(gammas) * changed("proj", read, attn.proj(read))
        normed = block.norm2(tokens)
        hidden = self.hidden(mlp, normed, changed)
        return tokens + next(gammas) * changed("fc2", hidden, mlp.fc2(hidden))

    def hidden(self, mlp: nn.Module, normed: Tensor, changed: Changed) -> Tensor:
        """The inputs of an MLP's second layer; a gated MLP multiplies one half of the first's outputs by the other."""
        layers = [mlp.fc1_g, mlp.fc1_x] if isinstance(mlp, SwiGLU) else [mlp.fc1]
        outputs = changed("fc1", normed, torch.cat([layer(normed) for layer in layers], dim=-1))
        if type(mlp) is Mlp:
            return mlp.norm(mlp.act(outputs))
        first, second = outputs.tensor_split(2, dim=-1)
        gate, value = (second, first) if getattr(mlp, "gate_last", False) else (first, second)
        return mlp.norm(mlp.act(gate) * value)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention outputs of each query, heads concatenated."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return ((weights / weights.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


def turned(rows: Tensor, rotation: Tensor, half: bool) -> Tensor:
    """Rotates each pair of dimensions, as a complex number times a unit complex number."""
    sin, cos = rotation.chunk(2, dim=-1)
    if half:  # pairs a dimension of the first half with the same index in the second
        first, second = rows.chunk(2, dim=-1)
        turn = torch.complex(cos, sin).chunk(2, dim=-1)[0]
    else:  # pairs neighbouring dimensions
        first, second = rows[..., ::2], rows[..., 1::2]
        turn = torch.complex(cos, sin)[..., ::2]
    result = torch.complex(first, second) * turn
    if half:
        return torch.cat([result.real, result.imag], dim=-1)
    return torch.stack([result.real, result.imag], dim=-1).flatten(-2)


def positions(num_frozen: int, tasks: Sequence[Task]) -> tuple[dict[Task, int], int]:
    """The position of each task's token in the sequence, followed by its memory; and the sequence's length."""
    starts, end = {}, num_frozen
    for task in tasks:
        starts[task] = end
        end += 1 + task.num_memory_tokens
    return starts, end
