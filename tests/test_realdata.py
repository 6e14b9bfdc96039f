"""Tests with the ImageNet ViT-Ti and real images, if they are next to the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from addenda import CombinedModel, LearnConfig, Learner, Registry, load_backbone
from addenda.learner.data import open_images
from tests.support.places import SHARED

pytestmark = pytest.mark.realdata

WEIGHTS = SHARED / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"


def subset(name: str, folder: Path, per_class: int, part: str) -> Path:
    """Creates a folder of links to the first images of each class."""
    for place in sorted((SHARED / "images" / name / part).iterdir()):
        (folder / part / place.name).mkdir(parents=True)
        for image in sorted(place.iterdir())[:per_class]:
            (folder / part / place.name / image.name).symlink_to(image)
    return folder


def test_two_real_tasks_are_learned_kept_and_answered_bit_for_bit(tmp_path: Path) -> None:
    backbone = load_backbone("vit_tiny_patch16_224", WEIGHTS, mean=(0.5,) * 3, std=(0.5,) * 3, device="cpu")
    config = LearnConfig(optimizer="sgd", epochs=3, learning_rate=(0.3,), fall_back=False)
    with Registry.open(tmp_path / "tasks.db") as registry:
        learner = Learner(backbone, registry)
        for name in ("pacs_sketch", "mnist"):
            folder = tmp_path / name
            subset(name, folder, 12, "train")
            subset(name, folder, 4, "test")
        first = learner.learn("pacs_sketch", tmp_path / "pacs_sketch", config=config)
        images = open_images(tmp_path / "pacs_sketch" / "test")
        pixels = torch.stack([images.read(i, backbone) for i in range(len(images))])
        alone = CombinedModel(backbone, [first])(pixels)["pacs_sketch"]
        second = learner.learn("mnist", tmp_path / "mnist", config=config)
        model = CombinedModel(backbone, registry.load(backbone))
        assert torch.equal(model(pixels)["pacs_sketch"], alone)
        micro = pixels[: model.micro_batch]
        assert torch.equal(model.backbone_logits(micro), backbone.model(micro))
    assert first.metrics["test"]["accuracy"] > 0.5
    assert second.metrics["test"]["accuracy"] > 0.6
