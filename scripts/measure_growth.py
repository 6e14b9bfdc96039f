"""Measures tasks that grow beside tasks learned at once; prints the table of docs/results.md.

    python scripts/measure_growth.py IMAGES --weights vit_tiny.safetensors --steps mnist:2,trash:1,textures:2

IMAGES has train/ and test/ of class folders for each dataset. A step adds that many classes, in sorted order. Only the
first run computes activations, which are cached.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from addenda import LearnConfig, load_backbone
from addenda.combined import feature_statistics
from addenda.combined.routing.statistics import added
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.activations import Activations
from addenda.learner.closed_form import closed_form
from addenda.learner.context import QUIET
from addenda.learner.data import LabelledImages, open_images
from addenda.learner.learning_run import LearningRun
from addenda.learner.probes import LinearHead
from addenda.registry import FeatureStatistics


def drawn(images: LabelledImages, limit: int, seed: int) -> LabelledImages:
    """At most `limit` images of each class."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=random, dtype=torch.int64, device="cpu")
    rows = [order[images.targets[order] == label][:limit] for label in range(len(images.labels))]
    return images.select(torch.cat(rows).sort().values.tolist())


def statistics_of(activations: Activations, first: int, last: int) -> FeatureStatistics:
    """Statistics of the images of classes `first` to `last`, exclusive, as a task that grows to `last` classes sums."""
    rows = ((activations.targets >= first) & (activations.targets < last)).nonzero()[:, 0]
    digests = [activations.digests[row] for row in rows.tolist()]
    pooled, layers = activations.pooled[rows], activations.layers[0, rows]
    return feature_statistics(pooled, activations.targets[rows], last, layers, digests)


def main() -> None:
    """Prints the test accuracy of each way to learn all classes of each dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--steps", default="mnist:2,trash:1,textures:2")
    parser.add_argument("--per-class", default="30,60", help="images of each class, at most")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    backbone = load_backbone("vit_tiny_patch16_224", weights=given.weights, mean=(0.5,) * 3, std=(0.5,) * 3)
    cache, config = ActivationCache(), LearnConfig(head_only=True)
    print("| dataset | images | at once: learn | at once: closed form | grown | new classes alone |")
    print("|---|---|---|---|---|---|")
    for name, step in (part.split(":") for part in given.steps.split(",")):
        train, test = (open_images(given.images / name / split, split).hashed() for split in ("train", "test"))
        tested = Activations(backbone, test, Augmentation(views=0), cache, tokens=False)
        for limit in map(int, given.per_class.split(",")):
            scores = []
            for seed in range(given.seeds):
                images = drawn(train, limit, seed)
                activations = Activations(backbone, images, Augmentation(views=3), cache, tokens=False)
                run = LearningRun(name, activations, replace(config, seed=seed), QUIET)
                count, step_size = len(images.labels), int(step)
                ends = [*range(max(2, step_size), count, step_size), count]
                grown = statistics_of(activations, 0, ends[0])
                for first, last in pairwise(ends):
                    newest = statistics_of(activations, first, last)
                    grown = added(grown, newest)
                probe = run.baselines[-1]
                assert probe.layer_weight is not None
                tensors = (probe.head_bias, probe.head_weight, probe.layer_weight)
                heads = [LinearHead(*(tensor.double() for tensor in tensors))]
                heads += [closed_form(each).head for each in (statistics_of(activations, 0, count), grown, newest)]
                logits = [head(tested.pooled, tested.layers[0]) for head in heads]
                logits[-1][:, : ends[-2]] = -torch.inf
                scores.append([100 * tested.objective.accuracy(each, tested.targets) for each in logits])
            table = torch.tensor(scores, dtype=torch.float64, device="cpu")
            spread = table.std(0) if given.seeds > 1 else torch.zeros_like(table[0])
            cells = [f"{mean:.1f} ± {each:.1f}" for mean, each in zip(table.mean(0), spread, strict=True)]
            print(f"| {name}, {step} at a time | {len(images)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
