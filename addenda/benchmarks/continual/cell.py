"""One cell of a run: one method learns a stream with one seed, is scored after each experience, and is kept at once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.method import BaselineSettings, Method
from addenda.benchmarks.baselines.methods import baseline
from addenda.benchmarks.continual.config import StreamConfig
from addenda.benchmarks.continual.ours import Masked
from addenda.benchmarks.continual.results import Cell, Matrix, largest, measure
from addenda.benchmarks.continual.stream import Experience, Stream
from addenda.benchmarks.report.jsonl import append_line, read_lines
from addenda.benchmarks.strategy import NEVER
from addenda.learner import LearnConfig
from addenda.registry import Registry, canonical_json

Report = Callable[[str, int, int], None]

OURS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = MappingProxyType({
    "addenda": (
        "Addenda", "as `addenda learn` does by default; less seconds where an earlier seed has kept activations", {},
    ),
    "addenda-adapters": ("Addenda, adapters", "adapters where validation says that they pay", {"adapter_rank": "auto"}),
})  # fmt: skip
"""Our own methods: what each is called, what people should know of it, and its settings."""

CELLS, SECONDS, REGISTRIES = "cells.jsonl", "seconds.jsonl", "registries"
DONE = "done"
"""Ends what is reported of a cell that is whole."""


@dataclass
class MethodRun:
    """One method with one seed, which is the stream's too; `out` is the folder of the whole run."""

    config: StreamConfig
    backbone: FrozenBackbone
    stream: Stream
    name: str
    seed: int
    out: Path

    def __post_init__(self) -> None:
        self._ours: LearnConfig | None = None
        settings = TypeAdapter(BaselineSettings).dump_python(self.config.baselines, mode="json")
        if self.name in OURS:
            self._ours = LearnConfig.parse({**self.config.learn, **OURS[self.name][-1], "seed": self.seed})
            settings = self._ours.to_json()
        depends = {
            "method": self.name,
            "seed": self.seed,
            "settings": settings,
            "backbone": self.backbone.fingerprint,
            "images": self.stream.fingerprints,
        }
        self._key = hashlib.sha256(canonical_json(depends).encode()).hexdigest()[:16]

    def cell(self, report: Report) -> Cell:
        """The cell: as it was kept, or computed now and kept."""
        cells = TypeAdapter(Cell)
        for line in read_lines(self.out / CELLS):
            if line["key"] == self._key:
                try:
                    return cells.validate_python(line["cell"])
                except ValidationError:
                    continue  # of another version; computed anew
        with self._method() as method:
            made = self._compute(method, report)
        append_line(self.out / CELLS, {"key": self._key, "cell": json.loads(cells.dump_json(made))})
        return made

    @contextmanager
    def _method(self) -> Iterator[Method]:
        if self._ours is None:
            make = baseline(self.name).make
            yield make(self.name, self.stream, self.backbone, self.config.baselines, self.seed)
            return
        folder = self.out / REGISTRIES
        folder.mkdir(exist_ok=True)
        with Registry.open(folder / f"{self.name}-seed{self.seed}-{self._key}.db") as registry:
            yield Masked(self.stream, self.backbone, self._ours, registry)

    def _compute(self, method: Method, report: Report) -> Cell:
        experiences = self.stream.experiences
        matrices, seconds = _Matrices(len(experiences)), []
        for number, experience in enumerate(experiences):
            report(f"learning {experience.name}", number, len(experiences))
            start = time.monotonic()
            method.learn(number)
            seconds.append(self._seconds(number, time.monotonic() - start))
            report(f"testing after {experience.name}", number, len(experiences))
            for on in range(min(number + 2, len(experiences))):
                matrices.add(number, on, experiences[on], *method.scores(experiences[on]))
        report(DONE, len(experiences), len(experiences))
        price = method.price()
        return Cell(
            method=self.name,
            seed=self.seed,
            task_incremental=matrices.task_incremental,
            class_incremental=matrices.class_incremental,
            comparisons=matrices.comparisons,
            identical=matrices.identical,
            max_difference=matrices.max_difference,
            changed_decisions=matrices.changed_decisions,
            train_seconds=seconds,
            stored_bytes=price.stored_bytes,
            relative_inference=price.relative_inference,
            task_incremental_metrics=measure(matrices.task_incremental),
            class_incremental_metrics=measure(matrices.class_incremental),
            extra=method.extra(),
        )

    def _seconds(self, number: int, measured: float) -> float:
        """How long an experience took to learn; of a task that an interrupted run registered, what that run noted."""
        key = f"{self._key}-{number}"
        kept = [line["seconds"] for line in read_lines(self.out / SECONDS) if line["key"] == key]
        if kept and self._ours is not None:
            return float(kept[0])
        append_line(self.out / SECONDS, {"key": key, "seconds": measured})
        return measured


class _Matrices:
    """Accuracies, and what becomes of old experiences' scores."""

    def __init__(self, count: int) -> None:
        self.task_incremental: Matrix = [[None] * count for _ in range(count)]
        self.class_incremental: Matrix = [[None] * count for _ in range(count)]
        self.comparisons, self.max_difference = 0, 0.0
        self.identical: bool | None = None  # None where no score was compared
        self.changed_decisions: float | None = None  # of untold answers on old experiences; None where there are none
        self._first: dict[int, tuple[Tensor, Tensor]] = {}
        self._decided, self._changed = 0, 0

    def add(
        self, after: int, on: int, experience: Experience, task_incremental: Tensor, class_incremental: Tensor
    ) -> None:
        """Scores on an experience after another was learned; where none of its classes is offered, nothing is noted."""
        if (class_incremental == NEVER).all():
            return
        classes, targets = list(experience.classes), experience.test.targets
        for matrix, scores in ((self.task_incremental, task_incremental), (self.class_incremental, class_incremental)):
            if (scores[:, classes] > NEVER).any():
                matrix[after][on] = (scores.argmax(1) == targets).float().mean().item()
        logits, decisions = task_incremental[:, classes], class_incremental.argmax(1)
        if on == after:
            self._first[on] = logits, decisions
        elif on < after and on in self._first:
            before, decided = self._first[on]
            self.comparisons += 1
            same = before.numpy().tobytes() == logits.numpy().tobytes()
            self.identical = same and self.identical is not False
            if not same:
                self.max_difference = largest((self.max_difference, (before - logits).abs().max().item()))
            if after == len(self.task_incremental) - 1:
                self._decided += len(decisions)
                self._changed += int((decided != decisions).sum())
                self.changed_decisions = self._changed / self._decided
