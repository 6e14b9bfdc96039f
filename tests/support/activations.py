"""Activations of a small folder, as training reads them."""

from __future__ import annotations

from pathlib import Path

import torch

from addenda import FrozenBackbone
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.activations import Activations
from addenda.learner.data import open_images

ROW_GB = (2 * 2 * 3 * 17 * 48 + 4 * 48 * (1 + 3 * 2)) / 1e9
"""Size of one image's row on `tiny`: keys and values of 17 tokens of 48 dimensions in 3 layers, and its features."""
FILES = ["key_values.npy", "features.npy", "digests.npy", "keys.npy", "meta.json"]


def activations(
    backbone: FrozenBackbone,
    folder: Path,
    cache: ActivationCache,
    augmentation: Augmentation | None = None,
    **options: object,
) -> Activations:
    return Activations(backbone, open_images(folder), augmentation or Augmentation(), cache, **options)


def fetched(activations: Activations, views: int = 0) -> torch.Tensor:
    """All values that training would read of every image in one view."""
    batch = activations.batch(torch.arange(len(activations)), views)
    return torch.cat(
        [batch.fetch(layer, which, chunk).flatten() for layer in range(3) for which in (0, 1) for chunk in batch.chunks]
        + [batch.pooled.flatten()]
    )
