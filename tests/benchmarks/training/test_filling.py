"""Filling is measured beside the frozen pass, over as many views."""

from __future__ import annotations

from pathlib import Path

import pytest

from addenda import FrozenBackbone
from addenda.benchmarks.training.learning_cost import measure_filling
from addenda.learner import Augmentation
from addenda.learner.data import open_images
from tests.support.images import colour_folder


def test_filling_is_measured_over_every_view_beside_the_pass_alone(tiny: FrozenBackbone, tmp_path: Path) -> None:
    images = open_images(colour_folder(tmp_path / "colours", per_class=3))
    found = measure_filling(tiny, images, Augmentation(views=2), rounds=1)
    assert found["num_images"] == 27
    assert found["ratios"] == [pytest.approx(found["pass_images_per_s"] / found["images_per_s"])]
