"""Weights files as other libraries and training runs write them: converted, they compute what the originals do."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from addenda.backbones.weights import load_weights
from addenda.exceptions import BackboneError
from tests.support.tiny import shaken, some_images, tiny_eva, tiny_vit

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
WIDE = {**SIZES, "intermediate_size": 192}
EPS = {"layer_norm_eps": 1e-6}


def read(model: Any, path: Path, resample: bool = False) -> str:
    return load_weights(model, "tiny", path, resample)


def tokens(output: Any) -> Tensor:
    return output.last_hidden_state


def pooled(output: Any) -> Tensor:
    return output.pooler_output


def features(model: Any, images: Tensor) -> Tensor:
    return model.forward_features(images)


def feature(model: Any, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images), pre_logits=True)


HEADLESS = {"num_classes": 0}
DINOV3 = {**HEADLESS, "qkv_bias": True}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "ViT": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**WIDE, **EPS), add_pooling_layer=False),
        lambda: tiny_vit(**HEADLESS), tokens, features,
    ),
    "DINOv2": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, **EPS)),
        lambda: tiny_vit(**HEADLESS, init_values=1.0), tokens, features,
    ),
    "DINOv2 with registers and a gated MLP": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SIZES, **EPS, use_swiglu_ffn=True)
        ),
        lambda: tiny_vit(
            **HEADLESS, reg_tokens=4, no_embed_class=True, init_values=1.0, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU,
            mlp_ratio=256 / 48,
        ),
        tokens, features,
    ),
    "DINOv3": (
        lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**WIDE, **EPS, num_register_tokens=4)),
        lambda: tiny_eva("dinov3", **DINOV3), tokens, features,
    ),
    "DINOv3 with a gated MLP": (
        lambda: transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**WIDE, **EPS, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu")
        ),
        lambda: tiny_eva("dinov3", **DINOV3, swiglu_mlp=True, swiglu_align_to=8), tokens, features,
    ),
    "SigLIP": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**WIDE, **EPS, hidden_act="gelu")),
        lambda: tiny_vit(**HEADLESS, class_token=False, global_pool="map"), pooled, feature,
    ),
    "CLIP": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**WIDE, **EPS, hidden_act="gelu")),
        lambda: tiny_vit(**HEADLESS, pre_norm=True), pooled, feature,
    ),
    "CLIP with QuickGELU": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**WIDE, **EPS)),
        lambda: tiny_vit(**HEADLESS, pre_norm=True, act_layer="quick_gelu"), pooled, feature,
    ),
}  # fmt: skip


ROUNDED = ("DINOv2 with registers and a gated MLP", "DINOv3", "DINOv3 with a gated MLP")
"""Whose class token and position are added, or whose rotations are computed, in float32."""


def written(original: Any, folder: Path) -> Path:
    """Random weights of a transformers model, in a file as it writes them."""
    shaken(original).save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize("kind", CASES)
def test_a_file_of_transformers_gives_the_features_of_transformers(tmp_path, kind):
    make_original, make_model, of_original, of_model = CASES[kind]
    original, model = make_original(), make_model()
    said = read(model, written(original, tmp_path))
    assert "transformers' " in said
    pixels = some_images(model, 3).double()
    with torch.no_grad():
        expected = of_original(original.double()(pixels))
        actual = of_model(model.double().eval(), pixels)
    assert expected.std() > 0.1
    assert torch.allclose(actual, expected, rtol=0, atol=1e-6 if kind in ROUNDED else 1e-12)


@pytest.mark.parametrize("kind", ["ViT", "DINOv2", "DINOv3"])
def test_the_names_that_transformers_has_in_memory_are_read_too(tmp_path, kind):
    make_original, make_model, of_original, of_model = CASES[kind]
    original, model = make_original(), make_model()
    names = load_file(written(original, tmp_path)).keys()
    assert names != original.state_dict().keys(), "nothing else would be tested"
    torch.save({"epoch": 3, "state_dict": original.state_dict()}, tmp_path / "w.pth")
    read(model, tmp_path / "w.pth")
    pixels = some_images(model)
    with torch.no_grad():
        assert torch.allclose(of_model(model.eval(), pixels), of_original(original(pixels)), rtol=0, atol=1e-4)


def test_a_tower_beside_others_is_read_and_the_rest_is_named(tmp_path):
    make_original, make_model, *_ = CASES["SigLIP"]
    original, alone, beside = make_original(), make_model(), make_model()
    read(alone, written(original, tmp_path))
    tower = {f"vision_model.{key}": value for key, value in load_file(tmp_path / "model.safetensors").items()}
    text = {"text_model.embeddings.weight": torch.ones(2), "logit_scale": torch.ones(1), "logit_bias": torch.ones(1)}
    save_file({**tower, **text}, tmp_path / "both.safetensors")
    said = read(beside, tmp_path / "both.safetensors")
    assert said == (
        "its tensors under 'vision_model.'; transformers' SigLIP or CLIP names; "
        "left out logit_bias (1), logit_scale (1), text_model (1)"
    )
    assert equal(alone.state_dict(), beside.state_dict())


def test_a_siglip_without_its_attention_pool_is_read_if_the_model_has_none(tmp_path):
    model = tiny_vit(**HEADLESS, class_token=False, global_pool="avg", fc_norm=False)
    assert read(model, written(CASES["SigLIP"][0](), tmp_path)).endswith("left out attn_pool (13)")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


OPENAI = {
    "embeddings.class_embedding": "class_embedding", "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.": "conv1.", "pre_layrnorm.": "ln_pre.", "post_layernorm.": "ln_post.",
    "encoder.layers.": "transformer.resblocks.", "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.",
    "self_attn.out_proj.": "attn.out_proj.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
}  # fmt: skip


def openai_names(clip: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, value in clip.items():
        key = name
        for theirs, openais in OPENAI.items():
            key = key.replace(theirs, openais)
        if match := re.fullmatch(r"(.*)self_attn\.q_proj\.(weight|bias)", key):
            parts = [clip[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            result[f"{match[1]}attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif "self_attn" not in key:
            result[key] = value
    return result


def test_a_clip_of_openai_or_open_clip_gives_its_features(tmp_path):
    make_original, make_model, of_original, of_model = CASES["CLIP"]
    original, model = make_original(), make_model()
    tower = openai_names(load_file(written(original, tmp_path)))
    text = {"positional_embedding": torch.ones(8, 48), "transformer.resblocks.0.ln_1.weight": torch.ones(48)}
    projection = torch.randn(48, 20)
    state = {f"visual.{key}": value for key, value in {**tower, "proj": projection}.items()} | text
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "name": "x"}, tmp_path / "w.pt")
    assert read(model, tmp_path / "w.pt") == (
        "its tensors under 'state_dict.module.visual.'; OpenAI's CLIP names; "
        "left out state_dict.module.positional_embedding (1), state_dict.module.transformer (1)"
    )
    pixels = some_images(model)
    with torch.no_grad():
        expected = of_original(original(pixels))
        assert torch.allclose(of_model(model.eval(), pixels), expected, rtol=0, atol=1e-4)
        assert torch.allclose(model(pixels), expected @ projection, rtol=0, atol=1e-3), "its projection is the head"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return shaken(timm.create_model("test_vit", num_classes=4)).state_dict()


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in tensors.items()}


def without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.startswith("head.")}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3},
        lambda state: {"state_dict": prefixed("module.backbone.", state), "arch": "vit"},
        lambda state: prefixed("_orig_mod.module.", state),
        lambda state: {"state_dict": prefixed("model.encoder.", state) | {"model.head.weight": torch.ones(3, 64)}},
        lambda state: {"model_state": {"net": state}, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"teacher": prefixed("backbone.", state), "student": prefixed("backbone.", zeros(state))},
        lambda state: {"model": zeros(state), "model_ema": prefixed("module.", state)},
        lambda state: {"state_dict": prefixed("net.", zeros(state)), "ema": {"shadow": state}},
        lambda state: {re.sub(r"blocks\.(\d)", r"blocks.0.\1", key): value for key, value in state.items()},
    ],
    ids=["model", "module.backbone", "compiled", "lightning", "net", "teacher", "model_ema", "ema", "chunks"],
)
def test_a_checkpoint_of_a_training_run_gives_its_network(tmp_path, state, wrap):
    torch.save(wrap(state), tmp_path / "w.pth")
    model = timm.create_model("test_vit", num_classes=0)
    read(model, tmp_path / "w.pth")
    assert equal(model.state_dict(), state)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: prefixed("a.", s) | prefixed("b.", s), r"it has several networks, under 'a\.', 'b\.'; save the"),
        (lambda s: prefixed("a.ema.", s) | prefixed("b.ema.", s), r"it has several networks, under 'a\.ema\.', 'b"),
        (lambda s: {k: v for k, v in s.items() if ".3.norm1" not in k}, r"it lacks 'blocks\.3\.norm1\.bias', 'bl"),
        (lambda s: s | {"blocks.0.ls1.gamma": torch.ones(64)}, r"the model has no 'blocks\.0\.ls1\.gamma'\. Name"),
        (lambda s: s | {"norm.weight": torch.ones(65)}, r"'norm\.weight' has shape \[65\], not \[64\]\. Name"),
        (lambda s: s | {"norm.weight": torch.ones(64, dtype=torch.int8)}, r"'norm\.weight' is quantised \(torch\.i"),
        (lambda s: s | {"blocks.0.0.norm1.weight": torch.ones(64)}, "several of its tensors would have one name"),
    ],
)  # fmt: skip
def test_tensors_that_are_ambiguous_too_many_or_too_few_are_refused_by_name(tmp_path, state, change, reason):
    save_file({key: value.clone() for key, value in change(state).items()}, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=rf"w\.safetensors' does not fit 'tiny': {reason}"):
        read(timm.create_model("test_vit", num_classes=0), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "CLIP with QuickGELU",
            {"pre_norm": True},
            "activation 'quick_gelu', the model GELU; name .* with 'quickgelu'",
        ),
        ("CLIP", {"pre_norm": True, "act_layer": "quick_gelu"}, "'gelu', the model QuickGELU; name .* without 'quick"),
        ("ViT", {"num_heads": 6}, "its config.json has 3 attention heads, the model 6"),
    ],
)
def test_what_only_the_config_beside_a_file_tells_is_compared(tmp_path, kind, options, message):
    path = written(CASES[kind][0](), tmp_path)
    with pytest.raises(BackboneError, match=message):
        read(tiny_vit(**HEADLESS, **options), path)
    (tmp_path / "config.json").unlink()
    read(tiny_vit(**HEADLESS, **options), path)


def test_two_tensors_of_transformers_that_would_be_one_are_refused(tmp_path):
    state = load_file(written(CASES["ViT"][0](), tmp_path)) | {"norm.weight": torch.ones(48)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"'(layer)?norm\.weight' and another tensor would both be 'norm\.weight'"):
        read(tiny_vit(**HEADLESS), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("biases", "model_has", "refusal"),
    [
        ("zero", False, None),
        ("any", False, "its queries and values have biases, which the model lacks"),
        ("keys", True, r"'blocks\.0\.attn\.k\.bias' is not zero, and keys have no bias in timm"),
    ],
)
def test_biases_of_a_dinov3_are_dropped_only_if_they_are_zero(tmp_path, biases, model_has, refusal):
    config = transformers.DINOv3ViTConfig(**WIDE, **EPS, num_register_tokens=4, key_bias=biases == "keys")
    original = shaken(transformers.DINOv3ViTModel(config))
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if biases == "zero" and name.endswith(("q_proj.bias", "v_proj.bias")):
                parameter.zero_()
    original.save_pretrained(tmp_path)
    model = tiny_eva("dinov3", num_classes=0, qkv_bias=model_has)
    if refusal is not None:
        with pytest.raises(BackboneError, match=refusal):
            read(model, tmp_path / "model.safetensors")
        return
    read(model, tmp_path / "model.safetensors")
    pixels = some_images(model)
    with torch.no_grad():
        expected = original(pixels).last_hidden_state
        assert torch.allclose(model.forward_features(pixels), expected, rtol=0, atol=1e-4)


def test_the_layer_scales_of_a_deit3_are_read_by_its_authors_names(tmp_path):
    model = shaken(tiny_vit(init_values=0.3, no_embed_class=True))
    state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    other = tiny_vit(**HEADLESS, seed=1, init_values=0.3, no_embed_class=True)
    assert read(other, tmp_path / "w.safetensors") == ""
    assert equal(other.state_dict(), model.state_dict())


def test_training_only_tensors_are_left_out_and_named(tmp_path, state):
    extra = {
        "mask_token": torch.zeros(1, 1, 64),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
        "head.0.bias": torch.ones(2),
    }
    save_file(without_head(state) | extra, tmp_path / "w.safetensors")
    model = timm.create_model("test_vit", num_classes=0)
    assert read(model, tmp_path / "w.safetensors") == "left out decoder_blocks (1), head (1)"
    assert equal(model.state_dict(), without_head(state))


def sharded(state: dict[str, Tensor], folder: Path) -> Path:
    half = len(state) // 2
    shards = {"model-1-of-2.safetensors": list(state)[:half], "model-2-of-2.safetensors": list(state)[half:]}
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / shard)
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def test_the_shards_of_an_index_are_read(tmp_path, state):
    model = timm.create_model("test_vit", num_classes=0)
    read(model, sharded(state, tmp_path))
    assert equal(model.state_dict(), state)


def test_an_index_with_a_missing_or_foreign_shard_is_refused(tmp_path, state):
    model = timm.create_model("test_vit", num_classes=0)
    (tmp_path / "a").mkdir()
    index = sharded(state, tmp_path / "a")
    text = index.read_text()
    index.write_text(text.replace("model-1", "../model-1"))
    with pytest.raises(
        BackboneError, match=r"its index names '\.\./model-1-of-2\.safetensors', which is not beside it"
    ):
        read(model, index)
    index.write_text(text.replace('"norm.weight"', '"norm.other"'))
    with pytest.raises(BackboneError, match=r"its shards lack 'norm\.other'"):
        read(model, index)
    index.write_text(text)
    (tmp_path / "a" / "model-2-of-2.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"index\.json' cannot be read: .*model-2-of-2\.safetensors"):
        read(model, index)


def test_a_file_of_another_architecture_is_refused_with_the_model_that_fits(tmp_path):
    small = timm.create_model("vit_small_patch32_224", num_classes=0)
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    tiny = tiny_vit(**HEADLESS, img_size=224, patch_size=32, embed_dim=192)
    with pytest.raises(
        BackboneError, match=r"Name the model that the file is of: by its shapes 'vit_small_patch32_224'"
    ):
        read(tiny, tmp_path / "w.safetensors")
    incomplete = {key: value for key, value in small.state_dict().items() if key != "norm.bias"}
    save_file(incomplete, tmp_path / "w.safetensors")
    with pytest.raises(
        BackboneError, match=r"it lacks 'norm\.bias'\. Its shapes are otherwise those of the model; the"
    ):
        load_weights(small, "vit_small_patch32_224.augreg", tmp_path / "w.safetensors", False)
    save_file({"layer1.0.conv1.weight": torch.ones(3, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match="Its tensors have neither timm's names nor any that Addenda converts"):
        read(tiny, tmp_path / "other.safetensors")
