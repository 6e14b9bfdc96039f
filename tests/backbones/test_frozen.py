"""Frozen backbones: bit-equal to stock timm, and strict about the shape of their images."""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.layers import GluMlp, LayerNorm, SwiGLU
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from addenda.backbones import FrozenBackbone
from addenda.exceptions import BackboneError
from tests.support.tiny import EVA, shaken, some_images, tiny_eva, tiny_vit

SMALL = {"img_size": 64, "depth": 2}
NARROW = {"embed_dim": 48, "num_heads": 3, "depth": 2}

# timm name, options that make it small, and the feature that the case covers
STOCK = [
    ("test_vit", {"depth": 3}, lambda m: m.dynamic_img_size),
    ("vit_tiny_patch16_224", {}, lambda m: m.depth == 12),
    ("vit_tiny_patch16_384", {"depth": 1}, lambda m: m.patch_embed.img_size == (384, 384)),
    ("vit_small_patch32_224", {**NARROW}, lambda m: m.patch_embed.num_patches == 49),
    ("vit_base_patch16_224.augreg_in21k", {**SMALL, **NARROW}, lambda m: m.pretrained_cfg["tag"] == "augreg_in21k"),
    ("vit_base_patch16_224_miil", {**SMALL, **NARROW}, lambda m: m.blocks[0].attn.qkv.bias is None),
    ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}, lambda m: isinstance(m.blocks[0].attn.k_norm, LayerNorm)),
    ("vit_small_patch16_36x1_224", {**SMALL, **NARROW}, lambda m: hasattr(m.blocks[0].ls1, "gamma")),
    ("deit_tiny_patch16_224", SMALL, lambda m: m.cls_token is not None),
    ("deit3_small_patch16_224", {**SMALL, **NARROW}, lambda m: m.no_embed_class and hasattr(m.blocks[0].ls1, "gamma")),
    ("vit_small_patch14_dinov2", {**NARROW, "img_size": 56}, lambda m: hasattr(m.blocks[0].ls2, "gamma")),
    ("vit_small_patch14_reg4_dinov2", {**NARROW, "img_size": 56}, lambda m: m.num_reg_tokens == 4),
    ("vit_base_patch14_reg1_tipsv2", {**NARROW, "img_size": 56}, lambda m: m.num_reg_tokens == 1),
    ("vit_giant_patch14_dinov2", {**NARROW, "img_size": 56}, lambda m: isinstance(m.blocks[0].mlp, GluMlp)),
    ("vit_giant_patch14_reg4_dinov2", {**NARROW, "img_size": 56}, lambda m: isinstance(m.blocks[0].mlp.act, nn.SiLU)),
    ("vit_base_patch32_clip_224", NARROW, lambda m: isinstance(m.norm_pre, LayerNorm)),
    ("vit_xsmall_patch16_clip_224", SMALL, lambda m: m.patch_embed.proj.bias is None),
    ("vit_base_patch16_clip_quickgelu_224", {**SMALL, **NARROW}, lambda m: "Quick" in m.blocks[0].mlp.act._get_name()),
    ("eva_large_patch14_196", {**NARROW, "img_size": 56}, lambda m: isinstance(m.fc_norm, LayerNorm)),
    ("beit3_base_patch16_224", {**SMALL, **NARROW}, lambda m: isinstance(m.blocks[0].attn.norm, LayerNorm)),
    ("flexivit_small", {**NARROW, "img_size": 96}, lambda m: m.pos_embed.shape[1] == m.patch_embed.num_patches),
    ("vit_base_patch16_radio_v3", {**SMALL, **NARROW}, lambda m: isinstance(m.norm, nn.Identity)),
    ("eva_giant_patch14_224", {**NARROW, "img_size": 56}, lambda m: type(m) is Eva and m.rope is None),
    ("eva02_tiny_patch14_224", {**NARROW, "img_size": 56}, lambda m: isinstance(m.blocks[0].mlp, GluMlp)),
    ("eva02_base_patch14_224", {**NARROW, "img_size": 56}, lambda m: isinstance(m.blocks[0].mlp.norm, LayerNorm)),
    ("eva02_base_patch16_clip_224", {**SMALL, **NARROW}, lambda m: isinstance(m.blocks[0].attn.norm, LayerNorm)),
    ("vit_small_patch16_dinov3", {**SMALL, **NARROW}, lambda m: m.num_prefix_tokens == 5 and m.dynamic_img_size),
    ("vit_small_patch16_dinov3", {**SMALL, **NARROW, "global_pool": "token"}, lambda m: m.blocks[0].attn.rotate_half),
    ("vit_small_patch16_dinov3_qkvb", {**SMALL, **NARROW}, lambda m: m.blocks[0].attn.q_bias is not None),
    ("vit_small_plus_patch16_dinov3", {**SMALL, **NARROW}, lambda m: isinstance(m.blocks[0].mlp, SwiGLU)),
    ("vit_giant_patch16_lingbot", {**SMALL, **NARROW}, lambda m: m.global_pool == "token"),
    ("vit_base_patch16_sapiens2", {**SMALL, **NARROW, "num_kv_heads": 3}, lambda m: m.blocks[0].gamma_2 is None),
    ("vit_pe_spatial_base_patch16_512", {**SMALL, **NARROW}, lambda m: isinstance(m.norm_pre, LayerNorm)),
    ("vit_small_patch16_rope_224", {**SMALL, **NARROW}, lambda m: m.pos_embed is None),
    ("vit_small_patch16_rope_mixed_ape_224", {**SMALL, **NARROW}, lambda m: m.rope_mixed and m.pos_embed is not None),
    ("vit_base_patch16_siglip_224", {**SMALL, **NARROW}, lambda m: m.cls_token is None and m.global_pool == "map"),
    (
        "vit_base_patch16_siglip_gap_224",
        {**SMALL, **NARROW},
        lambda m: m.attn_pool is None and m.num_prefix_tokens == 0,
    ),
    (
        "vit_medium_patch16_gap_240",
        {"img_size": 80, **NARROW},
        lambda m: m.cls_token is None and m.global_pool == "avg",
    ),
    ("vit_betwixt_patch16_reg4_gap_256", {**SMALL, **NARROW}, lambda m: m.cls_token is None and m.num_reg_tokens == 4),
    (
        "vit_so150m_patch16_reg4_map_256",
        {**SMALL, **NARROW},
        lambda m: m.num_prefix_tokens == 4 and m.attn_pool.latent_len,
    ),
    ("test_vit3", {"depth": 3}, lambda m: m.pool_include_prefix and m.attn_pool is not None),
    ("vit_medium_patch16_rope_reg1_gap_256", {**SMALL, **NARROW}, lambda m: type(m) is Eva and m.cls_token is None),
    (
        "vit_pe_core_base_patch16_224",
        {**SMALL, **NARROW, "attn_pool_num_heads": 4},
        lambda m: m.attn_pool.num_heads == 4,
    ),
    ("vit_pe_core_gigantic_patch14_448", {**NARROW, "img_size": 56}, lambda m: m.cls_token is None),
    ("vit_tiny_r_s16_p8_224", {**NARROW, "img_size": 128}, lambda m: m.patch_embed.proj.kernel_size == (8, 8)),
    ("vit_base_mci_224", {**SMALL, **NARROW, "embed_dim": 768}, lambda m: isinstance(m.patch_embed.proj, nn.Identity)),
    ("vit_base_patch16_224", {**SMALL, **NARROW, "global_pool": "avgmax"}, lambda m: m.global_pool == "avgmax"),
    ("vit_base_patch16_224", {**SMALL, **NARROW, "global_pool": "prr"}, lambda m: m.attn_pool.pool == "token"),
]


class Spy(TorchFunctionMode):
    """Records the keys and values that timm's attention passes to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append(args[1:3])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def stock_keys_and_values(model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values in timm's own forward pass."""
    with Spy() as spy:
        model(images)
    assert len(spy.seen) == len(model.blocks) + (model.attn_pool is not None)
    return spy.seen[: len(model.blocks)]


def same(ours: list[tuple[Tensor, Tensor]], stock: list[tuple[Tensor, Tensor]]) -> bool:
    return len(ours) == len(stock) > 0 and all(
        torch.equal(k, sk) and torch.equal(v, sv) for (k, v), (sk, sv) in zip(ours, stock, strict=True)
    )


@pytest.mark.parametrize(("name", "options", "feature"), STOCK, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(STOCK)])
def test_a_frozen_stream_is_bit_equal_to_stock_timm(name, options, feature):
    model: Any = shaken(timm.create_model(name, num_classes=5, **options))
    model.depth = len(model.blocks)
    assert feature(model), "the case no longer has the feature that it covers"
    stock = copy.deepcopy(model)
    backbone = FrozenBackbone(model, name, "hub")
    images = some_images(stock)
    with torch.no_grad():
        tokens = stock.forward_features(images)
        pooled = stock.forward_head(tokens, pre_logits=True)
        logits = stock(images)
    keys_and_values = stock_keys_and_values(stock, images)

    stream = backbone.stream(images)
    assert same(list(stream), keys_and_values)
    assert torch.equal(stream.tokens, tokens)
    assert torch.equal(stream.pooled, pooled)
    assert torch.equal(backbone.backbone_logits(images), logits)
    for reading in ("pooled", "nothing"):  # these compute less, in other shapes, but the same function
        lean = backbone.stream(images, reading)
        for pair, expected in zip(lean, keys_and_values, strict=True):
            assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(pair, expected, strict=True))
        if reading == "pooled":
            assert (lean.pooled - pooled).abs().max() <= 1e-5 * pooled.abs().max()
    assert tokens.shape == (2, backbone.num_tokens, backbone.embed_dim)
    assert logits.std() > 0
    assert not torch.equal(pooled[0], pooled[1])


def test_at_least_fifteen_names_are_compared_with_timm():
    assert len({name for name, _, _ in STOCK}) >= 15


@pytest.mark.parametrize(
    "made", [lambda: tiny_vit(qk_norm=True), *(partial(tiny_eva, kind) for kind in EVA)], ids=["vit", *EVA]
)
def test_a_bfloat16_stream_is_bit_equal_to_stock_timm_in_bfloat16(made):
    model = shaken(made())
    stock = copy.deepcopy(model).to(torch.bfloat16)
    backbone = FrozenBackbone(model, "tiny", "hub", precision=torch.bfloat16)
    images = some_images(stock)
    stream = backbone.stream(images)
    assert same(list(stream), stock_keys_and_values(stock, images.bfloat16()))
    with torch.no_grad():
        assert torch.equal(stream.tokens, stock.forward_features(images.bfloat16()))
    assert stream.tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", EVA)
@pytest.mark.parametrize("fused", [True, False])
def test_each_kind_of_eva_is_bit_equal_to_stock_timm_with_and_without_fused_attention(kind, fused):
    model = shaken(tiny_eva(kind))
    for block in model.blocks:
        block.attn.fused_attn = fused
    stock, backbone = copy.deepcopy(model), FrozenBackbone(model, kind, "hub")
    images = some_images(stock, 5)
    with torch.no_grad():
        tokens = stock.forward_features(images)
        pooled = stock.forward_head(tokens, pre_logits=True)
    stream = backbone.stream(images)
    layers = list(stream)
    assert torch.equal(stream.tokens, tokens)
    assert torch.equal(stream.pooled, pooled)
    assert torch.equal(backbone.backbone_logits(images), stock(images))
    assert len(layers) == 3
    if fused:
        assert same(layers, stock_keys_and_values(stock, images))


def test_a_bias_that_timm_adds_after_the_product_is_added_there():
    model = shaken(tiny_eva("eva02-small"))
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    stock = copy.deepcopy(model).bfloat16()
    images = some_images(stock).bfloat16()
    layers = list(FrozenBackbone(model, "apart", "hub", precision=torch.bfloat16).stream(images))
    assert same(layers, stock_keys_and_values(stock, images))
    for block in stock.blocks:
        block.attn.qkv_bias_separate = False
    assert not same(layers, stock_keys_and_values(stock, images)), "the two ways of adding the bias give equal bits"


def test_only_patches_are_rotated():
    backbone = FrozenBackbone(shaken(tiny_eva("dinov3")), "tiny", "hub")
    heads = torch.randn(2, 3, backbone.num_tokens + 4, 16, generator=torch.Generator().manual_seed(3))
    rotated = backbone.family.place(backbone.blocks[0], heads)
    moved = (rotated != heads).any(dim=-1).all(dim=(0, 1))
    assert moved.tolist() == [False] * 5 + [True] * 16 + [False] * 4
    assert torch.allclose(rotated.norm(dim=-1), heads.norm(dim=-1), atol=1e-5)
    vit = FrozenBackbone(tiny_vit(), "tiny", "hub")
    assert vit.family.place(vit.blocks[0], heads) is heads


def test_block_views_share_the_models_weights():
    shared = 0
    for kind in EVA:
        backbone = FrozenBackbone(tiny_eva(kind), kind, "hub")
        pointers = {parameter.data_ptr() for parameter in backbone.model.parameters()}
        for block in backbone.blocks:
            for name, parameter in block.named_parameters():
                assert parameter.data_ptr() in pointers or name == "attn.qkv.bias", name
                shared += 1
    assert shared > 100


def test_a_frozen_stream_does_not_change_what_the_model_computes(tiny):
    images = some_images(tiny.model)
    before = tiny.backbone_logits(images)
    list(tiny.stream(images))
    list(tiny.stream(images, "nothing"))
    assert torch.equal(tiny.backbone_logits(images), before)


def test_two_interleaved_streams_do_not_mix(tiny):
    first, second = some_images(tiny.model).split(1)
    alone = [list(tiny.stream(images)) for images in (first, second)]
    turns = list(zip(tiny.stream(first), tiny.stream(second), strict=True))
    assert same([pair[0] for pair in turns], alone[0])
    assert same([pair[1] for pair in turns], alone[1])


def test_streams_of_two_threads_do_not_mix(tiny):
    batches = some_images(tiny.model, 4).split(1)
    alone = [list(tiny.stream(images)) for images in batches]
    mismatches: list[int] = []

    def read(number: int) -> None:
        mismatches.extend(number for _ in range(10) if not same(list(tiny.stream(batches[number])), alone[number]))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mismatches == []


def test_a_stream_without_pooling_has_no_pooled_feature(tiny):
    stream = tiny.stream(some_images(tiny.model), "nothing")
    list(stream)
    with pytest.raises(AssertionError, match="reading='nothing'"):
        _ = stream.pooled


def test_a_frozen_backbone_has_no_gradients_and_no_dropout():
    backbone = FrozenBackbone(tiny_vit(drop_rate=0.5, proj_drop_rate=0.5).train(), "tiny", "hub")
    images = some_images(backbone.model).requires_grad_()
    stream = backbone.stream(images)
    for keys, values in stream:
        assert not keys.requires_grad
        assert not values.requires_grad
        assert torch.is_grad_enabled(), "the caller may need gradients of its own"
    assert not stream.pooled.requires_grad
    assert not backbone.backbone_logits(images).requires_grad
    assert torch.equal(backbone.backbone_logits(images), backbone.backbone_logits(images))
    assert all(not parameter.requires_grad for parameter in backbone.model.parameters())


@pytest.mark.parametrize(
    "made",
    [
        *(partial(tiny_vit, **o) for o in ({}, {"no_embed_class": True}, {"pre_norm": True}, {"pos_embed": "none"})),
        *(partial(tiny_eva, kind) for kind in EVA if kind != "rope-gap"),
    ],
)
def test_a_first_token_has_the_class_tokens_position(made):
    backbone = FrozenBackbone(shaken(made()), "tiny", "hub")
    inputs: list[Tensor] = []
    backbone.model.blocks[0].register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    backbone.backbone_logits(some_images(backbone.model))
    assert torch.equal(backbone.first_tokens(backbone.class_token[None])[0], inputs[0][0, 0])


@pytest.mark.parametrize("kind", ["gap", "registers", "siglip", "rope-gap"])
def test_without_a_class_token_tasks_start_as_latent_query_or_mean_patch_and_have_no_position(kind):
    options = {"class_token": False, "global_pool": "map" if kind == "siglip" else "avg"}
    registers = {"reg_tokens": 2} if kind == "registers" else {}
    model = shaken(tiny_eva(kind) if kind == "rope-gap" else tiny_vit(**options, **registers))
    stock, backbone, inputs = copy.deepcopy(model), FrozenBackbone(model, kind, "hub"), []
    assert backbone.num_tokens == 16 + {"registers": 2, "rope-gap": 1}.get(kind, 0)
    if kind == "siglip":
        expected = stock.attn_pool.latent[0, 0]
    else:
        stock.blocks[0].register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
        stock.forward_features(torch.zeros(1, 3, 32, 32))
        expected = inputs[0][0, stock.num_prefix_tokens :].mean(0)
    torch.testing.assert_close(backbone.class_token, expected)
    assert backbone.class_token.std() > 0
    token = torch.arange(48.0)[None]
    assert torch.equal(backbone.first_tokens(token), token)


def test_the_final_norm_is_the_one_before_the_head():
    compared = 0
    for options in ({"global_pool": "token"}, {"global_pool": "avg"}, {"fc_norm": True}, {"final_norm": False}):
        backbone = FrozenBackbone(shaken(tiny_vit(**options)), "tiny", "hub")
        outputs: list[Tensor] = []
        backbone.blocks[-1].register_forward_hook(
            lambda module, arguments, output, outputs=outputs: outputs.append(output)
        )
        images = some_images(backbone.model)
        logits = backbone.backbone_logits(images)
        if backbone.model.global_pool == "token":
            expected = backbone.model.head(backbone.final_norm(outputs[0])[:, 0])
        else:
            expected = backbone.model.head(backbone.final_norm(outputs[0][:, 1:].mean(1)))
        torch.testing.assert_close(logits, expected)
        compared += 1
    assert compared == 4


def test_the_record_describes_the_backbone(tiny):
    record = tiny.record()
    assert record["fingerprint"] == tiny.fingerprint
    assert (record["name"], record["source"], record["precision"]) == ("tiny", "hub", "float32")
    assert (record["embed_dim"], record["depth"], record["num_heads"], record["num_tokens"]) == (48, 3, 3, 17)
    assert record["num_parameters"] == sum(p.numel() for p in tiny_vit().parameters())
    assert record["preprocessing"]["input_size"] == [3, 32, 32]


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 3, 64, 64), (2, 1, 32, 32), (2, 3, 32, 40), (1, 2, 3, 32, 32)])
def test_images_of_another_shape_are_refused(tiny, shape):
    with pytest.raises(BackboneError, match=r"\[B, 3, 32, 32\] of backbone 'tiny'") as refusal:
        tiny.check_images(torch.zeros(shape))
    assert str(list(shape)) in str(refusal.value)


def test_a_stream_and_the_logits_check_their_images(tiny):
    for method in (tiny.stream, tiny.backbone_logits):
        with pytest.raises(BackboneError, match="Images must have the shape"):
            method(torch.zeros(1, 3, 64, 64))


def test_integer_images_are_refused(tiny):
    with pytest.raises(BackboneError, match=r"must be floating point and normalised; got torch\.uint8"):
        tiny.check_images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch32_clip_224"])
def test_the_transform_is_timms_own(name):
    model = timm.create_model(name, **NARROW)
    backbone = FrozenBackbone(model, name, "hub")
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (200, 301, 3), dtype=np.uint8))
    expected = create_transform(**resolve_model_data_config(model), is_training=False)(picture)
    assert torch.equal(backbone.transform(picture), expected)
    assert expected.shape == (3, 224, 224)


def test_the_transform_takes_the_mean_and_std_given():
    white = Image.new("RGB", (40, 30), "white")
    backbone = FrozenBackbone(tiny_vit(), "tiny", "hub", mean=(0.0, 0.5, 1.0), std=(1.0, 0.25, 0.5))
    assert backbone.transform(white)[:, 0, 0].tolist() == [1.0, 2.0, 0.0]
