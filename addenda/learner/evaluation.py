"""Evaluating tasks on labelled images, in one forward pass per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined import CombinedModel, tensor_digest
from addenda.learner.context import RunContext
from addenda.learner.data import LabelledImages
from addenda.learner.data.labelled import Item, read_in_batches
from addenda.learner.objectives import OBJECTIVES
from addenda.registry import Task
from addenda.text import shown

BY_CONTENT = "2:"
"""Prefix of a digest of logits ordered by image content; version 0.1 ordered them by file."""


def check_readable(
    backbone: FrozenBackbone, images: LabelledImages, context: RunContext
) -> tuple[LabelledImages, list[str]]:
    """Decodes every image; returns the readable ones, hashed and ordered, and the errors of the others."""
    bad: dict[int, str] = {}

    def decode(row: int, item: Item) -> list[tuple[int, str]]:
        item.views(backbone)
        return [(row, item.digest)]

    batches = read_in_batches(images, range(len(images)), decode, 1, "checking test images", context, bad)
    readable, _ = images.in_order(dict(row_digest for batch in batches for row_digest in batch))
    return readable, [shown(text) for text in (*images.lost, *bad.values())]


def score(
    backbone: FrozenBackbone, tasks: Sequence[Task], images: LabelledImages, context: RunContext
) -> tuple[list[tuple[dict[str, Any], str]], LabelledImages, dict[int, str]]:
    """Evaluates several tasks in one forward pass per image.

    Returns:
        Metrics and logits digest of each task, the readable images, hashed, and the errors of the others by row.
    """
    model = CombinedModel(backbone, tasks)
    logits: dict[str, dict[int, Tensor]] = {task.name: {} for task in tasks}
    digests: dict[int, str] = {}
    bad: dict[int, str] = {}

    def view(row: int, item: Item) -> list[tuple[int, str, Tensor]]:
        return [(row, item.digest, item.views(backbone)[0])]

    all_rows, what = range(len(images)), "evaluating test images"
    for batch in read_in_batches(images, all_rows, view, model.micro_batch, what, context, bad):
        rows, batch_digests, pixels = zip(*batch, strict=True)
        digests |= zip(rows, batch_digests, strict=True)
        for name, batch_logits in model(torch.stack(pixels)).items():
            logits[name] |= zip(rows, batch_logits.cpu(), strict=True)
    readable, order = images.in_order(digests)
    scores = []
    for task in tasks:
        joined = torch.stack([logits[task.name][row] for row in order])
        metrics = OBJECTIVES[task.objective].score(joined / task.temperature, readable.targets, images.labels)
        scores.append((metrics, f"{BY_CONTENT}{tensor_digest(joined)}"))
    return scores, readable, bad
