"""`addenda bench sets`: image sets learned one after another, each beside its logistic regression, over seeds."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from addenda.backbones import FrozenBackbone
from addenda.combined import CombinedModel
from addenda.exceptions import DataError
from addenda.learner import LearnConfig, Learner
from addenda.learner.data import open_images
from addenda.registry import Registry
from addenda.terminal import console, progress

COLUMNS = (
    "set",
    "train / test",
    "addenda, test %",
    "regression, test %",
    "difference",
    "s.e.",
    "validation %",
    "seconds",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


def run_sets(
    backbone: FrozenBackbone, data: Path, sets: Sequence[str], seeds: int, num_memory_tokens: int, out: Path | None
) -> bool:
    """Learns each set with each seed in one registry; the test part is scored once a run.

    The standard error of the difference, in points, is that of the seeds' means and of the test set's size
    together. At the end the first task's logits on its test images are compared with those it had alone.

    Returns:
        Whether those logits are equal, byte for byte.

    Raises:
        DataError: a set is missing.
    """
    missing = [name for name in sets if not (data / name / "train").is_dir()]
    if missing:
        raise DataError(f"{str(data)!r} has no set {missing[0]!r} with train/ and test/ in it.")
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder, Registry.open(f"{folder}/sets.db") as registry:
        learner = Learner(backbone, registry)
        alone: torch.Tensor | None = None
        first_images = open_images(data / sets[0] / "test").read_all(backbone)
        for name in sets:
            ours, rival, validation, seconds = [], [], [], []
            for seed in range(seeds):
                start = time.monotonic()
                with progress() as report:
                    config = LearnConfig(num_memory_tokens=num_memory_tokens, seed=seed)
                    task = learner.learn(f"{name}-seed{seed}".lower(), data / name, config=config, report=report)
                ours.append(100 * task.metrics["test"]["accuracy"])
                rival.append(100 * task.metrics["regression"]["test"]["accuracy"])
                validation.append(100 * task.metrics["validation"]["accuracy"])
                seconds.append(time.monotonic() - start)
                console.print(f"{task.ref}: {ours[-1]:.1f}, regression {rival[-1]:.1f}, {task.metrics['chosen']}")
                if alone is None:
                    alone = CombinedModel(backbone, [task])(first_images)[task.name]
            num_train, num_test = task.data["num_images"], task.metrics["test"]["num_images"]
            lines.append(_row(name, num_train, num_test, ours, rival, validation, seconds))
        tasks = registry.load(backbone)
        together = CombinedModel(backbone, tasks)(first_images)[tasks[0].name]
        assert alone is not None
        equal = torch.equal(alone, together)
        verdict = (
            f"After all {len(tasks)} tasks the logits of {tasks[0].ref} on its {len(first_images)} test images are "
            f"{'equal' if equal else 'NOT equal'} (`torch.equal`) to those computed when it was alone."
        )
    environment = (
        f"Backbone {backbone.name} ({backbone.fingerprint[:12]}), memory {num_memory_tokens}, {seeds} seeds; torch "
        f"{torch.__version__}, {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads."
    )
    text = f"`addenda {' '.join(sys.argv[1:])}`\n\n{environment}\n\n{HEADER}{''.join(lines)}\n{verdict}\n"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        out.write_text(text)
    return equal


def _row(
    name: str,
    num_train: int,
    num_test: int,
    ours: Sequence[float],
    rival: Sequence[float],
    validation: Sequence[float],
    seconds: Sequence[float],
) -> str:
    def spread(values: Sequence[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    mean, other = statistics.mean(ours), statistics.mean(rival)
    sampling = mean * (100 - mean) / num_test
    error = (spread(ours) ** 2 / len(ours) + spread(rival) ** 2 / len(rival) + sampling) ** 0.5
    cells = (
        name,
        f"{num_train} / {num_test}",
        f"**{mean:.1f}** ± {spread(ours):.1f}",
        f"{other:.1f} ± {spread(rival):.1f}",
        f"{mean - other:+.1f}",
        f"{error:.1f}",
        f"{statistics.mean(validation):.1f}",
        f"{statistics.mean(seconds):.0f}",
    )
    return f"| {' | '.join(cells)} |\n"
