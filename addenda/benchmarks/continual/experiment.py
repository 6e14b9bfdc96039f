"""`addenda bench continual`: every method learns a stream with every seed, and the report is written."""

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

OF_THE_FILE = {"command", "hardware", "minutes", "expected", "expected_with"}
"""What a stream's file says of a run that was made before."""


def check_run(config: StreamConfig, data_root: Path | None) -> None:
    """Finds what would stop a run, before weights are looked for: missing images, or a method that is not known."""
    _methods(config)
    build_stream(config, data_root)


def run_continual(
    config: StreamConfig, backbone: FrozenBackbone, out: Path, data_root: Path | None, report: Report, command: str = ""
) -> Results:
    """Runs what `out` does not hold yet of cells, and of Addenda's registered tasks, and writes the report there."""
    notes = _methods(config)
    output_folder(out)
    if config.jobs > 1:
        _compute_side_by_side(config, str(backbone.device), out, data_root, [note.name for note in notes], report)
    cells = []
    for seed in range(config.seeds):
        stream = build_stream(config, data_root, seed)
        for place, note in enumerate(notes):
            run = MethodRun(config, backbone, stream, note.name, seed, out)

            def tell(what: str, done: int, total: int, run: MethodRun = run, start: int = place) -> None:
                report(f"seed {run.seed}: {run.name}, {what}", start * total + done, len(notes) * total)

            cells.append(run.cell(tell))
    environment = numerics(backbone)
    threads = _threads_each(config.jobs) if config.jobs > 1 else environment["threads"]
    processes = f"{config.jobs} processes of " if config.jobs > 1 else ""
    results = Results(
        stream=config.name,
        command=command,
        hardware=f"{environment['device']}, {processes}{threads} thread{'' if threads == 1 else 's'}",
        expected=config.expected,
        experiences=[
            ExperienceNote(one.name, list(one.classes), len(one.train), len(one.test)) for one in stream.experiences
        ],
        labels=list(stream.labels),
        config=json.loads(config.model_dump_json(exclude=OF_THE_FILE)),
        environment=environment | {"backbone": backbone.fingerprint},
        methods=notes,
        cells=cells,
    )
    write_report(results, out)
    return results


def _compute_side_by_side(
    config: StreamConfig, device: str, out: Path, data_root: Path | None, names: Sequence[str], report: Report
) -> None:
    """Has `config.jobs` processes, which share the cores, compute every cell that `out` does not hold, and keep it."""
    cell = partial(_compute, config, device, out, data_root)
    pool = ProcessPoolExecutor(config.jobs, get_context("spawn"), torch.set_num_threads, (_threads_each(config.jobs),))
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
    chosen, stream = config.backbone, build_stream(config, data_root, seed)
    backbone = _load(chosen.name, chosen.weights, chosen.mean, chosen.std, device=device)
    MethodRun(config, backbone, stream, name, seed, out).cell(lambda *_: None)
    return seed, name


_load = cache(load_backbone)  # once in each process


def _threads_each(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


def _methods(config: StreamConfig) -> list[MethodNote]:
    """Who runs, in order."""
    names = config.methods or (*OURS, *BASELINES)
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"Method {min(twice)!r} is named twice.")
    notes = []
    for name in names:
        try:
            label, note = OURS[name][:2] if name in OURS else baseline(name)[1:]
        except TrainingError as error:
            known = ", ".join((*OURS, *BASELINES))
            raise DataError(f"Method {name!r} is not known. Known: {known}, or lora-R with another rank R.") from error
        notes.append(MethodNote(name, label, note))
    return notes
