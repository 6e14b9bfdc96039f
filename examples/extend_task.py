"""A task that extends another sees its token and memory in every layer; the one that is seen never notices.

Many digits are there to tell all ten apart, and only a few that somebody has marked as even or odd.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from addenda import CombinedModel, LearnConfig, Learner, Registry, load_backbone
from addenda.benchmarks.digits import Digits, digits

TEN = tuple(range(10))


def even_or_odd(test: bool, limit: int | None) -> Digits:
    """Digits, of which only this is told."""
    drawn = digits(TEN, test, limit=limit)
    return replace(drawn, targets=tuple(target % 2 for target in drawn.targets), classes=("even", "odd"))


backbone = load_backbone("glyphs")
few, test = even_or_odd(test=False, limit=60), even_or_odd(test=True, limit=None)
images = torch.stack([backbone.transform(image) for image in test.images])

with Registry.open("extend.db") as registry:
    learner = Learner(backbone, registry)
    ten = learner.learn("ten", digits(TEN, test=False, limit=500), config=LearnConfig(epochs=8))
    before = CombinedModel(backbone, [ten])(images)["ten"]

    learner.learn("parity", few, test, LearnConfig(epochs=8))
    extending = learner.learn("parity-on-ten", few, test, LearnConfig(epochs=8, extends=("ten",)))

    after = CombinedModel(backbone, registry.load(backbone))(images)["ten"]
    for record in registry.tasks():
        if "test" in record.metrics:
            print(
                f"{record.ref}: {100 * record.metrics['test']['accuracy']:.1f} % even or odd; extends {record.extends}"
            )
    print("Seen by", *(kin.ref for kin in registry.lineage("ten").extended_by.kin))

print(f"{extending.extends[0]} gives", "the same bits as before" if torch.equal(before, after) else "OTHER LOGITS")
