"""A task that extends another: it attends to the other's tokens in every layer, and the other's logits never change.

There are many images to tell ten digits apart, but few that are labelled as even or odd. Whether extending the first
task helps the second depends on the data: `extends="auto"` would decide on the validation split. `fall_back=False`
keeps each task's token even if it is not better than the probe; a task without a token cannot be extended.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from addenda import CombinedModel, LearnConfig, Learner, Registry, load_backbone
from addenda.benchmarks.demo import DigitImages, digits

TEN = tuple(range(10))


def even_or_odd(test: bool, limit: int | None) -> DigitImages:
    """Digits labelled only as even or odd."""
    images = digits(TEN, test, limit=limit)
    return replace(images, targets=tuple(target % 2 for target in images.targets), classes=("even", "odd"))


backbone, config = load_backbone("glyphs"), LearnConfig(epochs=3, fall_back=False)
few, test = even_or_odd(test=False, limit=60), even_or_odd(test=True, limit=100)
images = torch.stack([backbone.transform(image) for image in test.images])

with Registry.open("extend.db") as registry:
    learner = Learner(backbone, registry)
    ten = learner.learn("ten", digits(TEN, test=False, limit=200), config=config)
    before = CombinedModel(backbone, [ten])(images)["ten"]

    for name, extends in {"parity": (), "parity-on-ten": ("ten",)}.items():
        task = learner.learn(name, few, test, replace(config, extends=extends))
        print(f"{task.ref} extends {task.extends}: {100 * task.metrics['test']['accuracy']:.1f} % test accuracy")

    after = CombinedModel(backbone, registry.load(backbone))(images)["ten"]
    print("ten:1 is extended by", *(child.ref for child in registry.lineage("ten").extended_by.kin))

print("ten:1's logits are", "bitwise identical" if torch.equal(before, after) else "DIFFERENT")
