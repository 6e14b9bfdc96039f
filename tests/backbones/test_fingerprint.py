"""A fingerprint changes with everything that a feature depends on, and with nothing else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm
from torch import nn

from addenda.backbones import FrozenBackbone
from tests.support.tiny import some_images, tiny_eva, tiny_vit


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
    fingerprints = {tiny.fingerprint, fingerprint(mean=(0.5, 0.5, 0.25)), fingerprint(std=(0.5, 0.5, 0.25))}
    for setting in ({"interpolation": "nearest"}, {"crop_pct": 0.5}, {"crop_mode": "border"}):
        model: Any = tiny_vit()
        model.pretrained_cfg = {"input_size": (3, 32, 32), **setting}
        fingerprints.add(fingerprint(model))
    assert len(fingerprints) == 6


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
    fingerprints = {tiny.fingerprint}
    for options in variants:
        model = tiny_vit(**options)
        model.load_state_dict(tiny.model.state_dict())
        fingerprints.add(fingerprint(model))
    assert len(fingerprints) == 1 + len(variants)


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
def test_a_fingerprint_changes_with_rotations_that_are_not_in_the_weights(kind, options):
    model, other = tiny_eva(kind), tiny_eva(kind, **options)
    other.load_state_dict(model.state_dict())
    assert not torch.equal(model.forward_features(some_images(model)), other.forward_features(some_images(model)))
    assert fingerprint(model) != fingerprint(other)


def test_a_fingerprint_does_not_depend_on_the_memory_layout(tiny):
    model = tiny_vit()
    with torch.no_grad():
        model.head.weight.data = model.head.weight.data.T.contiguous().T
    assert not model.head.weight.is_contiguous()
    assert fingerprint(model) == tiny.fingerprint


RECORDED = {  # by version 0.2 before backbones without tokens
    "vit": "f6583cadbe171d17", "dinov2": "c7a66bd13c2eb42b", "average": "ed77bf4ae73c2f54", "clip": "68fd4a18eb14f3ec",
    "dinov3": "406654cbc715cd59", "eva02": "1f5eaa63a4070ba2", "eva02-small": "06f1a1183fd76e51",
    "rope-mixed": "d2710d1fe79951d0", "eva": "f004ee219cacd6b3",
}  # fmt: skip


@pytest.mark.parametrize("kind", RECORDED)
def test_fingerprints_that_registries_hold_never_change(kind):
    options = {
        "vit": {}, "average": {"global_pool": "avg"}, "clip": {"pre_norm": True},
        "dinov2": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.3},
    }  # fmt: skip
    model = tiny_vit(**options[kind]) if kind in options else tiny_eva(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) % 7 / 64)
    assert fingerprint(model).startswith(RECORDED[kind])


def test_pooling_by_attention_and_with_registers_is_part_of_the_fingerprint():
    heads = {fingerprint(tiny_eva("pe-core", attn_pool_num_heads=count)) for count in (3, 4)}
    included = {fingerprint(tiny_vit(global_pool="avg", pool_include_prefix=flag)) for flag in (False, True)}
    assert len(heads) == len(included) == 2
