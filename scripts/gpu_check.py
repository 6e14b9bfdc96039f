"""`make gpu-check`: exactness tests, costs, serving and learning on a GPU, within ten minutes, most important first.

Each part writes its own file at once, so that a machine that is taken away leaves what was measured. With
`--device cpu --quick` the whole script runs on a CPU with small models, which proves that it works, and nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from addenda import LearnConfig, Learner, Registry
from addenda.backbones import untrained_backbone
from addenda.benchmarks.baselines.dense_mask import DenseMask
from addenda.benchmarks.cost import CLASSES, interleave, random_task
from addenda.benchmarks.report.tables import Table, markdown
from addenda.combined import CombinedModel, micro_batch

BACKBONES = ("vit_small_patch16_224", "vit_base_patch16_224")
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
LIMIT_S = 600
DENSE = 100
"""Largest number of tasks that the dense mask is timed with."""


def run(*command: str, limit_s: float) -> tuple[int, str]:
    """Runs a command; returns its exit code, 1 after a timeout, and its output."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as stopped:
        return 1, f"{(stopped.output or b'').decode()}\nStopped after {limit_s:g} seconds."
    return done.returncode, done.stdout


def exactness() -> str:
    """The tests marked `gpu`, which compare bytes; raises an error with their output if one fails."""
    command = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=8", "tests/combined/test_on_cuda.py")
    failed, output = run(*command, limit_s=120)
    if failed:
        raise RuntimeError(output[-3000:])
    return f"```\n{output[-3000:]}```"


def cost(name: str, precision: str, device: str, counts: Sequence[int], rounds: int) -> str:
    """Times token tasks, layer heads, one image and the dense mask beside stock timm, interleaved."""
    backbone = untrained_backbone(name, precision, device)
    exact = precision == "float32" or device == "cpu"  # refused on a GPU in bfloat16
    tasks = [random_task(backbone, number) for number in range(max(counts))]
    layers = torch.ones(CLASSES, backbone.num_layer_features, dtype=torch.float32, device="cpu")
    heads = [replace(task, class_token=None, memory=None, pooled_weight=None, layer_weight=layers) for task in tasks]
    batch = micro_batch(backbone.device)
    shape, noise = (batch, *backbone.preprocessing["input_size"]), torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=noise, dtype=torch.float32, device="cpu").to(backbone.device)
    stock, stock_one = ("stock timm", 0, batch), ("stock timm", 0, 1)
    variants: dict[tuple[str, int, int], Callable[[], object]] = {
        stock: partial(backbone.model, images.to(backbone.precision)),
        stock_one: partial(backbone.model, images[:1].to(backbone.precision)),
    }
    for count in counts:
        model = CombinedModel(backbone, tasks[:count], exact)
        variants["token tasks", count, batch] = partial(model, images)
        variants["layer heads", count, batch] = partial(CombinedModel(backbone, heads[:count], exact), images)
        if count <= DENSE:
            variants["token tasks", count, 1] = partial(model, images[:1])
            for precomputed in (True, False):
                dense = torch.no_grad()(DenseMask(backbone, tasks[:count], precomputed=precomputed))
                what = "dense mask, precomputed" if precomputed else "dense mask"
                variants[what, count, batch] = partial(dense, images)
    with torch.no_grad():
        seconds = interleave(variants, rounds, backbone.device, thrice={stock, stock_one})
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    rows = []
    for variant, median in medians.items():
        ratio = median / medians[stock if variant[2] == batch else stock_one]
        rows.append((variant[0], *map(str, variant[1:]), f"{1000 * median:.2f}", f"{ratio:.2f}"))
    kind = "exact" if exact else "inexact: exact mode is refused"
    return f"{name}, {precision}, {kind}\n\n{markdown(Table(('what', 'tasks', 'images', 'ms', 'ratio'), rows))}"


def serving(name: str, device: str, tasks: str, seconds: float) -> str:
    """Throughput of a server relative to the model alone."""
    backbone = untrained_backbone(name, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        weights, out = f"{folder}/weights.safetensors", Path(folder, "out")
        save_file({key: value.contiguous() for key, value in backbone.model.state_dict().items()}, weights)
        options = ("--seconds", str(seconds), "--rounds", "2", "--cycles", "10", "--out", str(out))
        served = ("--backbone", name, "--weights", weights, "--device", device, "--tasks", tasks)
        failed, output = run(sys.executable, "-m", "addenda.cli", "bench", "serving", *served, *options, limit_s=100)
        if failed:
            raise RuntimeError(output[-3000:])
        return (out / "serving.md").read_text()


def learning(name: str, device: str, num_images: int) -> str:
    """Times learning one task on random images of two brightnesses: the first epoch, and a further epoch."""
    backbone = untrained_backbone(name, device=device)
    _, height, width = backbone.preprocessing["input_size"]
    targets = torch.arange(num_images, dtype=torch.int64, device="cpu") % 2
    noise = torch.randn(num_images, 3, height, width, dtype=torch.float32, device="cpu")
    images = noise + targets[:, None, None, None]
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
        f"epoch (frozen forward pass, linear probe, one epoch); {epoch:.3f} s for a further epoch, validation included."
    )


def plan(device: str, quick: bool) -> list[tuple[str, float, Callable[[], str]]]:
    """Parts in order of importance: a file's name, the seconds that it may need, and what measures it."""
    backbones = ("test_vit",) if quick else BACKBONES
    counts, many, rounds = ((1, 2), 3, 1) if quick else ((1, 10, 100), 1000, 5)
    parts: list[tuple[str, float, Callable[[], str]]] = [("1-exactness", 120, exactness)]
    for precision in ("float32", "bfloat16"):
        parts += [(f"2-cost-{name}-{precision}", 40, partial(cost, name, precision, device, counts, rounds))
                  for name in backbones]  # fmt: skip
    parts += [
        (f"3-cost-{name}-float32-{many}", 80, partial(cost, name, "float32", device, (many,), min(rounds, 3)))
        for name in backbones
    ]
    loads = ("1", 0.5) if quick else ("1,10,100", 3.5)
    parts.append(("4-serving", 100, partial(serving, backbones[0], device, *loads)))
    parts.append(("5-learning", 30, partial(learning, backbones[0], device, 32 if quick else 1024)))
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all parts; returns 1 if one failed or there was no time for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small models and numbers")
    parser.add_argument("--out", type=Path, default=RESULTS / f"gpu-{datetime.now(UTC):%Y-%m-%d}")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device is available.", file=sys.stderr)
        return 2
    start, machine = time.monotonic(), "CPU"
    if options.device == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = run(*query, limit_s=30)[1].strip()
        machine = f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}"
    heading = f"{machine}, torch {torch.__version__}, timm {version('timm')}, {datetime.now(UTC):%Y-%m-%d}."
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, needed_s, measure in plan(options.device, options.quick):
        began = time.monotonic()
        if began - start + needed_s > LIMIT_S:
            text, failed = f"Not run: {needed_s:g} seconds were not left of {LIMIT_S}.", 1
        else:
            try:
                text = measure()
            except Exception as error:  # the other parts are still worth their time
                text, failed = f"FAILED: {type(error).__name__}: {error}", 1
        path = options.out / f"{name}.md"
        path.write_text(f"# {name}\n\n{heading} `make gpu-check`.\n\n{text}\n")
        print(f"{time.monotonic() - began:.0f} s: {path}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
