"""`addenda bench cost`: what many tasks cost beside the backbone alone, in time, operations and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone, untrained_backbone
from addenda.benchmarks.baselines.dense_mask import DenseMask
from addenda.benchmarks.cost.interleaving import Run, interleave
from addenda.benchmarks.report import tables
from addenda.benchmarks.report.tables import Table, markdown, write_json
from addenda.combined import CombinedModel, loaded_bytes, numerics, pass_operations, task_cost
from addenda.exceptions import AddendaError
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


def run_cost(
    backbones: Sequence[str],
    out: Path | None,
    quick: bool = False,
    batch: int = 8,
    rounds: int = 7,
    precision: str = "float32",
    device: str = "auto",
) -> list[Row]:
    """Measures all ways interleaved, on the same images, threads and weights, and prints a table.

    Args:
        backbones: timm names; their weights are random, which no time depends on.
        out: folder for cost.json, cost.md and cost.png.
        quick: up to 100 tasks, three rounds at most.
        batch: images in a call; fewer than the canonical micro-batch (64 on a GPU) are filled up to it.
        rounds: measured calls of each way, in a new order each time; one more is not counted.
        precision: `"float32"` or `"bfloat16"`.
        device: a torch device.

    Raises:
        BackboneError: a backbone that cannot carry tasks, or a device that cannot be used.
    """
    if out is not None:
        output_folder(out)
    counts, dense, rounds = (
        ((1, 10, 100), (100,), min(3, rounds)) if quick else ((1, 10, 100, 256, 1000), (100, 256), rounds)
    )
    rows: list[Row] = []
    described: dict[str, Any] = {}
    for name in backbones:
        backbone = untrained_backbone(name, precision=precision, device=device)
        described = {key: value for key, value in numerics(backbone).items() if key != "probe"}
        found = _measure_backbone(backbone, counts, dense, batch, rounds)
        rows += found
        show(f"{name}: {described['device']}, {described['threads']} threads, {described['precision']}", found)
    if out is not None:
        write(rows, {"numerics": described, "rounds": rounds}, out)
    return rows


def _measure_backbone(
    backbone: FrozenBackbone, counts: Sequence[int], dense: Sequence[int], batch: int, rounds: int
) -> list[Row]:
    tasks = [random_task(backbone, number) for number in range(max(*counts, *dense))]
    _, height, width = backbone.preprocessing["input_size"]
    images = torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    ).to(backbone.device)
    combined = {count: CombinedModel(backbone, tasks[:count]) for count in counts}
    single = [CombinedModel(backbone, [task]) for task in tasks[:SEPARATE]]
    ways: dict[tuple[str, int, int, str], Run] = {
        (STOCK, 0, batch, STOCK): lambda: backbone.backbone_logits(images),
        (STOCK_ONE, 0, 1, STOCK_ONE): lambda: backbone.backbone_logits(images[:1]),
        ("one image, exact", 10, 1, STOCK_ONE): lambda: combined[10](images[:1]),
        ("separate passes", SEPARATE, batch, STOCK): lambda: [model(images) for model in single],
    }
    for count, model in combined.items():
        ways["combined, exact", count, batch, STOCK] = lambda model=model: model(images)  # type: ignore[misc]
    loose = CombinedModel(backbone, tasks[:10], exact=False)
    ways["combined, inexact", 10, batch, STOCK] = lambda: loose(images)
    for count in dense:
        for precomputed in (True, False):
            rival = torch.no_grad()(DenseMask(backbone, tasks[:count], precomputed=precomputed))
            what = DENSE_PRECOMPUTED if precomputed else DENSE
            ways[what, count, batch, STOCK] = lambda rival=rival: rival(images)  # type: ignore[misc]
    ways |= _adapter(backbone, images)
    references = {way for way in ways if way[0] == way[-1]}
    seconds = interleave(ways, rounds, backbone.device, thrice=references)
    medians = {way[0]: statistics.median(times) for way, times in seconds.items()}  # references have names of their own
    rows = []
    for (what, num_tasks, num_images, reference), times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        counted: dict[str, Any] = {}
        if what.startswith(("combined", "one image")):
            model = loose if "inexact" in what else combined[num_tasks]
            operations, limit = pass_operations(model), pass_operations(model, filled=False)
            stock = task_cost(backbone, MEMORY).backbone_operations
            counted = {
                "giga_operations": operations / 1e9, "limit": limit / stock, "task_bytes": loaded_bytes(model),
            }  # fmt: skip
        elif what in (STOCK, STOCK_ONE):
            counted = {"giga_operations": task_cost(backbone, MEMORY).backbone_operations / 1e9}
        ratio = median / medians[reference]
        rows.append(Row(backbone.name, what, num_tasks, num_images, median, low, high, ratio, reference, **counted))
    return rows


def _adapter(backbone: FrozenBackbone, images: Tensor) -> dict[tuple[str, int, int, str], Run]:
    """vit-pytorch's learnable-memory adapter, one task, beside its own ViT of the same sizes."""
    try:
        from vit_pytorch.learnable_memory_vit import Adapter, ViT
    except ModuleNotFoundError as error:
        raise AddendaError(f"{error}. It comes with: pip install 'addenda[bench]'") from error
    vit = ViT(
        image_size=images.shape[-1],
        patch_size=backbone.patch_size,
        num_classes=1000,
        dim=backbone.embed_dim,
        depth=backbone.depth,
        heads=backbone.num_heads,
        mlp_dim=4 * backbone.embed_dim,
        dim_head=backbone.embed_dim // backbone.num_heads,
    )
    adapter = Adapter(vit=vit, num_classes=CLASSES, num_memories_per_layer=MEMORY)
    adapter = adapter.to(backbone.device, backbone.precision).eval()
    moved = images.to(backbone.precision)

    def without_gradients(model: torch.nn.Module) -> Run:
        return torch.no_grad()(lambda: model(moved))

    own = "vit-pytorch's own ViT"
    return {
        (own, 0, len(images), own): without_gradients(vit),
        ("vit-pytorch's adapter", 1, len(images), own): without_gradients(adapter),
    }


def random_task(backbone: FrozenBackbone, number: int) -> Task:
    """A task of random numbers, the same for each number."""
    random = torch.Generator().manual_seed(number)
    width = backbone.embed_dim
    return Task(
        name=f"task-{number}",
        backbone=backbone.fingerprint,
        labels=tuple(map(str, range(CLASSES))),
        class_token=torch.randn(width, generator=random, dtype=torch.float32, device="cpu"),
        memory=0.02 * torch.randn(backbone.depth, MEMORY, width, generator=random, dtype=torch.float32, device="cpu"),
        head_weight=torch.randn(CLASSES, width, generator=random, dtype=torch.float32, device="cpu"),
        head_bias=torch.zeros(CLASSES, dtype=torch.float32, device="cpu"),
        pooled_weight=torch.randn(CLASSES, width, generator=random, dtype=torch.float32, device="cpu"),
    )


COLUMNS = ("way", "tasks", "images", "ms", "quartiles", "ratio", "limit", "G op/image", "G op/s", "tasks weigh")
NARROW = (0, 1, 3, 4, 5, 6, 8)
"""The columns that fit 80 characters; the files hold the rest."""


@dataclass(frozen=True)
class Row:
    """One way to answer, measured.

    Attributes:
        what: the way.
        num_tasks: tasks answered.
        num_images: images in the call.
        seconds: median time of a call.
        low: first quartile.
        high: third quartile.
        ratio: median over that of its reference.
        reference: what it is measured against.
        giga_operations: 1e9 multiply-adds counted for one image; None where they are not ours to count.
        limit: these operations without any filling, over the backbone's own: the ratio that arithmetic allows.
        task_bytes: what the tasks' keys, values, tokens and heads weigh on the device.
    """

    backbone: str
    what: str
    num_tasks: int
    num_images: int
    seconds: float
    low: float
    high: float
    ratio: float
    reference: str
    giga_operations: float | None = None
    limit: float | None = None
    task_bytes: int | None = None

    def cells(self) -> tuple[str, ...]:
        """The row of the table, as COLUMNS."""
        rate = None if self.giga_operations is None else self.giga_operations * self.num_images / self.seconds
        return (
            self.what,
            str(self.num_tasks),
            str(self.num_images),
            f"{1000 * self.seconds:.1f}",
            f"{1000 * self.low:.1f}–{1000 * self.high:.1f}",
            f"{self.ratio:.2f}",
            "" if self.limit is None else f"{self.limit:.2f}",
            "" if self.giga_operations is None else f"{self.giga_operations:.2f}",
            "" if rate is None else f"{rate:.0f}",
            "" if self.task_bytes is None else size(self.task_bytes),
        )


def show(where: str, rows: Sequence[Row]) -> None:
    """Prints a backbone's rows."""
    console.print(where)
    cells = [[row.cells()[place] for place in NARROW] for row in rows]
    title = "ratio: to stock timm (one image: of one image; vit-pytorch: to its own ViT)"
    tables.show(title, Table([COLUMNS[place] for place in NARROW], cells))


def write(rows: Sequence[Row], details: Mapping[str, Any], out: Path) -> None:
    """Writes cost.json, cost.md and cost.png."""
    from addenda.benchmarks.report.plots import cost_curves

    write_json(out / "cost.json", {**details, "rows": [asdict(row) for row in rows]})
    of = {name: [row for row in rows if row.backbone == name] for name in dict.fromkeys(row.backbone for row in rows)}
    parts = [f"**{name}**\n\n{markdown(Table(COLUMNS, [row.cells() for row in found]))}" for name, found in of.items()]
    (out / "cost.md").write_text("\n".join(parts))
    cost_curves({name: [asdict(row) for row in found] for name, found in of.items()}, out / "cost.png")
    console.print(f"Written to {out}: cost.json, cost.md, cost.png.")
