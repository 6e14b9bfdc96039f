"""Weights from files and from the package: files that do not fit are refused, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from addenda.backbones import FrozenBackbone, load_backbone
from addenda.backbones.weights import load_weights
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


def test_relative_positions_that_timm_would_resample_are_refused(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    model = timm.create_model(name, img_size=128, window_size=4, num_classes=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"relative_position_bias_table' has shape \[49, 3\], not \[169, 3\]"):
        load_backbone(name, tmp_path / "w.safetensors", device="cpu")


def test_the_refusal_of_another_input_size_names_both_remedies(tmp_path):
    save_file(timm.create_model("test_vit", img_size=192).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BackboneError) as refusal:
        load_backbone("test_vit", tmp_path / "w.safetensors", device="cpu")
    assert str(refusal.value).endswith(
        "its input size is 192, the model's 160; --img-size 192 takes the file's size, --img-size 160 resamples its "
        "position embeddings (in Python: img_size=...)."
    )


@pytest.mark.parametrize("img_size", [96, 160, 192, (96, 160)])
def test_position_embeddings_are_resampled_as_timm_does(tmp_path, weights, img_size):
    save_file(weights, tmp_path / "w.safetensors")
    backbone = load_backbone("test_vit", tmp_path / "w.safetensors", device="cpu", img_size=img_size)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    model = timm.create_model(
        "test_vit", img_size=img_size, num_classes=4, pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "w.safetensors"), "num_classes": 4},
    )  # fmt: skip
    expected = FrozenBackbone(model, "test_vit", "hub")
    assert backbone.preprocessing["input_size"] == [3, height, width]
    assert backbone.grid_size == (height // 16, width // 16)
    assert backbone.fingerprint == expected.fingerprint
    images = some_images(model)
    assert torch.equal(backbone.backbone_logits(images), expected.backbone_logits(images))
    assert backbone.transform(Image.new("RGB", (300, 200))).shape == (3, height, width)
    assert backbone.conversion == (
        "" if img_size == 160 else f"position embeddings resampled from 160 x 160 to {height} x {width} pixels"
    )


def test_dinov2_of_518_pixels_is_loaded_at_224(tmp_path):
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, depth=1)
    authors = {key: value for key, value in model.state_dict().items() if key != "reg_token"}
    authors |= {"register_tokens": model.reg_token.detach(), "mask_token": torch.zeros(1, 384)}
    authors["pos_embed"] = torch.cat([torch.ones(1, 1, 384), model.pos_embed.detach()], dim=1)
    tiny = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, depth=1, img_size=224)
    save_file(authors, tmp_path / "w.safetensors")
    said = load_weights(tiny, "dinov2", tmp_path / "w.safetensors", resample=True)
    assert said == "position embeddings resampled from 518 x 518 to 224 x 224 pixels"
    assert torch.equal(tiny.cls_token, model.cls_token + 1), "DINOv2's class token has a position, timm's has none"
    backbone = FrozenBackbone(tiny, "dinov2", "file")
    assert (backbone.num_tokens, backbone.preprocessing["input_size"]) == (5 + 16 * 16, [3, 224, 224])


@pytest.mark.parametrize(
    ("img_size", "message"),
    [
        (161, "Input size 161 does not fit 'test_vit': it must be a multiple of its patch size 16, such as 160."),
        (0, "Input size 0 does not fit 'test_vit': it must be a multiple of its patch size 16, such as 16."),
        (-16, "Input size -16 does not fit 'test_vit': it must be a multiple of its patch size 16, such as 16."),
        (
            (160, 170),
            "Input size 170 does not fit 'test_vit': it must be a multiple of its patch size 16, such as 176.",
        ),
        ((160,), "Input size (160,) must be one number, or height and width."),
        ((160, 160, 3), "Input size (160, 160, 3) must be one number, or height and width."),
    ],
)
def test_an_input_size_that_patches_do_not_divide_is_refused(tmp_path, weights, img_size, message):
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError) as refusal:
        load_backbone("test_vit", tmp_path / "w.safetensors", device="cpu", img_size=img_size)
    assert str(refusal.value) == message


def test_glyphs_takes_another_input_size(glyphs):
    other = load_backbone("glyphs", device="cpu", img_size=48)
    assert other.preprocessing["input_size"] == [3, 48, 48]
    assert other.num_tokens == 1 + 12 * 12
    assert other.fingerprint != glyphs.fingerprint
    assert load_backbone("glyphs", device="cpu", img_size=32).fingerprint == glyphs.fingerprint


def saved_folder(folder: Path, weights: dict[str, Tensor], **config: object) -> Path:
    """A folder as timm's save_for_hf writes it."""
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    about = timm.get_pretrained_cfg("test_vit").to_dict() | config.pop("pretrained_cfg", {})
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit", "pretrained_cfg": about, **config}))
    return folder


def test_a_folder_of_timm_is_loaded_by_name_and_again_from_its_record(tmp_path, weights, monkeypatch):
    folder = saved_folder(tmp_path / "mine", weights, pretrained_cfg={"mean": [0.1, 0.2, 0.3], "crop_pct": 0.5})
    monkeypatch.chdir(tmp_path)
    backbone = load_backbone("local-dir:mine", device="cpu")
    assert (backbone.name, backbone.source) == (f"local-dir:{folder}", str(folder))
    assert (backbone.preprocessing["mean"], backbone.preprocessing["crop_pct"]) == ([0.1, 0.2, 0.3], 0.5)
    monkeypatch.chdir("/")
    assert load_backbone(backbone.name, backbone.source, device="cpu").fingerprint == backbone.fingerprint
    folder.rename(tmp_path / "moved")
    assert load_backbone(backbone.name, tmp_path / "moved", device="cpu").fingerprint == backbone.fingerprint


def test_the_settings_in_a_folders_config_make_its_model(tmp_path):
    model = shaken(timm.create_model("test_vit", num_classes=0, img_size=96, depth=2))
    folder = saved_folder(tmp_path / "mine", model.state_dict(), model_args={"img_size": 96, "depth": 2})
    backbone = load_backbone(f"local-dir:{folder}", device="cpu")
    assert (backbone.depth, backbone.preprocessing["input_size"]) == (2, [3, 96, 96])
    assert torch.equal(backbone.backbone_logits(some_images(model)), model(some_images(model)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"timm cannot read the model of 'local-dir:.*mine' \(FileNotFoundError: .*config\.json must be timm's"),
        ('{"model_type": "dinov2"}', r"local-dir:.*mine' \(KeyError: 'architecture'\).*name the timm model, and pass"),
        ('{"architecture": "nonsense"}', r"local-dir:.*mine' \(RuntimeError: Unknown model \(nonsense\)\)"),
        ("[", r"local-dir:.*mine' \(JSONDecodeError: "),
        ('{"architecture": "resnet18"}', r"model\.safetensors' does not fit 'local-dir:.*mine': it lacks 'bn1\.bias'"),
    ],
)
def test_a_folder_that_is_not_timms_is_refused(tmp_path, weights, config, message):
    folder = saved_folder(tmp_path / "mine", weights)
    (folder / "config.json").unlink() if config is None else (folder / "config.json").write_text(config)
    with pytest.raises(BackboneError, match=message):
        load_backbone(f"local-dir:{folder}", device="cpu")


def test_a_name_on_the_hub_is_resolved_by_timm(tmp_path, weights, monkeypatch):
    folder = saved_folder(tmp_path / "cached", weights, num_classes=4)
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments: [])  # as with a network
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **options: str(folder / filename))
    backbone = load_backbone("hf-hub:someone/model@main", device="cpu")
    assert (backbone.name, backbone.source) == ("hf-hub:someone/model@main", "hub")
    save_file(weights, tmp_path / "w.safetensors")
    assert backbone.fingerprint == load_backbone("test_vit", tmp_path / "w.safetensors", device="cpu").fingerprint


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "ftp:someone/model", "local-dir:", "hf-hub:"])
def test_a_source_that_cannot_be_reached_or_is_unknown_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackboneError, match=f"timm cannot read the model of '{name}.*' "):
        load_backbone(name, device="cpu")


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
    with pytest.raises(BackboneError, match=r"Folder '.*' has no weights file; it must hold one of 'model\.safeten"):
        load_backbone("test_vit", tmp_path, device="cpu")


def test_an_unknown_tag_is_refused_by_name(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    for path in (tmp_path / "w.safetensors", None):
        with pytest.raises(BackboneError, match=r"'test_vit\.nonsense'"):
            load_backbone("test_vit.nonsense", path, device="cpu")


def test_pretrained_weights_that_are_not_cached_offline_ask_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments: [])
    with pytest.raises(BackboneError, match=r"No weights for 'test_vit': .*--weights FILE\.safetensors") as refusal:
        load_backbone("test_vit", device="cpu")
    assert "LocalEntryNotFoundError" in str(refusal.value)


def test_without_a_network_the_hub_is_not_asked_at_all(tmp_path, monkeypatch):
    """Its client would try for a minute."""

    def no_network(*arguments: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    create = timm.create_model

    def on_meta(*arguments: object, **options: object) -> object:
        assert not options.get("pretrained"), "asked"
        return create(*arguments, **options)

    monkeypatch.setattr("timm.create_model", on_meta)
    with pytest.raises(BackboneError, match=r"No weights for 'test_vit': .*gaierror.*--weights FILE\.safetensors"):
        load_backbone("test_vit", device="cpu")


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
        ({"crop_pct": 1.5}, "crop_pct must be above 0 and at most 1; got 1.5."),
        ({"crop_pct": 0.0}, "crop_pct must be above 0"),
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
