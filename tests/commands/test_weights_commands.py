"""A backbone at another input size, from a training run's checkpoint: described once, in `learn`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from addenda import Registry
from addenda.combined import recorded_backbone
from tests.support.commands import Run
from tests.support.servers import client_of
from tests.support.tiny import shaken

ASKED = ("--backbone", "test_vit", "--img-size", "96")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a model for 160 pixels, as a training run on several GPUs saves it."""
    state = shaken(timm.create_model("test_vit", num_classes=4)).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "run.pth")
    return tmp_path / "run.pth"


@pytest.mark.slow
def test_every_command_uses_the_size_that_was_learned_with(run: Run, checkpoint: Path, digits_folder: Path) -> None:
    quick = ("--epochs", "1", "--lr", "0.01", "--memory", "0", "--views", "0")
    made = run("learn", "ones", digits_folder, *ASKED, "--weights", checkpoint, *quick, "--adapter-rank", "4")
    assert made.code == 0, made.err
    said = "its tensors under 'state_dict.module.'; position embeddings resampled from 160 x 160 to 96 x 96 pixels."
    assert f"Weights of test_vit: {said}" in made.err
    image = next(digits_folder.glob("test/*/*.png"))
    verified = run("verify", "--json")
    assert (verified.code, "identical" in verified.out) == (0, True), verified.out + verified.err
    predicted = run("predict", image, "--json")
    assert predicted.code == 0, predicted.err
    exported = run("export-model", "--out", checkpoint.parent / "all.pt2")
    assert exported.code == 0, exported.err
    with Registry.open(checkpoint.parent / "tasks.db") as registry:
        backbone = recorded_backbone(registry, None, "cpu")
        assert [record["preprocessing"]["input_size"] for record in registry.backbones()] == [[3, 96, 96]]
        with client_of(backbone, registry) as client:
            served = client.post("/api/v1/predict", content=image.read_bytes()).json()
    assert served["tasks"]["ones"]["labels"] == json.loads(predicted.out)["images"][str(image)]["ones"]


@pytest.mark.slow
def test_a_size_without_a_backbone_is_refused_beside_a_registered_one(
    run: Run, checkpoint: Path, digits_folder: Path
) -> None:
    made = run("learn", "ones", digits_folder, *ASKED, "--weights", checkpoint, "--head-only", "--views", "0")
    assert made.code == 0, made.err
    refused = run("learn", "more", digits_folder, "--img-size", "160")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--img-size would define a backbone other than the registry's. Name it with --backbone." in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--img-size", "161"), "Input size 161 does not fit 'test_vit': it must be a multiple of its patch size 16"),
        ((), "--img-size 192 takes the file's size, --img-size 160 resamples its position embeddings"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    torch.save(timm.create_model("test_vit", img_size=192).state_dict(), tmp_path / "w.pth")
    result = run("backbones", "show", "test_vit", "--weights", tmp_path / "w.pth", *arguments)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err


def test_backbones_show_has_the_size_and_the_conversion(run: Run, checkpoint: Path) -> None:
    shown = run("backbones", "show", "test_vit", "--weights", checkpoint, "--img-size", "96", "--json")
    assert json.loads(shown.out)["preprocessing"]["input_size"] == [3, 96, 96]
    assert shown.err.startswith("Weights of test_vit: its tensors under 'state_dict.module.'; position embeddings")
