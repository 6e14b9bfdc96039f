"""One cell of a run: a method learns a stream with one seed, is evaluated after each experience, and is stored."""

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
        "Addenda", "defaults of `addenda learn`; faster where an earlier seed filled the activation cache", {},
    ),
    "addenda-adapters": (
        "Addenda, adapters", "with adapters where validation prefers them", {"adapter_rank": "auto"},
    ),
})  # fmt: skip
"""Addenda's methods: label, note and `LearnConfig` settings of each."""

CELLS, SECONDS, REGISTRIES = "cells.jsonl", "seconds.jsonl", "registries"
DONE = "done"
"""Last progress message of a cell."""


@dataclass
class MethodRun:
    """A method with one seed, which also drew the stream; `out` is the folder of the whole run."""

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
        dependencies = {
            "method": self.name,
            "seed": self.seed,
            "settings": settings,
            "backbone": self.backbone.fingerprint,
            "images": self.stream.fingerprints,
        }
        self._key = hashlib.sha256(canonical_json(dependencies).encode()).hexdigest()[:16]

    def cell(self, report: Report) -> Cell:
        """Return the stored cell, or compute and store it."""
        cells = TypeAdapter(Cell)
        for line in read_lines(self.out / CELLS):
            if line["key"] == self._key:
                try:
                    return cells.validate_python(line["cell"])
                except ValidationError:
                    continue  # written by another version; compute it again
        with self._method() as method:
            cell = self._compute(method, report)
        append_line(self.out / CELLS, {"key": self._key, "cell": json.loads(cells.dump_json(cell))})
        return cell

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
        """Training seconds of an experience; if an interrupted run registered its task, those that it recorded."""
        key = f"{self._key}-{number}"
        recorded = [line["seconds"] for line in read_lines(self.out / SECONDS) if line["key"] == key]
        if recorded and self._ours is not None:
            return float(recorded[0])
        append_line(self.out / SECONDS, {"key": key, "seconds": measured})
        return measured


class _Matrices:
    """Accuracy matrices, and the changes in old experiences' scores."""

    def __init__(self, count: int) -> None:
        self.task_incremental: Matrix = [[None] * count for _ in range(count)]
        self.class_incremental: Matrix = [[None] * count for _ in range(count)]
        self.comparisons, self.max_difference = 0, 0.0
        self.identical: bool | None = None  # None until scores are compared
        # Share of class-incremental predictions on old experiences that changed; None if there are none.
        self.changed_decisions: float | None = None
        self._first: dict[int, tuple[Tensor, Tensor]] = {}
        self._num_decisions, self._num_changed = 0, 0

    def add(
        self, after: int, on: int, experience: Experience, task_incremental: Tensor, class_incremental: Tensor
    ) -> None:
        """Record the scores on experience `on` after experience `after`; ignored while no class can be predicted."""
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
            first_logits, first_decisions = self._first[on]
            self.comparisons += 1
            same = first_logits.numpy().tobytes() == logits.numpy().tobytes()
            self.identical = same and self.identical is not False
            if not same:
                self.max_difference = largest((self.max_difference, (first_logits - logits).abs().max().item()))
            if after == len(self.task_incremental) - 1:
                self._num_decisions += len(decisions)
                self._num_changed += int((first_decisions != decisions).sum())
                self.changed_decisions = self._num_changed / self._num_decisions
