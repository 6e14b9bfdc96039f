"""Draws the README's picture from what the package computes: five tasks' answers to five digits, from one pass each.

Learns the five tasks of `addenda demo` one after another on the backbone `glyphs`, then draws for one image of each
pair where each task's token looked (its attention over the patches in the last layer) and what it answered; a frame
marks the task that the router chose. Needs `pip install 'addenda[bench]'`; takes under a minute.

    python scripts/draw_answers.py docs/images/answers.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
import torch

from addenda import CombinedModel, FrozenBackbone, LearnConfig, Learner, Registry, load_backbone
from addenda.benchmarks.digits import PAIRS, digits
from addenda.combined import Router, attention_map, predictions

mpl.use("Agg")
from matplotlib import pyplot as plt

NUMBER = 3  # which of each pair's test images: one that is neither the first nor chosen by its answer


def main(path: Path, epochs: int = 6) -> None:
    """Learns the tasks and writes the picture."""
    torch.set_num_threads(1)
    backbone = load_backbone("glyphs", device="cpu")
    with TemporaryDirectory() as folder, Registry.open(f"{folder}/tasks.db") as registry:
        learner = Learner(backbone, registry)
        for a, b in PAIRS:
            config = LearnConfig(epochs=epochs, fall_back=False)
            learner.learn(f"digits-{a}{b}", digits((a, b), test=False, limit=160), config=config)
        model = CombinedModel(backbone, registry.load(backbone))
        kept = {name: registry.statistics(task.ref) for name, task in model.tasks.items()}
    draw(path, backbone, model, Router({name: known for name, known in kept.items() if known is not None}))


def draw(path: Path, backbone: FrozenBackbone, model: CombinedModel, router: Router) -> None:
    """One row for each image, one column for each task."""
    shown = [digits(pair, test=True).images[NUMBER] for pair in PAIRS]
    images = torch.stack([backbone.transform(image) for image in shown])
    answers = model(images, pooled=True)
    assert answers.pooled is not None
    choices = router.choose(answers.pooled)
    figure, axes = plt.subplots(len(shown), 1 + len(model.tasks), figsize=(9, 7.6), layout="constrained")
    for row, (image, choice) in enumerate(zip(shown, choices, strict=True)):
        axes[row, 0].imshow(image, cmap="gray")
        for column, (name, task) in enumerate(model.tasks.items(), start=1):
            axis = axes[row, column]
            looked = attention_map(backbone, task, images)[row]
            ((label, probability),) = predictions(task, answers[name][row : row + 1], top=1)[0]
            axis.imshow(looked, cmap="magma")
            chosen = name == choice.task
            axis.set_xlabel(f"{label}, {100 * probability:.0f} %", weight="bold" if chosen else "normal")
            for spine in axis.spines.values():
                spine.set(color="#2a9d5c" if chosen else "#cccccc", linewidth=4 if chosen else 1)
            if row == 0:
                axis.set_title(name)
    axes[0, 0].set_title("image")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
