"""Cells of a run computed side by side, in processes that share the processor's cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch

from addenda.backbones import load_backbone
from addenda.benchmarks.continual.config import StreamConfig
from addenda.benchmarks.continual.sources import build_stream

DONE = "done"
"""Ends what is reported of a cell that is whole."""


def compute_side_by_side(
    config: StreamConfig,
    device: str,
    out: Path,
    data_root: Path | None,
    names: Sequence[str],
    report: Callable[[str, int, int], None],
) -> None:
    """Has `config.jobs` processes compute every cell that `out` does not hold; each keeps its own there.

    Args:
        config: of the run.
        device: where each process loads the backbone that the configuration names.
        out: the run's folder.
        data_root: where a relative `root` of the stream's data lies.
        names: of the methods.
        report: told of the progress.

    Raises:
        DataError: as a run alone would.
    """
    cell = partial(_compute, config, device, out, data_root)
    pool = ProcessPoolExecutor(config.jobs, get_context("spawn"), torch.set_num_threads, (threads_each(config.jobs),))
    try:
        cells = [pool.submit(cell, seed, name) for seed in range(config.seeds) for name in names]
        for done, future in enumerate(as_completed(cells), start=1):
            seed, name = future.result()
            report(f"seed {seed}: {name}, {DONE}", done, len(cells))
    finally:
        pool.shutdown(cancel_futures=True)


def threads_each(jobs: int) -> int:
    """Threads of each of so many processes."""
    return max(1, (os.cpu_count() or 1) // jobs)


def _compute(
    config: StreamConfig, device: str, out: Path, data_root: Path | None, seed: int, name: str
) -> tuple[int, str]:
    from addenda.benchmarks.continual.run import Run, fingerprints

    chosen, stream = config.backbone, build_stream(config, data_root, seed)
    backbone = _load(chosen.name, chosen.weights, chosen.mean, chosen.std, device=device)
    Run(config, backbone, stream, fingerprints(stream), name, seed, out).cell(lambda *_: None)
    return seed, name


_load = cache(load_backbone)  # once in each process
