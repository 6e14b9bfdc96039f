"""`addenda bench continual`: every method learns the stream with every seed; each such cell is stored at once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from addenda import __version__
from addenda.backbones import FrozenBackbone, load_backbone
from addenda.benchmarks.baselines.method import BaselineSettings, Method, Scores
from addenda.benchmarks.baselines.methods import BASELINES, baseline
from addenda.benchmarks.continual.config import StreamConfig, build_stream
from addenda.benchmarks.continual.ours import Masked
from addenda.benchmarks.continual.report import write_report
from addenda.benchmarks.continual.results import Cell, ExperienceNote, Matrix, MethodNote, Results, largest, measure
from addenda.benchmarks.continual.stream import Experience, Stream
from addenda.benchmarks.report.output import append_line, read_lines
from addenda.benchmarks.strategy import NEVER
from addenda.combined import numerics
from addenda.exceptions import DataError, TrainingError
from addenda.files import output_folder
from addenda.learner import LearnConfig
from addenda.learner.context import Report, silent
from addenda.learner.objectives import accuracy
from addenda.registry import Registry, canonical_json
from addenda.text import plural

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
DONE = "done"  # last progress message of a cell

REFERENCE_RUN = {"command", "hardware", "expected", "expected_with"}
"""Fields of a stream's file that describe an earlier run; results leave them out of their configuration."""


def check_run(config: StreamConfig, data_root: Path | None) -> None:
    """Raise DataError for missing images or unknown methods, before any weights are loaded."""
    _methods(config)
    build_stream(config, data_root)


def run_continual(
    config: StreamConfig, backbone: FrozenBackbone, out: Path, data_root: Path | None, report: Report, command: str = ""
) -> Results:
    """Run the benchmark into the folder `out` and write its report; cells and tasks already there are reused."""
    notes = _methods(config)
    output_folder(out)
    if config.jobs > 1:
        _compute_in_parallel(config, str(backbone.device), out, data_root, [note.name for note in notes], report)
    cells, hardware = [], dict[str, None]()
    for seed in range(config.seeds):
        stream = build_stream(config, data_root, seed)
        for index, note in enumerate(notes):
            run = MethodRun(config, backbone, stream, note.name, seed, out)
            cells.append(run.cell(report, index, len(notes)))
            hardware[run.hardware] = None
    environment = numerics(backbone)
    results = Results(
        stream=config.name,
        command=command,
        hardware="; ".join(hardware),
        expected=config.expected,
        experiences=[ExperienceNote(e.name, list(e.classes), len(e.train), len(e.test)) for e in stream.experiences],
        labels=list(stream.labels),
        config=json.loads(config.model_dump_json(exclude=REFERENCE_RUN)),
        environment=environment | {"backbone": backbone.fingerprint},
        methods=notes,
        cells=cells,
    )
    write_report(results, out)
    return results


def _compute_in_parallel(
    config: StreamConfig, device: str, out: Path, data_root: Path | None, names: Sequence[str], report: Report
) -> None:
    """Compute and store the cells missing from `out` in `config.jobs` processes that share the CPU cores."""
    cell = partial(_compute, config, device, out, data_root)
    threads = _threads_per_process(config.jobs)
    pool = ProcessPoolExecutor(config.jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    try:
        cells = [pool.submit(cell, seed, name) for seed in range(config.seeds) for name in names]
        for done, future in enumerate(as_completed(cells), start=1):
            report(f"{future.result()}, {DONE}", done, len(cells))
    finally:
        pool.shutdown(cancel_futures=True)


def _compute(config: StreamConfig, device: str, out: Path, data_root: Path | None, seed: int, name: str) -> str:
    backbone = _load(**dict(config.backbone), device=device)
    MethodRun(config, backbone, build_stream(config, data_root, seed), name, seed, out).cell(silent)
    return f"seed {seed}: {name}"


_load = cache(load_backbone)  # once per process


def _threads_per_process(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


def _methods(config: StreamConfig) -> list[MethodNote]:
    """The methods to run, in order, with their labels and notes."""
    names = config.methods or (*OURS, *BASELINES)
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"Method {min(repeated)!r} is given twice; give it once.")
    notes = []
    for name in names:
        try:
            label, note = OURS[name][:2] if name in OURS else baseline(name)[1:]
        except TrainingError as error:
            known = ", ".join((*OURS, *BASELINES))
            raise DataError(f"Unknown method {name!r}. Known: {known}, and lora-R with any other rank R.") from error
        notes.append(MethodNote(name, label, note))
    return notes


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
        dependencies = {"method": self.name, "seed": self.seed, "settings": settings}
        dependencies |= {"backbone": self.backbone.fingerprint, "images": self.stream.fingerprints}
        described, threads = numerics(self.backbone), torch.get_num_threads()
        processes = f"{self.config.jobs} processes of " if self.config.jobs > 1 else ""
        # Of the process that computed the cell, which may be another than that of the others.
        self.hardware = (
            f"{described['device']}, {processes}{plural(threads, 'thread')}, torch {described['torch']}, "
            f"Addenda {__version__}"
        )
        self._key = hashlib.sha256(canonical_json(dependencies).encode()).hexdigest()[:16]

    def cell(self, report: Report, index: int = 0, num_methods: int = 1) -> Cell:
        """Return the stored cell, or compute and store it, as number `index` of the seed's methods."""
        cells = TypeAdapter(Cell)
        for line in read_lines(self.out / CELLS):
            if line["key"] == self._key:
                self.hardware = line.get("hardware", self.hardware)
                try:
                    return cells.validate_python(line["cell"])
                except ValidationError:
                    continue  # written by another version; compute it again
        with self._method() as method:
            cell = self._compute(method, report, index, num_methods)
        values = {"key": self._key, "hardware": self.hardware, "cell": json.loads(cells.dump_json(cell))}
        append_line(self.out / CELLS, values)
        return cell

    @contextmanager
    def _method(self) -> Iterator[Method]:
        common = self.name, self.stream, self.backbone, self.config.baselines, self.seed
        if self._ours is None:
            yield baseline(self.name).make(*common)
            return
        folder = self.out / REGISTRIES
        folder.mkdir(exist_ok=True)
        with Registry.open(folder / f"{self.name}-seed{self.seed}-{self._key}.db") as registry:
            yield Masked(*common, config=self._ours, registry=registry)

    def _compute(self, method: Method, report: Report, index: int, num_methods: int) -> Cell:
        experiences = self.stream.experiences
        count = len(experiences)

        def report_done(what: str, done: int) -> None:
            report(f"seed {self.seed}: {self.name}, {what}", index * count + done, num_methods * count)

        matrices, seconds = _Matrices(count), []
        for number, experience in enumerate(experiences):
            report_done(f"learning {experience.name}", number)
            start = time.monotonic()
            method.learn(number)
            seconds.append(self._seconds(number, time.monotonic() - start))
            report_done(f"testing after {experience.name}", number)
            for on, tested in enumerate(experiences[: number + 2]):
                matrices.add(number, on, tested, method.scores(tested))
        report_done(DONE, count)
        measured = {name: value for name, value in vars(matrices).items() if not name.startswith("_")}
        return Cell(
            method=self.name,
            seed=self.seed,
            train_seconds=seconds,
            **measured,
            **method.price()._asdict(),
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
    """Accuracy matrices, and the changes in old experiences' scores; the public attributes are those of a Cell."""

    def __init__(self, count: int) -> None:
        self.task_incremental: Matrix = [[None] * count for _ in range(count)]
        self.class_incremental: Matrix = [[None] * count for _ in range(count)]
        self.comparisons, self.max_difference = 0, 0.0
        self.identical: bool | None = None
        self.changed_decisions: float | None = None
        self._first: dict[int, tuple[Tensor, Tensor]] = {}
        self._num_decisions, self._num_changed = 0, 0

    def add(self, after: int, on: int, experience: Experience, scores: Scores) -> None:
        """Record the scores on experience `on` after experience `after`; ignored while no class can be predicted."""
        if (scores.class_incremental == NEVER).all():
            return
        classes = list(experience.classes)
        for matrix, values in zip((self.task_incremental, self.class_incremental), scores, strict=True):
            if (values[:, classes] > NEVER).any():
                matrix[after][on] = accuracy(values, experience.test.targets)
        logits, decisions = scores.task_incremental[:, classes], scores.class_incremental.argmax(1)
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
