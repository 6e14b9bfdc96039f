"""`make gpu-check`: exactness tests, the cost benchmark and a timed training run on a GPU, in one report."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from addenda import LearnConfig, Learner, Registry
from addenda.backbones import untrained_backbone

NAMES = "vit_small_patch16_224,vit_base_patch16_224"
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def learning(name: str, device: str, num_images: int = 1024) -> str:
    """Times learning one task on random images of two brightnesses: the first epoch, and a further epoch."""
    backbone = untrained_backbone(name, device=device)
    _, height, width = backbone.preprocessing["input_size"]
    targets = torch.arange(num_images) % 2
    images = torch.randn(num_images, 3, height, width) + targets[:, None, None, None]
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder, Registry.open(f"{folder}/tasks.db") as registry:
        config = LearnConfig(optimizer="sgd", epochs=5, refit=False, learning_rate=(0.3,))
        start = time.perf_counter()
        Learner(backbone, registry).learn(
            "task",
            TensorDataset(images, targets),
            config=config,
            on_epoch=lambda epoch: ends.append(time.perf_counter()),
        )
    epoch = min(after - before for before, after in pairwise(ends))
    return (
        f"{name}, {num_images} images in memory, one candidate: {ends[0] - start:.2f} s to the end of the first "
        f"epoch (frozen forward pass, linear probe, one epoch); {epoch:.3f} s for each further epoch, with validation."
    )


def run(*command: str, limit_s: float = 60) -> tuple[int, str]:
    """Runs a command; returns its exit code, 1 after a timeout, and its output."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as stopped:
        return 1, f"{(stopped.output or b'').decode()}\nStopped after {limit_s:g} seconds."
    return done.returncode, done.stdout


def main() -> int:
    """Runs everything and writes docs/results/gpu-DATE.md; returns the exit code of the tests."""
    if not torch.cuda.is_available():
        print("No CUDA device is available.", file=sys.stderr)
        return 2
    _, driver = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    failed, tests = run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "--durations=8",
        "tests/combined/test_on_cuda.py",
        limit_s=150,
    )
    sections = [
        f"# {torch.cuda.get_device_name()}, {datetime.now(UTC):%Y-%m-%d}",
        f"Driver {driver.strip()}, CUDA {torch.version.cuda}, torch {torch.__version__}, timm {version('timm')}.",
        f"Made by `make gpu-check`.\n\n## Tests\n\n```\n{tests[-3000:]}```",
    ]
    with tempfile.TemporaryDirectory() as folder:
        cost = (sys.executable, "-m", "addenda.cli", "bench", "cost", "--quick", "--backbones", NAMES)
        _, output = run(*cost, "--batch", "64", "--device", "cuda", "--out", folder, limit_s=120)
        table = Path(folder) / "cost.md"
        section = table.read_text() if table.exists() else f"```\n{output[-3000:]}```"
    sections.append(f"## Cost, batch 64\n\n{section}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"gpu-{datetime.now(UTC):%Y-%m-%d}.md"
    path.write_text("\n\n".join(sections) + "\n")
    with path.open("a") as report:
        report.write(f"\n## Learning\n\n{learning('vit_small_patch16_224', 'cuda')}\n")
    print(f"Written: {path}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
