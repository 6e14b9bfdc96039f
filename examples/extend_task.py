"""A task that extends another sees its token and memory in every layer; the one that is seen never notices.

Many digits are there to tell all ten apart, and only a few that somebody has marked as even or odd. Whether sight of
the first task helps the second is for data to say: `extends="auto"` takes only what validation says pays. Whether a
token does beside the probe too: here `fall_back=False` keeps it in any case, since without one there is none to see.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from addenda import CombinedModel, LearnConfig, Learner, Registry, load_backbone
from addenda.benchmarks.demo import DigitImages, digits

TEN = tuple(range(10))


def even_or_odd(test: bool, limit: int | None) -> DigitImages:
    """Digits, of which only this is told."""
    drawn = digits(TEN, test, limit=limit)
    return replace(drawn, targets=tuple(target % 2 for target in drawn.targets), classes=("even", "odd"))


backbone, config = load_backbone("glyphs"), LearnConfig(epochs=3, fall_back=False)
few, test = even_or_odd(test=False, limit=60), even_or_odd(test=True, limit=100)
images = torch.stack([backbone.transform(image) for image in test.images])

with Registry.open("extend.db") as registry:
    learner = Learner(backbone, registry)
    ten = learner.learn("ten", digits(TEN, test=False, limit=200), config=config)
    before = CombinedModel(backbone, [ten])(images)["ten"]

    for name, extends in {"parity": (), "parity-on-ten": ("ten",)}.items():
        task = learner.learn(name, few, test, replace(config, extends=extends))
        print(f"{task.ref} extends {task.extends}: {100 * task.metrics['test']['accuracy']:.1f} % even or odd")

    after = CombinedModel(backbone, registry.load(backbone))(images)["ten"]
    print("ten:1 is seen by", *(kin.ref for kin in registry.lineage("ten").extended_by.kin))

print("ten:1 gives", "the same bits as before" if torch.equal(before, after) else "OTHER LOGITS")
