"""Attention over private keys has the bits of its first, plainer form, with fewer calls."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from addenda.backbones import KeyValue
from addenda.combined import Layout, TileStore, forward_pass
from addenda.combined.forward import attend
from tests.support.models import PRECISIONS, backbone, images, threads
from tests.support.tasks import random_task


def first_form(
    scale: float, queries: Tensor, frozen: KeyValue, tokens: KeyValue, memory: KeyValue, bias: Tensor | None
) -> Tensor:
    """As it was when the first registries were created."""

    def product(rows: Tensor, matrices: Tensor) -> Tensor:
        return (F.pad(rows, (0, 0, 0, max(0, 4 - rows.shape[-2]))) @ matrices)[..., : rows.shape[-2], :]

    num_tasks, num_heads, batch, _ = queries.shape
    num_frozen, num_tokens = frozen.keys.shape[-2], tokens.keys.shape[-2]
    queries = (queries * scale).contiguous()
    on_frozen = queries.permute(2, 1, 0, 3).flatten(0, 1) @ frozen.keys.flatten(0, 1).transpose(1, 2)
    on_tokens = (queries.unsqueeze(-2) * tokens.keys).sum(-1)
    private = torch.cat([on_tokens, product(queries, memory.keys.transpose(-1, -2))], dim=-1)
    if bias is not None:
        private = private + bias[:, None, None]
    scores = torch.cat([on_frozen.unflatten(0, (batch, num_heads)), private.permute(2, 1, 0, 3)], dim=-1)
    weights = scores.softmax(dim=-1)
    from_frozen = weights[..., :num_frozen].flatten(0, 1) @ frozen.values.flatten(0, 1)
    on_tokens, on_memory = weights[..., num_frozen:].permute(2, 1, 0, 3).tensor_split((num_tokens,), dim=-1)
    from_private = (on_tokens.unsqueeze(-1) * tokens.values).sum(-2) + product(on_memory, memory.values)
    output = from_frozen.unflatten(0, (batch, num_heads)).permute(2, 1, 0, 3) + from_private
    return output.transpose(1, 2).reshape(num_tasks, batch, -1)


@PRECISIONS
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_attention_has_the_bits_of_its_first_form(head_dim: int, num_threads: int, precision: torch.dtype) -> None:
    random, heads, compared = torch.Generator().manual_seed(1), 3, 0

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(precision)

    with threads(num_threads):
        for slots, batch, num_tokens, num_memory in itertools.product((4, 16), (1, 4, 8), (1, 2, 4), (0, 4, 8)):
            qkv = draw(slots, batch, 3, heads, head_dim).permute(2, 0, 3, 1, 4)  # [3, S, H, B, d], as from a block
            ancestors = draw(2, slots, heads, batch, num_tokens - 1, head_dim)
            own = (torch.cat([qkv[1 + i].unsqueeze(3), ancestors[i]], 3) for i in (0, 1))
            tokens = KeyValue(*own) if num_tokens > 1 else KeyValue(qkv[1].unsqueeze(3), qkv[2].unsqueeze(3))
            frozen = KeyValue(*draw(2, batch, heads, 17, head_dim))
            memory = KeyValue(*draw(2, slots, heads, num_memory, head_dim))
            bias = torch.zeros(slots, num_tokens + num_memory, dtype=precision)
            bias[:, 1 + num_tokens :] = float("-inf")
            for mask in (bias, None):
                inputs = head_dim**-0.5, qkv[0], frozen, tokens, memory, mask
                assert torch.equal(attend(*inputs), first_form(*inputs))
                compared += 1
    assert compared == 108


class Calls(TorchDispatchMode):
    """Counts operations that compute or copy: kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        name = function._schema.name.removeprefix("aten::")
        if not function.is_view and name not in ("empty", "_unsafe_view", "detach", "promote_types"):
            self.counted[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rank", "limit"), [(0, 24), (4, 37)])
def test_a_tile_makes_few_calls_in_a_layer(rank: int, limit: int) -> None:
    on, totals = backbone(), list[int]()
    tasks = [random_task(on, f"task-{i}", memory=5, seed=i, rank=rank) for i in range(5)]
    for count in (4, 5):
        layout = Layout(TileStore(on), tasks[:count], sizes=(4,))
        assert len(layout.tiles) == count - 3
        with Calls() as calls:
            forward_pass(on, images(8), layout)
        totals.append(calls.counted.total())
    outside_layers = 2  # the tile's first tokens and the final norm
    assert totals[1] - totals[0] - outside_layers == limit * on.depth
