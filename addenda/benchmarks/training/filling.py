"""What filling the activation cache from files costs beside the frozen pass over the same views in memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass

from addenda.backbones import FrozenBackbone
from addenda.combined import forward_pass, micro_batch, prove
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.activations import Activations
from addenda.learner.data import LabelledImages

VIEWS = Augmentation(views=3)


@dataclass(frozen=True)
class Filling:
    """One row of `addenda bench training`.

    Attributes:
        num_images: images and views of them that pass the backbone.
        images_per_s: of these, while the cache is filled from files.
        pass_images_per_s: while the backbone alone passes over as many that lie in memory.
        ratios: of the two times, filling by the pass, for each round; 1 where the pass hides all reading.
    """

    num_images: int
    images_per_s: float
    pass_images_per_s: float
    ratios: tuple[float, ...]


def measure_filling(
    backbone: FrozenBackbone, images: LabelledImages, how: Augmentation = VIEWS, rounds: int = 3
) -> Filling:
    """Fills a new cache and runs the frozen pass alone, one after the other in each round.

    Args:
        backbone: the frozen backbone.
        images: image files; they are hashed before anything is timed, as every run does it.
        how: which views are made of each.
        rounds: measured rounds.
    """
    prove(backbone, [])
    images, num_views = images.hashed(), 1 + how.num_views
    pixels = images.read_all(backbone)
    fill_s, pass_s = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            Activations(backbone, images, how, ActivationCache(folder))
            fill_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(num_views):
            found = forward_pass(backbone, pixels, sizes=(micro_batch(backbone.device),), pooled=True)
            assert found.pooled is not None
            found.pooled.cpu()
        pass_s.append(time.perf_counter() - start)
    count = len(images) * num_views
    return Filling(
        count,
        count / statistics.median(fill_s),
        count / statistics.median(pass_s),
        tuple(fill / alone for fill, alone in zip(fill_s, pass_s, strict=True)),
    )
