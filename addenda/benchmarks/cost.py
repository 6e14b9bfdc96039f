"""`addenda bench cost`: the cost of many tasks relative to the backbone alone, in time, operations and bytes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone, untrained_backbone
from addenda.benchmarks.baselines.dense_mask import DenseMask
from addenda.benchmarks.report.tables import Table, markdown, show, write_json
from addenda.combined import CombinedModel, loaded_bytes, pass_operations, task_cost
from addenda.combined.numerics import numerics_settings
from addenda.files import output_folder
from addenda.registry import Task
from addenda.terminal import console, size

FULL = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
QUICK = ("vit_small_patch16_224",)
MEMORY = 5
CLASSES = 10
SEPARATE = 10
STOCK, STOCK_ONE = "stock timm", "stock timm, one image"
DENSE, DENSE_PRECOMPUTED = "dense mask", "dense mask, precomputed"
LAYER_HEADS = "layer heads, exact"

Run = Callable[[], object]
Variant = tuple[str, int, int, str]
"""A method, its number of tasks, the images per call, and the method that it is compared with."""

K = TypeVar("K")


def run_cost(
    backbones: Sequence[str],
    out: Path | None,
    quick: bool = False,
    batch: int = 8,
    rounds: int = 7,
    precision: str = "float32",
    device: str = "auto",
    img_size: int | None = None,
) -> list[CostRow]:
    """Times all methods, interleaved, on the same images, threads and weights, and prints a table.

    The backbones have random weights, which does not affect the times. A `batch` below the canonical micro-batch (64 on
    a GPU) is padded to it.
    """
    if out is not None:
        output_folder(out)
    counts, dense = ((1, 10, 100), (100,)) if quick else ((1, 10, 100, 256, 1000), (100, 256))
    rounds = min(3, rounds) if quick else rounds
    rows: list[CostRow] = []
    tables: list[str] = []
    described: dict[str, Any] = {}
    for name in backbones:
        backbone = untrained_backbone(name, precision, device, img_size)
        backbone.check_tokens("`bench cost`")
        described = numerics_settings(backbone)
        measured = _measure_backbone(backbone, counts, dense, batch, rounds)
        rows += measured
        console.print(f"{name}: {described['device']}, {described['threads']} threads, {described['precision']}")
        title = "ratio to stock timm (one image: to one image; vit-pytorch: to its own ViT)"
        cells = [row.cells() for row in measured]
        show(title, Table([COLUMNS[c] for c in NARROW], [[row[c] for c in NARROW] for row in cells]))
        tables.append(f"**{backbone.name}**\n\n{markdown(Table(COLUMNS, cells))}")
    if out is not None:
        from addenda.benchmarks.report.plots import cost_curves

        values = [asdict(row) for row in rows]
        write_json(out / "cost.json", {"numerics": described, "rounds": rounds, "rows": values})
        (out / "cost.md").write_text("\n".join(tables))
        cost_curves(values, out / "cost.png")
        console.print(f"Written to {out}: cost.json, cost.md, cost.png.")
    return rows


def _measure_backbone(
    backbone: FrozenBackbone, counts: Sequence[int], dense: Sequence[int], batch: int, rounds: int
) -> list[CostRow]:
    tasks = [random_task(backbone, number) for number in range(max(*counts, *dense))]
    shape, noise = (batch, *backbone.preprocessing["input_size"]), torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=noise, dtype=torch.float32, device="cpu").to(backbone.device)
    layer_weight = torch.ones(CLASSES, backbone.num_layer_features, dtype=torch.float32, device="cpu")
    heads = [
        replace(task, class_token=None, memory=None, pooled_weight=None, layer_weight=layer_weight)
        for task in tasks[: max(counts)]
    ]
    combined = {count: CombinedModel(backbone, tasks[:count]) for count in counts}
    single = [CombinedModel(backbone, [task]) for task in tasks[:SEPARATE]]
    models: dict[Variant, CombinedModel] = {
        ("one image, exact", 10, 1, STOCK_ONE): combined[10],
        **{("combined, exact", count, batch, STOCK): model for count, model in combined.items()},
        **{(LAYER_HEADS, count, batch, STOCK): CombinedModel(backbone, heads[:count]) for count in counts},
        ("combined, inexact", 10, batch, STOCK): CombinedModel(backbone, tasks[:10], exact=False),
    }
    variants: dict[Variant, Run] = {
        (STOCK, 0, batch, STOCK): lambda: backbone.backbone_logits(images),
        (STOCK_ONE, 0, 1, STOCK_ONE): lambda: backbone.backbone_logits(images[:1]),
        ("separate passes", SEPARATE, batch, STOCK): lambda: [model(images) for model in single],
        **{variant: partial(model, images[: variant[2]]) for variant, model in models.items()},
    }
    for count in dense:
        for method, precomputed in ((DENSE_PRECOMPUTED, True), (DENSE, False)):
            baseline = torch.no_grad()(DenseMask(backbone, tasks[:count], precomputed=precomputed))
            variants[method, count, batch, STOCK] = partial(baseline, images)
    variants |= _adapter(backbone, images)
    references = {variant for variant in variants if variant[0] == variant[-1]}
    seconds = interleave(variants, rounds, backbone.device, thrice=references)
    medians = {variant[0]: statistics.median(seconds[variant]) for variant in references}
    stock = task_cost(backbone, MEMORY).backbone_operations
    rows = []
    for variant, times in seconds.items():
        method, num_tasks, num_images, reference = variant
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        costs: dict[str, Any] = {"giga_operations": stock / 1e9} if method in (STOCK, STOCK_ONE) else {}
        if variant in models:
            model = models[variant]
            costs = {
                "giga_operations": pass_operations(model) / 1e9,
                "limit": pass_operations(model, filled=False) / stock,
                "task_bytes": loaded_bytes(model),
            }
        ratio = median / medians[reference]
        rows.append(CostRow(backbone.name, method, num_tasks, num_images, median, low, high, ratio, reference, **costs))
    return rows


def _adapter(backbone: FrozenBackbone, images: Tensor) -> dict[Variant, Run]:
    """vit-pytorch's learnable-memory adapter with one task, and its own ViT of the same size."""
    from vit_pytorch.learnable_memory_vit import Adapter, ViT

    vit = ViT(
        image_size=images.shape[-1], patch_size=backbone.patch_size, num_classes=1000, dim=backbone.embed_dim,
        depth=backbone.depth, heads=backbone.num_heads, mlp_dim=4 * backbone.embed_dim,
        dim_head=backbone.embed_dim // backbone.num_heads,
    )  # fmt: skip
    adapter = Adapter(vit=vit, num_classes=CLASSES, num_memories_per_layer=MEMORY)
    adapter = adapter.to(backbone.device, backbone.precision).eval()
    inputs, reference = images.to(backbone.precision), "vit-pytorch's own ViT"
    without_gradients = torch.no_grad()
    return {
        (reference, 0, len(images), reference): without_gradients(lambda: vit(inputs)),
        ("vit-pytorch's adapter", 1, len(images), reference): without_gradients(lambda: adapter(inputs)),
    }


def interleave(
    variants: Mapping[K, Run], rounds: int, device: torch.device, thrice: Collection[K] = ()
) -> dict[K, list[float]]:
    """Times each variant once per round, those in `thrice` three times; returns the seconds of every call.

    The order is shuffled in every round, so that other load on the machine affects all variants. A first round warms
    up. After each call the device is synchronized.
    """
    order = [variant for variant in variants for _ in range(3 if variant in thrice else 1)]
    seconds: dict[K, list[float]] = {variant: [] for variant in variants}
    shuffle = random.Random(0)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for variant in order:
            start = time.perf_counter()
            variants[variant]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[variant].append(time.perf_counter() - start)
    return seconds


def random_task(backbone: FrozenBackbone, number: int) -> Task:
    """A task with random weights, seeded by its number."""
    noise, width = torch.Generator().manual_seed(number), backbone.embed_dim
    draw = partial(torch.randn, generator=noise, dtype=torch.float32, device="cpu")
    return Task(
        name=f"task-{number}",
        backbone=backbone.fingerprint,
        labels=tuple(map(str, range(CLASSES))),
        class_token=draw(width),
        memory=0.02 * draw(backbone.depth, MEMORY, width),
        head_weight=draw(CLASSES, width),
        head_bias=torch.zeros(CLASSES, dtype=torch.float32, device="cpu"),
        pooled_weight=draw(CLASSES, width),
    )


COLUMNS = ("method", "tasks", "images", "ms", "quartiles", "ratio", "limit", "G op/image", "G op/s", "task bytes")
NARROW = (0, 1, 3, 4, 5, 6, 8)
"""Indices of the columns that are printed in 80 characters; the files have all columns."""


@dataclass(frozen=True)
class CostRow:
    """The measurement of one variant."""

    backbone: str
    what: str  # the method
    num_tasks: int
    num_images: int  # per call
    seconds: float  # median time of a call
    low: float  # first quartile
    high: float  # third quartile
    ratio: float  # of the median to that of the reference
    reference: str
    giga_operations: float | None = None  # multiply-adds per image, padding included; None for third-party models
    limit: float | None = None  # multiply-adds without padding over the backbone's: the ratio by operations
    task_bytes: int | None = None  # of the tasks' keys, values, tokens and heads on the device

    def cells(self) -> tuple[str, ...]:
        """The table row, in the order of COLUMNS."""
        operations, limit, num_bytes = self.giga_operations, self.limit, self.task_bytes
        return (
            self.what,
            str(self.num_tasks),
            str(self.num_images),
            f"{1000 * self.seconds:.1f}",
            f"{1000 * self.low:.1f}–{1000 * self.high:.1f}",
            f"{self.ratio:.2f}",
            "" if limit is None else f"{limit:.2f}",
            "" if operations is None else f"{operations:.2f}",
            "" if operations is None else f"{operations * self.num_images / self.seconds:.0f}",
            "" if num_bytes is None else size(num_bytes),
        )
