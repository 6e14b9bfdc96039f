"""Times everyday commands as whole processes, beside a bare `import torch, timm`; prints a Markdown table.

    python scripts/time_everyday.py            # five rounds; each runs every command once, in turn
    python scripts/time_everyday.py --rounds 9

Everything happens in a temporary folder, with a ViT-Ti of random weights and drawn images. Ratios are of times within
one round, so that a busy machine disturbs them less; the table shows their medians and ranges.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from markupsafe import Markup
from PIL import Image
from safetensors.torch import save_file

from addenda import LearnConfig, Learner, Registry, load_backbone
from addenda.benchmarks.report.tables import Table, markdown

MODEL = "vit_tiny_patch16_224"
CLASSES, PER_CLASS, TASKS = 7, 35, 10
ADDENDA = [sys.executable, "-m", "addenda.cli"]
IMPORT = "import torch, timm"


def main() -> None:
    """Prepares a registry of ten tasks and runs the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        times: dict[str, list[float]] = {}
        for number in range(rounds):
            for title, command in commands(folder, number).items():
                times.setdefault(title, []).append(run(command, folder))
    print(markdown(table(times)))


def prepare(folder: Path) -> None:
    """Writes the weights and images, and learns the tasks."""
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL).state_dict(), folder / "weights.safetensors")
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / "photos" / f"class {label}").mkdir(parents=True)
        for number in range(PER_CLASS):
            pixels = random.normal(40 + 25 * label, 60, (256, 320, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / f"class {label}" / f"{number}.jpg")
    for name in ("a", "b"):
        (folder / "small" / name).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "small" / name / f"{number}.png")
    backbone = load_backbone(MODEL, folder / "weights.safetensors", device="cpu")
    for file, count in (("tasks.db", TASKS), ("two.db", 2)):
        with Registry.open(folder / file) as registry:
            for number in range(count):
                config = LearnConfig(head_only=True, seed=number)
                Learner(backbone, registry).learn(f"task-{number}", folder / "small", config=config)


def learn(task: str, images: Path, registry: str) -> list[str]:
    """A command that learns a task."""
    backbone = ["--backbone", MODEL, "--weights", "weights.safetensors"]
    return [*ADDENDA, "learn", task, str(images), "--registry", registry, *backbone]


def commands(folder: Path, number: int) -> dict[str, list[str]]:
    """The commands by title; the first is what the others are compared with."""
    image = str(folder / "photos" / "class 0" / "0.jpg")
    return {
        f"`python -c '{IMPORT}'`": [sys.executable, "-c", IMPORT],
        "`addenda --help`": [*ADDENDA, "--help"],
        f"`addenda tasks list`, {TASKS} tasks": [*ADDENDA, "tasks", "list", "--registry", "tasks.db"],
        f"`addenda predict one.jpg`, {TASKS} tasks": [*ADDENDA, "predict", image, "--registry", "tasks.db"],
        "`addenda verify`, two tasks": [*ADDENDA, "verify", "--registry", "two.db"],
        f"`addenda learn`, {CLASSES * PER_CLASS} images": learn("photos", folder / "photos", f"learn-{number}.db"),
    }


def run(command: list[str], folder: Path) -> float:
    """Seconds of a whole process, which must succeed."""
    cache = {"ADDENDA_CACHE": tempfile.mkdtemp(dir=folder)} if "learn" in command else {}
    start = time.perf_counter()
    result = subprocess.run(command, cwd=folder, env=os.environ | cache, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr}")
    return seconds


def table(times: dict[str, list[float]]) -> Table:
    """Median seconds, and the median and range of the ratio to the first command of the same round."""
    reference = next(iter(times.values()))
    rows = []
    for title, seconds in times.items():
        ratios = [each / base for each, base in zip(seconds, reference, strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([Markup(title), f"{median(seconds):.1f}", spread])
    return Table(["command", "seconds", "relative to the first"], rows)


if __name__ == "__main__":
    main()
