"""The training stream: the combined model's outputs and their gradients, for several candidates at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from addenda import FrozenBackbone
from addenda.backbones import Adapter, BlockAdapters, KeyValue
from addenda.combined.forward import attend
from addenda.combined.tiles import memory_key_values
from addenda.learner.token_stream import Batch, stream_features
from tests.support.tiny import tiny_vit


def double_backbone() -> FrozenBackbone:
    return FrozenBackbone(tiny_vit(qk_norm=True, init_values=0.5), "tiny", "hub", precision=torch.float64)


def random_batch(backbone: FrozenBackbone, count: int, num_parents: int, chunk: int | None = None) -> Batch:
    head_dim = backbone.embed_dim // backbone.num_heads
    shape = (backbone.depth, 2, backbone.num_heads)
    random = torch.Generator().manual_seed(0)
    key_values = torch.randn(count + 3, *shape, backbone.num_tokens, head_dim, generator=random).half()
    parent_key_values = torch.randn(count, *shape, num_parents, head_dim, generator=random).half()
    pooled = torch.zeros(count, backbone.embed_dim)
    rows = torch.randperm(count + 3, generator=random)[:count]
    batch = Batch(backbone, key_values, rows, parent_key_values, pooled)
    if chunk is not None:
        batch.chunks = [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]
    return batch


def reference(
    backbone: FrozenBackbone,
    batch: Batch,
    class_tokens: torch.Tensor,
    memory: torch.Tensor,
    parent_memory: tuple[()],
    adapters: Sequence[BlockAdapters],
) -> torch.Tensor:
    """The same features by the combined model's attention, differentiable by autograd."""
    tokens = backbone.first_tokens(class_tokens).unsqueeze(1).expand(-1, len(batch), -1)
    for layer, block in enumerate(backbone.blocks):
        frozen = KeyValue(
            *(torch.cat([batch.fetch(layer, which, c).clone() for c in batch.chunks]) for which in (0, 1))
        )
        updates = adapters[layer] if adapters else None
        queries, keys, values = backbone.family.project(block, tokens, updates)
        own = KeyValue(keys.unsqueeze(3), values.unsqueeze(3))
        read = attend(block.attn.scale, queries, frozen, own, memory_key_values(backbone, block, memory[:, layer]))
        tokens = backbone.family.finish(block, tokens, read, updates)
    return backbone.final_norm(tokens)


@pytest.mark.parametrize(
    ("candidates", "memory", "num_parents", "chunk", "rank"),
    [(1, 5, 0, None, 0), (3, 5, 2, 4, 0), (5, 0, 1, 1, 2), (2, 3, 0, None, 8)],
)
def test_features_and_gradients_are_those_of_autograd(
    candidates: int, memory: int, num_parents: int, chunk: int | None, rank: int
) -> None:
    backbone = double_backbone()
    batch = random_batch(backbone, 7, num_parents, chunk)
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(candidates, 48, generator=random, dtype=torch.float64, requires_grad=True)
    own = torch.randn(candidates, 3, memory, 48, generator=random, dtype=torch.float64, requires_grad=True)
    readout = torch.randn(candidates, 7, 48, generator=random)
    updates = [
        [torch.randn(candidates, 3, *size, generator=random, dtype=torch.float64, requires_grad=True) for size in sizes]
        for sizes in (((rank, fan_in), (fan_out, rank)) for fan_in, fan_out in backbone.adapter_shapes().values())
    ]
    adapters = [
        BlockAdapters(*(Adapter(down[:, layer], up[:, layer]) for down, up in updates)) for layer in range(3) if rank
    ]
    leaves = [tokens, own, *(tensor for pair in updates for tensor in pair if rank)]
    results = []
    for function in (stream_features, reference):
        features = function(backbone, batch, tokens, own, (), adapters)
        results.append((features, *torch.autograd.grad((features * readout).sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5)  # features are in float32
