"""Merges the registries of two teams that learned tasks on the same backbone.

Both have a task `marks`: nothing is merged until the conflict is resolved, and then no task's logits change by a bit.
"""

from __future__ import annotations

import torch

from addenda import CombinedModel, LearnConfig, Learner, Registry, load_backbone
from addenda.benchmarks.demo import digits
from addenda.exceptions import RegistryError

TEAMS = {"north": {"early": (0, 1), "marks": (2, 3)}, "south": {"late": (8, 9), "marks": (6, 7)}}
RENAMES = {"marks": "marks-south"}

backbone = load_backbone("glyphs")
images = torch.stack([backbone.transform(image) for image in digits(tuple(range(10)), test=True, limit=8).images])

with Registry.open("north.db", user="north") as north, Registry.open("south.db", user="south") as south:
    for registry, tasks in zip((north, south), TEAMS.values(), strict=True):
        learner = Learner(backbone, registry)
        for name, pair in tasks.items():
            learner.learn(name, digits(pair, test=False, limit=60), config=LearnConfig(epochs=2))
    before = CombinedModel(backbone, south.load(backbone))(images)

    try:
        north.merge(south)
    except RegistryError as error:
        print(f"Not merged: {error}")
    for received in north.merge(south, RENAMES):
        print(f"south's {received.origin} is {received.ref} here: {received.state}")

    after = CombinedModel(backbone, north.load(backbone))(images)
    learned_by = {record.ref: record.created_by for record in north.tasks()}

for name, logits in before.items():
    name_here = RENAMES.get(name, name)
    result = "logits bitwise identical" if torch.equal(logits, after[name_here]) else "LOGITS CHANGED"
    print(f"{name_here}, learned by {learned_by[f'{name_here}:1']}: {result}")
