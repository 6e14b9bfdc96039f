"""A learner on the tiny backbone, and a folder of two classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from addenda import FrozenBackbone, Learner, Registry
from tests.support.images import colour_folder
from tests.support.messy import TWO


@pytest.fixture
def learner(tiny: FrozenBackbone, registry: Registry) -> Learner:
    return Learner(tiny, registry)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colour_folder(tmp_path / "images", per_class=4, classes=TWO)
