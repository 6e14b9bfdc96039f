"""`addenda bench continual`: run every method with every seed on a stream, and write the report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch

from addenda.backbones import FrozenBackbone, load_backbone
from addenda.benchmarks.baselines.methods import BASELINES, baseline
from addenda.benchmarks.continual.cell import DONE, OURS, MethodRun, Report
from addenda.benchmarks.continual.config import StreamConfig, build_stream
from addenda.benchmarks.continual.report import write_report
from addenda.benchmarks.continual.results import ExperienceNote, MethodNote, Results
from addenda.combined import numerics
from addenda.exceptions import DataError, TrainingError
from addenda.files import output_folder

REFERENCE_RUN = {"command", "hardware", "minutes", "expected", "expected_with"}
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
    cells = []
    for seed in range(config.seeds):
        stream = build_stream(config, data_root, seed)
        for index, note in enumerate(notes):
            run = MethodRun(config, backbone, stream, note.name, seed, out)

            def report_cell(what: str, done: int, total: int, run: MethodRun = run, index: int = index) -> None:
                report(f"seed {run.seed}: {run.name}, {what}", index * total + done, len(notes) * total)

            cells.append(run.cell(report_cell))
    environment = numerics(backbone)
    threads = _threads_per_process(config.jobs) if config.jobs > 1 else environment["threads"]
    processes = f"{config.jobs} processes of " if config.jobs > 1 else ""
    results = Results(
        stream=config.name,
        command=command,
        hardware=f"{environment['device']}, {processes}{threads} thread{'' if threads == 1 else 's'}",
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
            seed, name = future.result()
            report(f"seed {seed}: {name}, {DONE}", done, len(cells))
    finally:
        pool.shutdown(cancel_futures=True)


def _compute(
    config: StreamConfig, device: str, out: Path, data_root: Path | None, seed: int, name: str
) -> tuple[int, str]:
    settings, stream = config.backbone, build_stream(config, data_root, seed)
    backbone = _load(settings.name, settings.weights, settings.mean, settings.std, device=device)
    MethodRun(config, backbone, stream, name, seed, out).cell(lambda *_: None)
    return seed, name


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
