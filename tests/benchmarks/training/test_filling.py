"""Filling the cache is compared with forward passes over as many views."""

from __future__ import annotations

from pathlib import Path

import pytest

from addenda import FrozenBackbone
from addenda.benchmarks.training.learning_cost import measure_filling
from addenda.learner import Augmentation
from addenda.learner.data import open_images
from tests.support.images import colour_folder


def test_filling_is_measured_over_every_view_relative_to_forward_passes(tiny: FrozenBackbone, tmp_path: Path) -> None:
    images = open_images(colour_folder(tmp_path / "colours", per_class=3))
    filling = measure_filling(tiny, images, Augmentation(views=2), rounds=1)
    assert filling["num_images"] == 27
    assert filling["ratios"] == [pytest.approx(filling["pass_images_per_s"] / filling["images_per_s"])]
