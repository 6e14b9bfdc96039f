"""`addenda bench continual`: every method learns a stream with every seed; each cell is kept as soon as it is known."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.continual.config import StreamConfig
from addenda.benchmarks.continual.measures import measure
from addenda.benchmarks.continual.method import NEVER, Method
from addenda.benchmarks.continual.methods import BASELINES, baseline, describe
from addenda.benchmarks.continual.ours import Masked
from addenda.benchmarks.continual.report import write_report
from addenda.benchmarks.continual.results import Cell, ExperienceNote, MethodNote, Results
from addenda.benchmarks.continual.settings import BaselineSettings
from addenda.benchmarks.continual.side_by_side import DONE, compute_side_by_side, threads_each
from addenda.benchmarks.continual.sources import build_stream
from addenda.benchmarks.continual.stream import Experience, Stream
from addenda.benchmarks.jsonl import append_line, read_lines
from addenda.combined import numerics
from addenda.exceptions import DataError, TrainingError
from addenda.files import output_folder
from addenda.learner import LearnConfig
from addenda.registry import Registry, canonical_json

Report = Callable[[str, int, int], None]

OURS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType({
    "addenda": ("Addenda", {}),
    "addenda-adapters": ("Addenda, adapters", {"adapter_rank": "auto"}),
})  # fmt: skip
"""Our own methods: what they are called, and their settings."""

NOTES = {
    "addenda": "as `addenda learn` does by default; less seconds where an earlier seed has kept activations",
    "addenda-adapters": "adapters where validation says that they pay",
}

CELLS, SECONDS, REGISTRIES = "cells.jsonl", "seconds.jsonl", "registries"

OF_THE_FILE = {"command", "hardware", "minutes", "expected", "expected_with"}
"""What a stream's file says of a run that was made before."""


def check_run(config: StreamConfig, data_root: Path | None) -> None:
    """Finds what would stop a run, before weights are looked for.

    Raises:
        DataError: the images are not there, or a method is not known.
    """
    _methods(config)
    build_stream(config, data_root)


def run_continual(
    config: StreamConfig, backbone: FrozenBackbone, out: Path, data_root: Path | None, report: Report, command: str = ""
) -> Results:
    """Runs what `out` does not hold yet, and writes the report there.

    Args:
        config: the stream, and what is asked of whom.
        backbone: the frozen backbone of all methods.
        out: folder of the cells, the registries and the report. A run that was interrupted goes on: cells that are
            done stay, and of Addenda's, tasks that are registered.
        data_root: where a relative `root` of the stream's data lies.
        report: told of the progress.
        command: what runs it, for the report.

    Raises:
        DataError: the images are not there, or a method is not known.
    """
    names = _methods(config)
    output_folder(out)
    if config.jobs > 1:
        compute_side_by_side(config, str(backbone.device), out, data_root, names, report)
    cells = []
    for seed in range(config.seeds):
        stream = build_stream(config, data_root, seed)
        images = fingerprints(stream)
        for place, name in enumerate(names):
            run = Run(config, backbone, stream, images, name, seed, out)

            def tell(what: str, done: int, total: int, run: Run = run, start: int = place) -> None:
                report(f"seed {run.seed}: {run.name}, {what}", start * total + done, len(names) * total)

            cells.append(run.cell(tell))
    environment = numerics(backbone)
    results = Results(
        stream=config.name,
        command=command,
        hardware=_hardware(environment, config.jobs),
        expected=config.expected,
        experiences=[
            ExperienceNote(one.name, list(one.classes), len(one.train), len(one.test)) for one in stream.experiences
        ],
        labels=list(stream.labels),
        config=json.loads(config.model_dump_json(exclude=OF_THE_FILE)),
        environment=environment | {"backbone": backbone.fingerprint},
        methods=[_note(name) for name in names],
        cells=cells,
    )
    write_report(results, out)
    return results


def fingerprints(stream: Stream) -> list[list[str]]:
    """Of the training and test images of each experience."""
    return [[one.train.fingerprint(), one.test.fingerprint()] for one in stream.experiences]


class Run:
    """One method with one seed."""

    def __init__(
        self, config: StreamConfig, backbone: FrozenBackbone, stream: Stream, images: Sequence[Sequence[str]],
        name: str, seed: int, out: Path,
    ) -> None:  # fmt: skip
        self.name, self.seed = name, seed
        self._backbone, self._stream, self._settings, self._out = backbone, stream, config.baselines, out
        own = OURS[name][1] if name in OURS else {}
        self._learn = LearnConfig.parse({**config.learn, **own, "seed": seed}) if name in OURS else None
        depends = {
            "method": name,
            "seed": seed,
            "settings": json.loads(TypeAdapter(BaselineSettings).dump_json(self._settings))
            if self._learn is None
            else self._learn.to_json(),
            "backbone": backbone.fingerprint,
            "images": images,
        }
        self._key = hashlib.sha256(canonical_json(depends).encode()).hexdigest()[:16]

    def cell(self, report: Report) -> Cell:
        """The cell: as it was kept, or computed now and kept."""
        for line in read_lines(self._out / CELLS):
            if line["key"] == self._key:
                try:
                    return TypeAdapter(Cell).validate_python(line["cell"])
                except ValidationError:
                    continue  # of another version; computed anew
        with ExitStack() as stack:
            made = self._compute(self._make(stack), report)
        append_line(self._out / CELLS, {"key": self._key, "cell": json.loads(TypeAdapter(Cell).dump_json(made))})
        return made

    def _make(self, stack: ExitStack) -> Method:
        if self._learn is None:
            return baseline(self.name)(self._stream, self._backbone, self._settings, self.seed)
        folder = self._out / REGISTRIES
        folder.mkdir(exist_ok=True)
        registry = stack.enter_context(Registry.open(folder / f"{self.name}-seed{self.seed}-{self._key}.db"))
        return Masked(self._stream, self._backbone, self._learn, registry)

    def _compute(self, method: Method, report: Report) -> Cell:
        experiences = self._stream.experiences
        matrices = _Matrices(len(experiences))
        seconds = []
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
            told=matrices.told,
            untold=matrices.untold,
            comparisons=matrices.comparisons,
            identical=matrices.identical,
            max_difference=matrices.max_difference,
            changed_decisions=matrices.changed_decisions,
            train_seconds=seconds,
            stored_bytes=price.stored_bytes,
            relative_inference=price.relative_inference,
            told_metrics=measure(matrices.told),
            untold_metrics=measure(matrices.untold),
            extra=method.extra() if isinstance(method, Masked) else {},
        )

    def _seconds(self, number: int, measured: float) -> float:
        """How long an experience took to learn; of a task that an interrupted run registered, what that run noted."""
        kept = [line["seconds"] for line in read_lines(self._out / SECONDS) if line["key"] == f"{self._key}-{number}"]
        if kept and self._learn is not None:
            return float(kept[0])
        append_line(self._out / SECONDS, {"key": f"{self._key}-{number}", "seconds": measured})
        return measured


class _Matrices:
    """Accuracies, and what becomes of old experiences' scores."""

    def __init__(self, count: int) -> None:
        self.told: list[list[float | None]] = [[None] * count for _ in range(count)]
        self.untold: list[list[float | None]] = [[None] * count for _ in range(count)]
        self.comparisons, self.max_difference = 0, 0.0
        self._moved = False
        self._first: dict[int, tuple[Tensor, Tensor]] = {}
        self._decided, self._changed = 0, 0

    def add(self, after: int, on: int, experience: Experience, told: Tensor, untold: Tensor) -> None:
        """Scores on an experience after another was learned; where none of its classes is offered, nothing is noted."""
        if (untold == NEVER).all():
            return
        classes, targets = list(experience.classes), experience.test.targets
        for matrix, scores in ((self.told, told), (self.untold, untold)):
            if (scores[:, classes] > NEVER).any():
                matrix[after][on] = (scores.argmax(1) == targets).float().mean().item()
        logits, decisions = told[:, classes], untold.argmax(1)
        if on == after:
            self._first[on] = logits, decisions
        elif on < after and on in self._first:
            before, decided = self._first[on]
            self.comparisons += 1
            self._moved |= before.numpy().tobytes() != logits.numpy().tobytes()
            self.max_difference = max(self.max_difference, (before - logits).abs().max().item())
            if after == len(self.told) - 1:
                self._decided += len(decisions)
                self._changed += int((decided != decisions).sum())

    @property
    def identical(self) -> bool | None:
        """Whether no old score has moved by a bit; None where there was none to compare."""
        return not self._moved if self.comparisons else None

    @property
    def changed_decisions(self) -> float | None:
        """The share of untold answers on old experiences that are others now; None where there are none."""
        return self._changed / self._decided if self._decided else None


def _methods(config: StreamConfig) -> tuple[str, ...]:
    """Who runs, in order."""
    names = config.methods or (*OURS, *BASELINES)
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"Method {min(twice)!r} is named twice.")
    for name in names:
        if name not in OURS:
            try:
                baseline(name)
            except TrainingError as error:
                raise DataError(
                    f"Method {name!r} is not known. Known: {', '.join((*OURS, *BASELINES))}, or lora-R with another "
                    "rank R."
                ) from error
    return names


def _hardware(environment: Mapping[str, Any], jobs: int) -> str:
    """The machine in words."""
    count = threads_each(jobs) if jobs > 1 else environment["threads"]
    threads = f"{count} thread{'' if count == 1 else 's'}"
    return f"{environment['device']}, " + (f"{jobs} processes of {threads}" if jobs > 1 else threads)


def _note(name: str) -> MethodNote:
    return MethodNote(name, *((OURS[name][0], NOTES[name]) if name in OURS else describe(name)))
