"""Weights from files and from the package: files that do not fit are refused, and nothing in them is executed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from addenda.backbones import FrozenBackbone, load_backbone
from addenda.exceptions import BackboneError
from tests.support.tiny import shaken, some_images


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


@pytest.mark.parametrize(
    "names", [{}, {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3", "mlp.norm": "mlp.ffn_ln"}],
    ids=["timm", "the authors"],
)  # fmt: skip
def test_a_file_of_an_evas_weights_is_read_by_timms_names_and_by_its_authors(tmp_path, names):
    model = shaken(timm.create_model("eva02_tiny_patch14_224", num_classes=4))
    state = model.state_dict()
    for ours, theirs in names.items():
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    assert (state.keys() == model.state_dict().keys()) == (not names)
    save_file(state, tmp_path / "eva.safetensors")
    loaded = load_backbone("eva02_tiny_patch14_224", tmp_path / "eva.safetensors", device="cpu")
    images = some_images(model)
    assert loaded.backbone_logits(images).numpy().tobytes() == model.eval()(images).detach().numpy().tobytes()


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
    """Pickles to a call that creates a folder, which would reveal that it was unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickled_object_is_refused_and_never_executed(tmp_path, weights):
    torch.save({**weights, "extra": Bomb(tmp_path / "boom")}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"w\.pth' cannot be read: .*torch checkpoint that contains only tensors"):
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
def test_a_checkpoint_with_other_content_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"Weights file '.*w\.pth' (cannot be read|does not fit)"):
        load_backbone("test_vit", tmp_path / "w.pth", device="cpu")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.npz"])
@pytest.mark.parametrize("data", [b"", b"hello", b"\x00" * 64], ids=["empty", "text", "zeros"])
def test_a_file_that_is_not_a_weights_file_is_refused(tmp_path, name, data):
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
        ({"mean": (0.5, 0.5)}, "mean takes one number, or three for the channels; got 2."),
        ({"std": (0.5,) * 4}, "std takes one number, or three for the channels; got 4."),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive; got (0.5, 0.0, 0.5)."),
        ({"std": (0.5, -1.0, 0.5)}, "std must be positive"),
        ({"std": (0.5, float("nan"), 0.5)}, "std "),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean "),
    ],
)
def test_an_invalid_argument_is_refused(options, message):
    with pytest.raises(BackboneError) as refusal:
        load_backbone("glyphs", **{"device": "cpu", **options})
    assert str(refusal.value).startswith(message)


def test_glyphs_is_embedded_and_has_one_fingerprint(glyphs):
    assert (glyphs.depth, glyphs.embed_dim, glyphs.num_heads, glyphs.num_tokens) == (5, 128, 4, 65)
    assert glyphs.source == "embedded"
    assert load_backbone("glyphs", device="cpu", precision="bfloat16").fingerprint == glyphs.fingerprint


def test_glyphs_does_not_crop_32_px_images(glyphs):
    assert glyphs.preprocessing["input_size"] == [3, 32, 32]
    assert glyphs.preprocessing["crop_pct"] == 1.0
    assert glyphs.transform(Image.new("RGB", (32, 32), "white")).unique().tolist() == [1.0]


def test_glyphs_takes_another_mean_and_std(glyphs):
    other = load_backbone("glyphs", device="cpu", mean=(0.4,) * 3, std=(0.3,) * 3)
    assert other.preprocessing["mean"] == [0.4] * 3
    assert other.fingerprint != glyphs.fingerprint


def test_one_number_is_the_mean_or_std_of_every_channel():
    preprocessing = load_backbone("glyphs", mean=0.5, std=0.25, device="cpu").preprocessing
    assert (preprocessing["mean"], preprocessing["std"]) == ([0.5] * 3, [0.25] * 3)


def test_glyphs_takes_no_weights(tmp_path):
    with pytest.raises(BackboneError, match="'glyphs' includes its weights"):
        load_backbone("glyphs", tmp_path / "w.safetensors", device="cpu")
