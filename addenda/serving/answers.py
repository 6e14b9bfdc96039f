"""Responses for an image as JSON: predictions, of all tasks of one size at once, and features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import torch
from jaxtyping import Float
from torch import Tensor

from addenda.combined import Choice, CombinedModel, task_groups
from addenda.registry import Task
from addenda.serving.outputs import Outputs, columns_of

INLINE = 1000
"""Number of logits whose answer takes well under a millisecond, so that the event loop may compute it."""


class AnswerPlan:
    """What the answers of some tasks share: their groups, the columns of their logits, and how they are described."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._facts = {
            task.name: {"ref": task.ref, "sha256": task.sha256, "objective": task.objective} for task in tasks
        }
        columns_by_name = columns_of(tuple(self._facts), tuple(len(task.labels) for task in tasks))
        self._groups = []
        for group in task_groups(tasks):
            starts = [columns_by_name[task.name].start for task in group.tasks]
            first = torch.tensor(starts, dtype=torch.int64, device="cpu")
            columns = torch.arange(len(group.tasks[0].labels), dtype=torch.int64, device="cpu")
            self._groups.append((group, first[:, None] + columns))

    def answer(
        self,
        generation: int,
        exact: bool,
        logits: Float[Tensor, "1 N"],
        top: int | None = None,
        min_probability: float | None = None,
        choice: Choice | None = None,
    ) -> bytes:
        """The response for one image, from the tasks' logits side by side."""
        labels: dict[str, list[dict[str, Any]]] = {}
        for group, columns in self._groups:
            for task, (values,), (indices,) in group.best(logits[:, columns].transpose(0, 1), top, min_probability):
                names = task.labels
                labels[task.name] = [
                    {"label": names[i], "probability": value} for value, i in zip(values, indices, strict=False)
                ]
        response: dict[str, Any] = {"generation": generation, "exact": exact}
        if choice is not None:
            response["chosen"] = choice._asdict()
        response["tasks"] = {name: {**facts, "labels": labels[name]} for name, facts in self._facts.items()}
        return orjson.dumps(response)


def embedding(generation: int, model: CombinedModel, numerics_fingerprint: str, features: Outputs) -> bytes:
    """The response with the features of one image."""
    entries: dict[str, dict[str, Any]] = {}
    for name, values in features.items():
        entries[name] = {"values": values[0].tolist()}
        if task := model.tasks.get(name.partition(":")[2]):
            entries[name] |= {"ref": task.ref, "sha256": task.sha256}
    response = {"generation": generation, "exact": features.exact, "backbone_fingerprint": model.backbone.fingerprint}
    response["numerics_fingerprint"] = numerics_fingerprint
    return orjson.dumps(response | {"features": entries})
