"""Which models carry tokens, which only layer heads, and which are no backbones; each with a reason."""

from __future__ import annotations

from functools import partial

import pytest
import timm
from timm.layers import Attention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import ParallelScalingBlock

from addenda.backbones import FrozenBackbone, catalogue, load_backbone
from addenda.backbones.scope import SUPPORTED_EXAMPLES, obstacle, token_obstacle
from addenda.exceptions import BackboneError
from tests.support.tiny import tiny_eva, tiny_vit

REFUSED = [
    ("swin_tiny_patch4_window7_224", "it is a SwinTransformer"),
    ("beit_base_patch16_224", "it is a Beit"),
    ("eva02_enormous_patch14_clip_224", "its blocks are EvaBlockPostNorm, not timm's pre-norm EvaBlock"),
    ("vit_large_patch16_sapiens2", "its attention is grouped: 2 query heads share each key head"),
    ("resnet50", "it is a ResNet"),
    ("deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled"),
    ("vit_relpos_small_patch16_224", "it is a VisionTransformerRelPos"),
    ("vit_base_patch16_rpn_224", "its blocks are ResPostBlock, not timm's standard Block"),
    ("vit_small_patch16_18x2_224", "its blocks are ParallelThingsBlock"),
    ("vit_base_patch16_xp_224", "its blocks are ParallelScalingBlock"),
]


@pytest.mark.parametrize(("name", "reason"), REFUSED, ids=[name for name, _ in REFUSED])
def test_a_model_that_cannot_carry_tokens_is_listed_with_the_reason_and_carries_layer_heads(name, reason):
    [listed] = catalogue(name)
    assert listed.layer_heads is None
    assert listed.tokens.startswith(reason)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"global_pool": ""}, "it does not pool an image into one feature"),
        ({"in_chans": 1}, "it takes 1 input channels, not 3"),
    ],
)
def test_an_unsupported_property_is_named(options, reason):
    with pytest.raises(BackboneError, match=rf"^Backbone 'odd' cannot be used: {reason}\. See: addenda backbones list"):
        FrozenBackbone(tiny_vit(**options), "odd", "hub")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_fn": ParallelScalingBlock}, "its blocks are ParallelScalingBlock, not timm's standard Block"),
        ({"attn_layer": "diff", "embed_dim": 96}, "its attention is DiffAttention, not timm's standard Attention"),
    ],
)
def test_blocks_that_cannot_carry_tokens_are_named(options, reason):
    backbone = FrozenBackbone(tiny_vit(**options), "odd", "hub")
    assert backbone.token_obstacle() == reason
    assert backbone.num_layer_features == 2 * 2 * backbone.embed_dim


@pytest.mark.parametrize(
    ("model", "attention"),
    [(tiny_vit, Attention), (lambda: tiny_eva("dinov3"), partial(EvaAttention, scale_norm=False))],
    ids=["vit", "eva"],
)
def test_gated_attention_is_named_even_in_one_block(model, attention):
    model = model()
    model.blocks[2].attn = attention(48, num_heads=3, gated=True)
    assert token_obstacle(model) == "its attention is gated"


def test_the_examples_in_errors_are_supported():
    assert len(SUPPORTED_EXAMPLES) == 2
    assert [obstacle(timm.create_model(name, device="meta")) for name in SUPPORTED_EXAMPLES] == [None, None]


def test_a_model_that_is_no_classifier_is_refused_by_name():
    with pytest.raises(
        BackboneError, match=r"^Backbone 'deepseek_vit_412m_enc' cannot be used: its features"
    ) as refusal:
        load_backbone("deepseek_vit_412m_enc", device="cpu")
    assert str(refusal.value).endswith(f"Supported, for example: {SUPPORTED_EXAMPLES[0]}, {SUPPORTED_EXAMPLES[1]}.")


def test_an_unknown_name_is_refused_with_similar_names():
    with pytest.raises(BackboneError, match="timm has no model 'vit_tinny_patch16_224'") as refusal:
        load_backbone("vit_tinny_patch16_224", device="cpu")
    assert "vit_tiny_patch16_224," in str(refusal.value)
    assert "addenda backbones list" in str(refusal.value)


def test_a_name_similar_to_none_is_refused_with_two_supported_examples():
    with pytest.raises(
        BackboneError, match=f"no model 'zzz'. Similar names: {SUPPORTED_EXAMPLES[0]}, {SUPPORTED_EXAMPLES[1]}"
    ):
        load_backbone("zzz", device="cpu")


def test_the_catalogue_lists_supported_models_and_reasons():
    supported = ["vit_tiny_patch16_224", "vit_tiny_patch16_384", "vit_tiny_patch16_dinov3_qkvb"]
    assert [(row.name, row.layer_heads, row.tokens) for row in catalogue("vit_tiny_patch16_*")] == [
        (name, None, None) for name in supported
    ]
    [row] = catalogue("vit_base_patch16_xp_224")
    assert (row.name, row.timm_class, row.layer_heads) == ("vit_base_patch16_xp_224", "VisionTransformer", None)
    assert "ParallelScalingBlock" in row.tokens
