"""Adapters (low-rank updates of a block's layers): function, gradients, bits, and which blocks can carry them."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import GatedMlp, GluMlp, SwiGLU
from torch import Tensor

from addenda.backbones import MIN_ROWS, Adapter, BlockAdapters, FrozenBackbone, product
from addenda.exceptions import BackboneError
from addenda.registry import ADAPTED
from tests.support.models import PRECISIONS, backbone, lively_vit
from tests.support.tiny import tiny_eva, tiny_vit

NARROW = {"embed_dim": 48, "num_heads": 3, "depth": 2, "img_size": 56}


def some_adapters(on: FrozenBackbone, slots: int = 3, rank: int = 4) -> BlockAdapters:
    random = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return (0.2 * torch.randn(shape, generator=random)).to(on.precision)

    shapes = on.adapter_shapes().items()
    return BlockAdapters(
        **{
            site: Adapter(normal(slots, rank, fan_in), normal(slots, fan_out, rank))
            for site, (fan_in, fan_out) in shapes
        }
    )


def some_tokens(on: FrozenBackbone, slots: int = 3, count: int = 8) -> tuple[Tensor, Tensor]:
    """Input tokens of a block, and outputs of its attention."""
    both = torch.randn(2, slots, count, on.embed_dim, generator=torch.Generator().manual_seed(8)).to(on.precision)
    return both[0], both[1]


def merged(on: FrozenBackbone, variant: str, adapters: BlockAdapters, slot: int) -> FrozenBackbone:
    """A backbone with one slot's adapters merged into the weights of its last block."""
    model = lively_vit(variant).to(on.precision)
    attn, mlp = model.blocks[-1].attn, model.blocks[-1].mlp
    queries = attn.q_proj.weight if attn.qkv is None else attn.qkv.weight[: on.embed_dim]
    weights = {"q": [queries], "proj": [attn.proj.weight], "fc2": [mlp.fc2.weight]}
    weights["fc1"] = [mlp.fc1_g.weight, mlp.fc1_x.weight] if isinstance(mlp, SwiGLU) else [mlp.fc1.weight]
    with torch.no_grad():
        for site, (down, up) in adapters._asdict().items():
            for weight, change in zip(weights[site], (up[slot] @ down[slot]).chunk(len(weights[site])), strict=True):
                weight += change
    return FrozenBackbone(model, "merged", "hub", precision=on.precision)


def test_the_backbone_and_the_registry_name_the_same_layers() -> None:
    assert BlockAdapters._fields == ADAPTED == tuple(backbone().adapter_shapes())
    assert backbone().adapter_shapes() == {"q": (48, 48), "proj": (48, 48), "fc1": (48, 192), "fc2": (192, 48)}


@pytest.mark.parametrize(
    "variant", ["plain", "layer-scale", "qk-norm", "clip", "gate-last", "dinov3", "rope-mixed", "eva02", "eva02-small"]
)
@pytest.mark.parametrize("slot", [0, 2])
def test_an_adapted_block_equals_one_with_merged_weights_except_for_keys_and_values(variant: str, slot: int) -> None:
    on = backbone(variant, torch.float64)
    adapters, (tokens, read) = some_adapters(on), some_tokens(on)
    other = merged(on, variant, adapters, slot)
    block, full = on.blocks[-1], other.blocks[-1]
    plain, adapted, expected = (
        on.family.project(block, tokens),
        on.family.project(block, tokens, adapters),
        other.family.project(full, tokens),
    )
    assert (adapted[0][slot] - expected[0][slot]).abs().max() <= 1e-12
    assert (adapted[0][slot] - plain[0][slot]).abs().max() > 1e-2
    assert torch.equal(adapted[1], plain[1])
    assert torch.equal(adapted[2], plain[2])
    finished, wanted = on.family.finish(block, tokens, read, adapters), other.family.finish(full, tokens, read)
    assert (finished[slot] - wanted[slot]).abs().max() <= 1e-12
    assert (finished[slot] - on.family.finish(block, tokens, read)[slot]).abs().max() > 1e-2


@PRECISIONS
@pytest.mark.parametrize("variant", ["qk-norm", "gate-last", "eva02", "eva02-small"])
def test_updates_of_zero_change_nothing(precision: torch.dtype, variant: str) -> None:
    on = backbone(variant, precision)
    adapters, (tokens, read), block = some_adapters(on), some_tokens(on), on.blocks[0]
    idle = BlockAdapters(*(Adapter(down, torch.zeros_like(up)) for down, up in adapters))
    pairs = zip(on.family.project(block, tokens, idle), on.family.project(block, tokens), strict=True)
    assert all(torch.equal(idle_output, output) for idle_output, output in pairs)
    assert torch.equal(on.family.finish(block, tokens, read, idle), on.family.finish(block, tokens, read))


@pytest.mark.parametrize("variant", ["qk-norm", "eva02", "eva02-small"])
def test_gradients_reach_adapters_and_tokens(variant: str) -> None:
    on = backbone(variant, torch.float64)
    adapters, (tokens, read), block = some_adapters(on, slots=2, rank=2), some_tokens(on, 2, 3), on.blocks[0]
    weights = torch.randn(4, 2, 3, on.embed_dim, generator=torch.Generator().manual_seed(9)).double()

    def block_of(tokens: Tensor, read: Tensor, *parts: Tensor) -> Tensor:
        updates = BlockAdapters(*(Adapter(*parts[i : i + 2]) for i in range(0, len(parts), 2)))
        offered = [part.transpose(1, 2).flatten(2) for part in on.family.project(block, tokens, updates)]
        results = torch.stack([*offered, on.family.finish(block, tokens, read, updates)])
        return (results * weights).sum((1, 2, 3))

    inputs = [tokens, read, *(part for adapter in adapters for part in adapter)]
    assert torch.autograd.gradcheck(block_of, [part.clone().requires_grad_() for part in inputs], fast_mode=True)


@PRECISIONS
def test_an_update_gives_an_image_the_same_bits_in_any_batch_and_slot(precision: torch.dtype) -> None:
    on = backbone("plain", precision)
    adapters, (tokens, _) = some_adapters(on, slots=16), some_tokens(on, slots=16)
    whole = adapters.fc1(tokens)
    for size in (1, 4):
        for start in range(0, 8, size):
            assert torch.equal(adapters.fc1(tokens[:, start : start + size]), whole[:, start : start + size])
    rolled = Adapter(*(matrix.roll(3, 0) for matrix in adapters.fc1))
    assert torch.equal(rolled(tokens.roll(3, 0)).roll(-3, 0), whole)


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_a_product_of_few_rows_is_padded(count: int) -> None:
    rows, matrices = torch.randn(2, 3, count, 6), torch.randn(2, 3, 6, 5)
    products = product(rows, matrices)
    assert products.shape == (2, 3, count, 5)
    assert torch.equal(products, (torch.cat([rows, torch.zeros(2, 3, MIN_ROWS, 6)], 2) @ matrices)[:, :, :count])


@pytest.mark.parametrize(
    ("model", "hidden"),
    [
        (lambda: tiny_vit(mlp_layer=SwiGLU), 192),
        (lambda: tiny_vit(mlp_layer=GluMlp), 96),
        (lambda: timm.create_model("vit_giant_patch14_dinov2", **NARROW), 128),
        (lambda: tiny_eva("eva02"), 128),
        (lambda: tiny_eva("eva02-small"), 128),
    ],
)
def test_the_first_layer_of_a_gated_mlp_is_twice_as_wide(model: object, hidden: int) -> None:
    on = FrozenBackbone(model(), "gated", "hub")
    assert on.adapter_obstacle() is None
    assert (on.adapter_shapes()["fc1"], on.adapter_shapes()["fc2"]) == ((48, 2 * hidden), (hidden, 48))


def test_blocks_that_cannot_carry_adapters_are_named() -> None:
    on = FrozenBackbone(tiny_vit(mlp_layer=GatedMlp), "gated", "hub")
    with pytest.raises(
        BackboneError, match="Backbone 'gated' cannot carry adapters: its MLPs are GatedMlp, not timm's Mlp, GluMlp or"
    ):
        on.adapter_shapes()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "beit3_base_patch16_224", "vit_base_patch16_clip_quickgelu_224"]
)
def test_blocks_of_the_plain_mlp_can_carry_adapters(name: str) -> None:
    on = FrozenBackbone(timm.create_model(name, **{**NARROW, "img_size": 32}), name, "hub")
    assert on.adapter_obstacle() is None
    assert on.adapter_shapes()["fc2"] == (192, 48)
