"""Linear layers of frozen blocks in training: same outputs and gradients, and batch invariance."""

from __future__ import annotations

import pytest
import torch

from addenda import FrozenBackbone
from addenda.learner.token_stream import training_blocks
from tests.support.models import backbone
from tests.support.tiny import EVA


@pytest.mark.parametrize("variant", ["qk-norm", *EVA])
def test_training_blocks_compute_the_backbones_function_and_share_its_weights(variant: str) -> None:
    frozen = backbone(variant)
    tokens = torch.randn(2, 9, frozen.embed_dim, generator=torch.Generator().manual_seed(0))
    for block, original in zip(training_blocks(frozen), frozen.blocks, strict=True):
        results = []
        for module in (block, original):
            leaf = tokens.clone().requires_grad_()
            queries = frozen.family.project(module, leaf)[0]
            out = frozen.family.finish(module, leaf, queries.transpose(1, 2).flatten(2))
            results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
        for actual, expected in zip(*results, strict=True):
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert block.mlp.fc2._weight.data_ptr() == original.mlp.fc2.weight.data_ptr()
        assert isinstance(original.mlp.fc2, torch.nn.Linear)
        assert not any(isinstance(module, torch.nn.Linear) for module in block.modules())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64])
def test_a_row_has_the_same_bits_in_any_batch(tiny: FrozenBackbone, count: int) -> None:
    layer = training_blocks(tiny)[0].mlp.fc1
    rows = torch.randn(300, tiny.embed_dim, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(rows[:count]), layer(rows)[:count])


def test_no_rows_give_no_rows(tiny: FrozenBackbone) -> None:
    layer = training_blocks(tiny)[0].mlp.fc1
    assert layer(torch.zeros(3, 0, tiny.embed_dim)).shape == (3, 0, 4 * tiny.embed_dim)


def test_other_precisions_use_torchs_own_layers() -> None:
    frozen = backbone(precision=torch.float64)
    assert training_blocks(frozen) is frozen.blocks
