"""The models of the Open Inference Protocol: some tasks of what is served, and the outputs that tell of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from addenda.combined import predictions
from addenda.exceptions import DataError
from addenda.registry import OBJECTIVES, Task
from addenda.serving import tensors
from addenda.serving.problems import ProblemError
from addenda.serving.snapshot import Snapshot

COMBINED = "combined"
"""The model of all tasks; a task of this name is answered as its outputs only."""


class Output(NamedTuple):
    """An output of a model: its name, its task, and what it tells of it, "logits", "probs" or "label"."""

    name: str
    task: Task
    kind: str

    def metadata(self) -> dict[str, Any]:
        """What the protocol says of it."""
        if self.kind == "label":
            return {"name": self.name, "datatype": "BYTES", "shape": [-1]}
        return {"name": self.name, "datatype": "FP32", "shape": [-1, len(self.task.labels)]}

    def values(self, logits: Float[Tensor, "B C"]) -> NDArray[Any]:
        """What it tells, from its task's logits."""
        if self.kind == "label":
            return np.array([best[0][0] for best in predictions(self.task, logits, top=1)], dtype=object)
        found: NDArray[Any] = (logits if self.kind == "logits" else self.task.probabilities(logits)).numpy()
        return found


@dataclass(frozen=True)
class Model:
    """Some tasks of a snapshot; `version` is the only one of this name that is served now."""

    name: str
    version: str
    tasks: Sequence[Task]

    def outputs(self) -> dict[str, Output]:
        """All that it can tell, by name; a multi-label task has no one label."""
        found = {}
        for task in self.tasks:
            start = f"{task.name}." if self.name == COMBINED else ""
            for kind in ("logits", "probs", "label")[: 3 if OBJECTIVES[task.objective].exclusive else 2]:
                found[f"{start}{kind}"] = Output(f"{start}{kind}", task, kind)
        return found

    def chosen(self, snapshot: Snapshot, asked: tensors.Request) -> list[Output]:
        """The outputs that are asked for: all of some tasks, or those that are named.

        Raises:
            DataError: there is no such output, or tasks are named in another way than with commas between.
            ProblemError: a task is not served.
        """
        names, model = asked.parameters.get("tasks"), self
        if names is not None:
            if self.name != COMBINED or not isinstance(names, str):
                raise DataError(
                    f"The parameter 'tasks' is for {COMBINED!r}: names of tasks as a string, with commas between."
                )
            wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
            for name in wanted:
                if name not in snapshot.model.tasks:
                    raise ProblemError(404, f"Task {short(name)} {snapshot.absence(name, (COMBINED,))}")
            model = replace(self, tasks=[snapshot.model.tasks[name] for name in wanted])
        available = model.outputs()
        for name in asked.outputs:
            if name not in available:
                known = ", ".join(map(repr, islice(available, 12))) or "none"
                raise DataError(f"Model {self.name!r} has no output {short(name)} for what is asked. Outputs: {known}.")
        return [available[name] for name in asked.outputs or available]


def model_of(snapshot: Snapshot, name: str, version: str | None = None) -> Model:
    """The model of a name.

    Raises:
        ProblemError: it is not served, or not in this version.
    """
    tasks = snapshot.model.tasks
    if name == COMBINED:
        found = Model(name, str(snapshot.generation), list(tasks.values()))
    elif name in tasks:
        found = Model(name, str(tasks[name].version), [tasks[name]])
    else:
        raise ProblemError(404, f"Model {name!r} {snapshot.absence(name, (COMBINED,))}")
    if version not in (None, found.version):
        raise ProblemError(
            404, f"Version {version!r} of model {name!r} is not served now; version {found.version!r} is."
        )
    return found
