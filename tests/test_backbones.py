"""Frozen backbones: bit-equal to stock timm, refused where out of scope, loaded from files that run nothing."""

from __future__ import annotations

import copy
import os
import random
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.layers import Attention, GluMlp, LayerNorm, SwiGLU
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from addenda.backbones import SUFFIXES, FrozenBackbone, catalogue, load_backbone, read_image
from addenda.backbones.scope import WORKING, obstacle
from addenda.exceptions import BackboneError, DataError
from tests.conftest import tiny_vit
from tests.tiny import EVA, tiny_eva

SMALL = {"img_size": 64, "depth": 2}
NARROW = {"embed_dim": 48, "num_heads": 3, "depth": 2}

# name, what makes it small, and the feature for which it stands here
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
]

REFUSED = [
    ("swin_tiny_patch4_window7_224", "it is a SwinTransformer"),
    ("beit_base_patch16_224", "it is a Beit"),
    ("eva02_enormous_patch14_clip_224", "its blocks are EvaBlockPostNorm, not timm's pre-norm EvaBlock"),
    ("vit_large_patch16_sapiens2", "its attention is grouped: 2 heads of queries share one of keys"),
    ("vit_pe_core_base_patch16_224", "it pools by 'map'"),
    ("vit_medium_patch16_rope_reg1_gap_256", "it has no class token"),
    ("resnet50", "it is a ResNet"),
    ("deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled"),
    ("vit_relpos_small_patch16_224", "it is a VisionTransformerRelPos"),
    ("vit_base_patch16_siglip_224", "it has no class token"),
    ("vit_medium_patch16_gap_240", "it has no class token"),
    ("vit_so150m_patch16_reg4_map_256", "it has no class token"),
    ("vit_base_patch16_rpn_224", "it has no class token"),
    ("vit_small_patch16_18x2_224", "its blocks are ParallelThingsBlock"),
    ("vit_base_patch16_xp_224", "its blocks are ParallelScalingBlock"),
]


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Moves every parameter, so that no zero head, unit norm or vanishing LayerScale hides a difference."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model.eval()


def some_images(model: nn.Module, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


class Spy(TorchFunctionMode):
    """Sees the keys and values that timm's attention hands to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append(args[1:3])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def stock_keys_and_values(model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values, as timm's own forward pass has them."""
    with Spy() as spy:
        model(images)
    assert len(spy.seen) == len(model.blocks)
    return spy.seen


def same(ours: list[tuple[Tensor, Tensor]], stock: list[tuple[Tensor, Tensor]]) -> bool:
    return len(ours) == len(stock) > 0 and all(
        torch.equal(k, sk) and torch.equal(v, sv) for (k, v), (sk, sv) in zip(ours, stock, strict=True)
    )


# -- the frozen stream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "feature"), STOCK, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(STOCK)])
def test_a_frozen_stream_is_bit_equal_to_stock_timm(name, options, feature):
    model = shaken(timm.create_model(name, num_classes=5, **options))
    model.depth = len(model.blocks)
    assert feature(model), "the case lost the feature for which it is here"
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
    for reading in ("pooled", "nothing"):  # what goes on computes less, in other shapes: the same function
        lean = backbone.stream(images, reading)
        for found, expected in zip(lean, keys_and_values, strict=True):
            assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(found, expected, strict=True))
        if reading == "pooled":
            assert (lean.pooled - pooled).abs().max() <= 1e-5 * pooled.abs().max()
    assert tokens.shape == (2, backbone.num_tokens, backbone.embed_dim)
    assert logits.std() > 0
    assert not torch.equal(pooled[0], pooled[1])


def test_at_least_fifteen_names_are_compared_with_timm():
    assert len({name for name, _, _ in STOCK}) >= 15


@pytest.mark.parametrize(
    "made",
    [lambda: tiny_vit(qk_norm=True), *(partial(tiny_eva, kind) for kind in EVA)],
    ids=["vit", *EVA],
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
    kept = list(stream)
    assert torch.equal(stream.tokens, tokens)
    assert torch.equal(stream.pooled, pooled)
    assert torch.equal(backbone.backbone_logits(images), stock(images))
    assert len(kept) == 3
    if fused:
        assert same(kept, stock_keys_and_values(stock, images))


def test_a_bias_that_timm_adds_after_the_product_is_added_there():
    model = shaken(tiny_eva("eva02-small"))
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    stock = copy.deepcopy(model).bfloat16()
    images = some_images(stock).bfloat16()
    found = list(FrozenBackbone(model, "apart", "hub", precision=torch.bfloat16).stream(images))
    assert same(found, stock_keys_and_values(stock, images))
    for block in stock.blocks:
        block.attn.qkv_bias_separate = False
    assert not same(found, stock_keys_and_values(stock, images)), "there is nothing to tell the two apart"


def test_the_patches_are_turned_and_nothing_else_is():
    backbone = FrozenBackbone(shaken(tiny_eva("dinov3")), "tiny", "hub")
    heads = torch.randn(2, 3, backbone.num_tokens + 4, 16, generator=torch.Generator().manual_seed(3))
    turned = backbone.place(backbone.blocks[0], heads)
    moved = (turned != heads).any(dim=-1).all(dim=(0, 1))
    assert moved.tolist() == [False] * 5 + [True] * 16 + [False] * 4
    assert torch.allclose(turned.norm(dim=-1), heads.norm(dim=-1), atol=1e-5)
    vit = FrozenBackbone(tiny_vit(), "tiny", "hub")
    assert vit.place(vit.blocks[0], heads) is heads


def test_stand_ins_share_the_models_weights():
    shared = 0
    for kind in EVA:
        backbone = FrozenBackbone(tiny_eva(kind), kind, "hub")
        own = {parameter.data_ptr() for parameter in backbone.model.parameters()}
        for block in backbone.blocks:
            for name, parameter in block.named_parameters():
                assert parameter.data_ptr() in own or name == "attn.qkv.bias", name
                shared += 1
    assert shared > 100


def test_a_frozen_stream_does_not_change_what_the_model_computes(tiny):
    images = some_images(tiny.model)
    before = tiny.backbone_logits(images)
    list(tiny.stream(images))
    list(tiny.stream(images, "nothing"))
    assert torch.equal(tiny.backbone_logits(images), before)


def test_two_streams_read_in_turns_do_not_mix(tiny):
    first, second = some_images(tiny.model).split(1)
    alone = [list(tiny.stream(images)) for images in (first, second)]
    turns = list(zip(tiny.stream(first), tiny.stream(second), strict=True))
    assert same([pair[0] for pair in turns], alone[0])
    assert same([pair[1] for pair in turns], alone[1])


def test_streams_of_two_threads_do_not_mix(tiny):
    batches = some_images(tiny.model, 4).split(1)
    alone = [list(tiny.stream(images)) for images in batches]
    wrong: list[int] = []

    def read(number: int) -> None:
        wrong.extend(number for _ in range(10) if not same(list(tiny.stream(batches[number])), alone[number]))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_stream_without_pooling_has_no_pooled_feature(tiny):
    stream = tiny.stream(some_images(tiny.model), "nothing")
    list(stream)
    with pytest.raises(AssertionError, match="reading nothing"):
        _ = stream.pooled


def test_a_frozen_backbone_has_no_gradients_and_no_dropout():
    backbone = FrozenBackbone(tiny_vit(drop_rate=0.5, proj_drop_rate=0.5).train(), "tiny", "hub")
    images = some_images(backbone.model).requires_grad_()
    stream = backbone.stream(images)
    for keys, values in stream:
        assert not keys.requires_grad
        assert not values.requires_grad
        assert torch.is_grad_enabled(), "the reader of a stream may want gradients of its own"
    assert not stream.pooled.requires_grad
    assert not backbone.backbone_logits(images).requires_grad
    assert torch.equal(backbone.backbone_logits(images), backbone.backbone_logits(images))
    assert all(not parameter.requires_grad for parameter in backbone.model.parameters())


@pytest.mark.parametrize(
    "made",
    [
        *(partial(tiny_vit, **o) for o in ({}, {"no_embed_class": True}, {"pre_norm": True}, {"pos_embed": "none"})),
        *(partial(tiny_eva, kind) for kind in EVA),
    ],
)
def test_a_first_token_stands_where_the_class_token_stands(made):
    backbone = FrozenBackbone(shaken(made()), "tiny", "hub")
    inputs: list[Tensor] = []
    backbone.model.blocks[0].register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    backbone.backbone_logits(some_images(backbone.model))
    assert torch.equal(backbone.first_tokens(backbone.class_token[None])[0], inputs[0][0, 0])


def test_the_final_norm_is_the_one_before_the_head():
    compared = 0
    for options in ({"global_pool": "token"}, {"global_pool": "avg"}, {"fc_norm": True}, {"final_norm": False}):
        backbone = FrozenBackbone(shaken(tiny_vit(**options)), "tiny", "hub")
        outputs: list[Tensor] = []
        backbone.blocks[-1].register_forward_hook(lambda module, arguments, output, kept=outputs: kept.append(output))
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
    for ask in (tiny.stream, tiny.backbone_logits):
        with pytest.raises(BackboneError, match="Images must have the shape"):
            ask(torch.zeros(1, 3, 64, 64))


def test_images_of_whole_numbers_are_refused(tiny):
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


# -- scope ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "missing"), REFUSED, ids=[name for name, _ in REFUSED])
def test_a_model_out_of_scope_is_refused_with_the_reason_and_two_that_work(name, missing):
    with pytest.raises(BackboneError) as refusal:
        load_backbone(name, device="cpu")
    message = str(refusal.value)
    assert message.startswith(f"Backbone {name!r} cannot carry task tokens: {missing}")
    assert message.endswith(f"Two that work: {WORKING[0]}, {WORKING[1]}.")


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"global_pool": "avgmax"}, "it pools by 'avgmax'"),
        ({"global_pool": ""}, "it pools by ''"),
        ({"global_pool": "map"}, "it pools by 'map'"),
        ({"global_pool": "prr"}, "it pools by 'prr'"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "its pooling includes the prefix tokens"),
        ({"global_pool": "avg", "class_token": False}, "it has no class token"),
        ({"in_chans": 1}, "it takes 1 input channels, not 3"),
        ({"block_fn": ParallelScalingBlock}, "its blocks are ParallelScalingBlock"),
        ({"attn_layer": "diff", "embed_dim": 96}, "its attention is DiffAttention"),
    ],
)
def test_a_property_that_task_tokens_cannot_share_is_named(options, missing):
    with pytest.raises(BackboneError, match=r"^Backbone 'odd' cannot carry task tokens: ") as refusal:
        FrozenBackbone(tiny_vit(**options), "odd", "hub")
    assert missing in str(refusal.value)


@pytest.mark.parametrize(
    ("model", "attention"),
    [(tiny_vit, Attention), (lambda: tiny_eva("dinov3"), partial(EvaAttention, scale_norm=False))],
    ids=["vit", "eva"],
)
def test_gated_attention_is_named_even_in_one_block(model, attention):
    model = model()
    model.blocks[2].attn = attention(48, num_heads=3, gated=True)
    with pytest.raises(BackboneError, match="'odd' cannot carry task tokens: its attention is gated"):
        FrozenBackbone(model, "odd", "hub")


def test_the_names_offered_in_errors_work():
    assert len(WORKING) == 2
    assert [obstacle(timm.create_model(name, device="meta")) for name in WORKING] == [None, None]


@pytest.mark.parametrize("name", ["vit_base_mci_224", "vit_tiny_r_s16_p8_224"])
def test_a_convolutional_stem_is_refused_for_what_it_is(name):
    with pytest.raises(BackboneError, match=r"cannot carry task tokens: .*HybridEmbed"):
        load_backbone(name, device="cpu")


def test_an_unknown_name_is_refused_with_names_near_it():
    with pytest.raises(BackboneError, match="timm knows no model 'vit_tinny_patch16_224'") as refusal:
        load_backbone("vit_tinny_patch16_224", device="cpu")
    assert "vit_tiny_patch16_224," in str(refusal.value)
    assert "addenda backbones list" in str(refusal.value)


def test_a_name_near_nothing_is_refused_with_two_that_work():
    with pytest.raises(BackboneError, match=f"no model 'zzz'. Near it: {WORKING[0]}, {WORKING[1]}"):
        load_backbone("zzz", device="cpu")


def test_the_catalogue_says_what_works_and_what_is_missing():
    working = ["vit_tiny_patch16_224", "vit_tiny_patch16_384", "vit_tiny_patch16_dinov3_qkvb"]
    assert catalogue("vit_tiny_patch16_*") == [(name, None) for name in working]
    [(name, missing)] = catalogue("vit_base_patch16_xp_224")
    assert name == "vit_base_patch16_xp_224"
    assert "ParallelScalingBlock" in missing


# -- fingerprint ------------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module | None = None, **options: object) -> str:
    return FrozenBackbone(model or tiny_vit(), **{"name": "tiny", "source": "hub", **options}).fingerprint


def test_a_fingerprint_does_not_depend_on_name_source_or_precision(tiny):
    assert fingerprint() == tiny.fingerprint
    assert fingerprint(name="other", source="/elsewhere") == tiny.fingerprint
    assert fingerprint(precision=torch.bfloat16) == tiny.fingerprint


def test_a_fingerprint_changes_with_one_bit_of_any_weight(tiny):
    flipped = 0
    for name in tiny_vit().state_dict():
        model = tiny_vit()
        model.state_dict()[name].view(torch.int32).view(-1)[-1] ^= 1
        assert fingerprint(model) != tiny.fingerprint, name
        flipped += 1
    assert flipped > 30


def test_a_fingerprint_changes_with_the_preprocessing(tiny):
    found = {tiny.fingerprint, fingerprint(mean=(0.5, 0.5, 0.25)), fingerprint(std=(0.5, 0.5, 0.25))}
    for setting in ({"interpolation": "nearest"}, {"crop_pct": 0.5}, {"crop_mode": "border"}):
        model = tiny_vit()
        model.pretrained_cfg = {"input_size": (3, 32, 32), **setting}
        found.add(fingerprint(model))
    assert len(found) == 6


def test_a_fingerprint_changes_with_the_input_size():
    small, large = tiny_vit(pos_embed="none"), tiny_vit(pos_embed="none", img_size=40)
    large.load_state_dict(small.state_dict())
    assert fingerprint(small) != fingerprint(large)


def test_a_fingerprint_changes_with_the_architecture_around_the_same_weights(tiny):
    variants = (
        {"num_heads": 6},
        {"act_layer": "quick_gelu"},
        {"norm_layer": partial(LayerNorm, eps=1e-5)},
        {"global_pool": "avg", "fc_norm": False},
    )
    found = {tiny.fingerprint}
    for options in variants:
        model = tiny_vit(**options)
        model.load_state_dict(tiny.model.state_dict())
        found.add(fingerprint(model))
    assert len(found) == 1 + len(variants)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dinov3", {"rope_temperature": 10.0}),
        ("dinov3", {"rope_rotate_half": False}),
        ("dinov3", {"rope_grid_offset": 0.5}),
        ("dinov3", {"rope_type": "cat"}),
        ("dinov3", {"use_rot_pos_emb": False}),
        ("eva02", {"ref_feat_shape": (4, 4)}),
        ("rope-mixed", {"rope_grid_indexing": "ij"}),
    ],
)
def test_a_fingerprint_changes_with_rotations_that_no_weight_tells_of(kind, options):
    model, other = tiny_eva(kind), tiny_eva(kind, **options)
    other.load_state_dict(model.state_dict())
    assert not torch.equal(model.forward_features(some_images(model)), other.forward_features(some_images(model)))
    assert fingerprint(model) != fingerprint(other)


def test_a_fingerprint_is_the_same_in_another_order_of_memory(tiny):
    model = tiny_vit()
    with torch.no_grad():
        model.head.weight.data = model.head.weight.data.T.contiguous().T
    assert not model.head.weight.is_contiguous()
    assert fingerprint(model) == tiny.fingerprint


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return shaken(timm.create_model("test_vit", num_classes=4)).state_dict()


def test_pth_and_safetensors_files_give_equal_backbones(tmp_path, weights):
    torch.save(weights, tmp_path / "a.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, tmp_path / "b.pt")
    save_file(weights, tmp_path / "c.safetensors")
    loaded = [load_backbone("test_vit", path, device="cpu") for path in sorted(tmp_path.iterdir())]
    model = timm.create_model("test_vit", num_classes=4)
    model.load_state_dict(weights)
    expected = FrozenBackbone(model, "test_vit", "hub")
    assert [backbone.fingerprint for backbone in loaded] == [expected.fingerprint] * 3
    images = some_images(model)
    assert torch.equal(loaded[0].backbone_logits(images), expected.backbone_logits(images))
    assert loaded[2].source == str(tmp_path / "c.safetensors")


def test_weights_without_a_head_make_a_backbone_without_one(tmp_path, weights):
    save_file({k: v for k, v in weights.items() if not k.startswith("head.")}, tmp_path / "w.safetensors")
    backbone = load_backbone("test_vit", tmp_path / "w.safetensors", device="cpu")
    assert backbone.backbone_logits(some_images(backbone.model)).shape == (2, 64)


def test_mean_std_and_precision_are_taken(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    backbone = load_backbone(
        "test_vit",
        tmp_path / "w.safetensors",
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 2.0, 3.0),
        precision="bfloat16",
        device="cpu",
    )
    assert backbone.preprocessing["mean"] == [0.1, 0.2, 0.3]
    assert backbone.preprocessing["std"] == [1.0, 2.0, 3.0]
    assert backbone.class_token.dtype == torch.bfloat16
    assert backbone.record()["precision"] == "bfloat16"


class Bomb:
    """Pickles to a call that makes a folder: were it unpickled, the folder would stand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickled_object_is_refused_and_never_run(tmp_path, weights):
    torch.save({**weights, "extra": Bomb(tmp_path / "boom")}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"w\.pth' cannot be read: .*torch checkpoint that holds tensors only"):
        load_backbone("test_vit", tmp_path / "w.pth", device="cpu")
    assert not (tmp_path / "boom").exists()
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "boom").exists(), "the file was harmless, so its refusal proves nothing"


def test_a_weights_file_of_another_architecture_is_refused(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"w\.safetensors' does not fit 'deit_tiny_patch16_224': .*\w"):
        load_backbone("deit_tiny_patch16_224", tmp_path / "w.safetensors", device="cpu")


@pytest.mark.parametrize(
    "options", [{"patch_size": 32}, {"img_size": 192}], ids=["another patch size", "another input size"]
)
def test_weights_that_timm_would_resample_are_refused(tmp_path, options):
    save_file(timm.create_model("test_vit", **options).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"w\.safetensors' does not fit 'test_vit'"):
        load_backbone("test_vit", tmp_path / "w.safetensors", device="cpu")


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(3), {"model": "x"}, {"head.weight": 5}, {1: 2}, {"pos_embed": torch.zeros(3)}, {}],
    ids=["list", "tensor", "text", "number", "key", "shape", "nothing"],
)
def test_a_checkpoint_that_holds_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"Weights file '.*w\.pth' (cannot be read|does not fit)"):
        load_backbone("test_vit", tmp_path / "w.pth", device="cpu")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.npz"])
@pytest.mark.parametrize("data", [b"", b"hello", b"\x00" * 64], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_weights_file_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BackboneError, match=rf"Weights file '.*{name}' cannot be read: .*It must be a safetensors"):
        load_backbone("test_vit", tmp_path / name, device="cpu")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_truncated_weights_file_is_refused(tmp_path, weights, name):
    (save_file if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for length in (100, len(data) // 2, len(data) - 1):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(BackboneError, match=f"Weights file '.*{name}' cannot be read: "):
            load_backbone("test_vit", tmp_path / name, device="cpu")


def test_a_missing_weights_file_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"Weights file '.*nowhere\.pth' does not exist"):
        load_backbone("test_vit", tmp_path / "nowhere.pth", device="cpu")
    with pytest.raises(BackboneError, match="does not exist"):
        load_backbone("test_vit", tmp_path, device="cpu")


def test_an_unknown_tag_is_refused_by_name(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    for path in (tmp_path / "w.safetensors", None):
        with pytest.raises(BackboneError, match=r"'test_vit\.nonsense'"):
            load_backbone("test_vit.nonsense", path, device="cpu")


def test_pretrained_weights_that_are_not_cached_offline_ask_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match=r"No weights for 'test_vit': .*--weights FILE\.safetensors") as refusal:
        load_backbone("test_vit", device="cpu")
    assert "LocalEntryNotFoundError" in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float16"}, "Precision 'float16' is not known. Known: float32, bfloat16."),
        ({"device": "warp"}, "Device 'warp' cannot be used: "),
        ({"device": "cuda:99"}, "Device 'cuda:99' cannot be used: "),
        ({"mean": (0.5, 0.5)}, "mean takes one number or three, one for each channel; got 2."),
        ({"std": (0.5,) * 4}, "std takes one number or three, one for each channel; got 4."),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive; got (0.5, 0.0, 0.5)."),
        ({"std": (0.5, -1.0, 0.5)}, "std must be positive"),
        ({"std": (0.5, float("nan"), 0.5)}, "std "),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean "),
    ],
)
def test_an_argument_that_is_not_valid_is_refused(options, message):
    with pytest.raises(BackboneError) as refusal:
        load_backbone("glyphs", **{"device": "cpu", **options})
    assert str(refusal.value).startswith(message)


# -- glyphs -----------------------------------------------------------------------------------------------------------


def test_glyphs_is_embedded_and_has_one_fingerprint(glyphs):
    assert (glyphs.depth, glyphs.embed_dim, glyphs.num_heads, glyphs.num_tokens) == (5, 128, 4, 65)
    assert glyphs.source == "embedded"
    assert load_backbone("glyphs", device="cpu", precision="bfloat16").fingerprint == glyphs.fingerprint


def test_glyphs_takes_32_px_pictures_whole(glyphs):
    assert glyphs.preprocessing["input_size"] == [3, 32, 32]
    assert glyphs.preprocessing["crop_pct"] == 1.0
    assert glyphs.transform(Image.new("RGB", (32, 32), "white")).unique().tolist() == [1.0]


def test_glyphs_takes_another_mean_and_std(glyphs):
    other = load_backbone("glyphs", device="cpu", mean=(0.4,) * 3, std=(0.3,) * 3)
    assert other.preprocessing["mean"] == [0.4] * 3
    assert other.fingerprint != glyphs.fingerprint


def test_glyphs_takes_no_weights(tmp_path):
    with pytest.raises(BackboneError, match="'glyphs' carries its own weights"):
        load_backbone("glyphs", tmp_path / "w.safetensors", device="cpu")


# -- images -----------------------------------------------------------------------------------------------------------


def pixels(path: Path) -> list[list[int]]:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def picture(values: object, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.array(values, dtype))


def test_transparent_pixels_are_laid_on_white(tmp_path):
    picture([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]]).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png") == [[255, 255, 255], [255, 0, 0], [204, 204, 204]]


def test_grey_with_alpha_is_laid_on_white(tmp_path):
    picture([[[9, 9, 9, 0], [9, 9, 9, 255]]]).convert("LA").save(tmp_path / "a.png")
    assert mode(tmp_path / "a.png") == "LA"
    assert pixels(tmp_path / "a.png") == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])], ids=["index", "table"])
def test_a_transparent_palette_entry_is_laid_on_white(tmp_path, transparency):
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=transparency)
    assert mode(tmp_path / "a.png") == "P"
    assert pixels(tmp_path / "a.png") == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_scaled_to_eight(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    picture([[0, 10 * 257, 200 * 257, 65535]], np.uint16).save(path)
    assert mode(path).startswith("I")
    assert pixels(path) == [[v] * 3 for v in (0, 10, 200, 255)]


def test_exif_orientation_turns_the_image(tmp_path):
    expected = {1: [1, 2, 3, 4], 2: [2, 1, 4, 3], 3: [4, 3, 2, 1], 6: [3, 1, 4, 2], 8: [2, 4, 1, 3]}
    for orientation, order in expected.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture([[10, 20], [30, 40]]).save(tmp_path / "a.png", exif=exif)
        assert pixels(tmp_path / "a.png") == [[10 * v] * 3 for v in order], orientation
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (20, 40)


def test_every_suffix_can_be_read(tmp_path):
    assert len(SUFFIXES) >= 9
    for suffix in SUFFIXES:
        Image.new("RGB", (8, 6), (0, 0, 255)).save(tmp_path / f"a{suffix}")
        red, green, blue = pixels(tmp_path / f"a{suffix}")[0]
        assert max(red, green, 255 - blue) <= 2, suffix


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".bmp", ".ppm"])
def test_a_truncated_image_is_refused_by_name(tmp_path, suffix):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    picture(np.random.RandomState(0).randint(0, 255, (40, 40, 3))).save(whole)
    data = whole.read_bytes()
    cuts = random.Random(0).sample(range(len(data) // 2), 10)
    assert read_image(whole).size == (40, 40)
    for length in cuts:
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"Image '.*cut\{suffix}' cannot be read: "):
            read_image(path)


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"Image '.*notes\.png' cannot be read: "):
        read_image(tmp_path / "notes.png")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)


def test_a_turned_image_whose_exif_has_a_wrong_type_is_refused_by_name(tmp_path):
    text_where_a_number_belongs = bytes.fromhex(
        "4578696600004d4d002a000000080002010a0002000000060000002601120003000000010006000000000000"
    )
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=text_where_a_number_belongs + b"hello\0")
    with pytest.raises(DataError, match=r"a\.jpg' cannot be read: required argument is not an integer"):
        read_image(tmp_path / "a.jpg")


def test_a_missing_image_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"Image '.*nowhere\.png' does not exist"):
        read_image(tmp_path / "nowhere.png")


def test_an_image_too_large_to_be_safe_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png' cannot be read: .*decompression bomb"):
        read_image(tmp_path / "a.png")
