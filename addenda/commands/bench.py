"""The `bench` commands: benchmarks, each with the options that reproduce it."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperGroup

import addenda
from addenda.commands import options
from addenda.exceptions import AddendaError
from addenda.terminal import print_json, progress

BackboneOption = Annotated[str, Option("--backbone", help=options.TIMM_NAME)]
STREAM_BACKBONE = f"{options.TIMM_NAME} Default: the stream's, else {options.DEFAULT_BACKBONE}."
STREAM_METHODS = (
    "Methods, separated by commas: addenda, addenda-adapters, naive, joint, ewc, lwf, replay, slda, nearest-mean, "
    "ranpac, ranpac-adapted, fecam, gaussian-replay, linear-probe, full, lora-R of any rank R. Default: the stream's, "
    "else all of these, with lora-8."
)
PAPER_METHODS = (
    "Methods, separated by commas: full, lora-R, unmasked-M, attentive, head, head+class, memory-M, adapters-R, "
    "linear-probe, layer-probe, default, default+adapters, pairs, collapse; with M memory tokens per layer and rank R "
    "(docs/avalanche.md). Default: all, with lora-8, memory-1, memory-5, memory-10, memory-20, unmasked-5, adapters-8."
)


class _BenchGroup(TyperGroup):
    """Reports a missing package with the command that installs it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if (error.name or "addenda").partition(".")[0] == "addenda":
                raise
            raise AddendaError(f"This benchmark requires {error.name}: pip install 'addenda[bench]'.") from error


app = typer.Typer(cls=_BenchGroup, no_args_is_help=True, help="Benchmarks that anyone can reproduce.")


@app.command("continual")
def bench_continual(
    stream: Annotated[
        str, Argument(help="A bundled stream (digits, split-cifar10, …), a YAML file, or a folder of classes to split.")
    ] = "digits",
    out: Annotated[
        Path | None,
        Option(help="Folder of the report; an interrupted run in it is resumed. Default: continual-STREAM."),
    ] = None,
    data: Annotated[
        Path | None,
        Option(help="Folder with the stream's images. Default: the folder of the YAML file, else the current one."),
    ] = None,
    split: Annotated[
        int | None,
        Option(min=1, help="Number of experiences to split a dataset's classes into. Default: the stream's, else 5."),
    ] = None,
    methods: Annotated[str | None, Option(help=STREAM_METHODS)] = None,
    seeds: Annotated[int | None, Option(min=1, help="Number of seeds. Default: the stream's, else 3.")] = None,
    jobs: Annotated[int | None, Option(min=1, help="Parallel processes. Default: the stream's, else 1.")] = None,
    limit: Annotated[
        int | None,
        Option(
            min=4,
            help="Training images per experience, at most, balanced over classes. Default: the stream's, else all.",
        ),
    ] = None,
    test_limit: Annotated[
        int | None,
        Option(
            min=1, help="Test images per experience, at most, balanced over classes. Default: the stream's, else all."
        ),
    ] = None,
    epochs: Annotated[
        int | None, Option(min=1, help="Training epochs of the baselines. Default: the stream's, else 4.")
    ] = None,
    bf16: Annotated[bool | None, Option("--bf16", help="Train the baselines under bfloat16 autocast.")] = None,
    download: Annotated[
        bool | None, Option("--download", help="Download missing images, if their source allows it.")
    ] = None,
    backbone: Annotated[str | None, Option("--backbone", help=STREAM_BACKBONE)] = None,
    weights: options.TimmWeights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    img_size: options.ImgSize = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Runs a stream of tasks with Addenda and with baselines, and writes a report; see docs/avalanche.md.

    Exits with 1 if any bit of a logit of an earlier Addenda task changed.
    """
    from addenda.benchmarks.continual.config import read_config
    from addenda.benchmarks.continual.experiment import check_run, run_continual
    from addenda.benchmarks.continual.report import print_report

    if split is not None and not hasattr(read_config(stream).data, "num_experiences"):
        raise AddendaError(
            f"{stream!r} has fixed experiences; omit --split, which is for folders and streams of one dataset."
        )
    config = read_config(stream, {
        "backbone": {"name": backbone, "weights": weights, "mean": options.numbers(mean), "std": options.numbers(std),
                     "img_size": img_size},
        "baselines": {"epochs": epochs, "autocast": bf16}, "seeds": seeds, "jobs": jobs,
        "limit": limit, "test_limit": test_limit, "download": download,
        "methods": methods.split(",") if methods else None,
        **({"data": {"num_experiences": split}} if split is not None else {}),
    })  # fmt: skip
    check_run(config, data)
    loaded = addenda.load_backbone(**dict(config.backbone), device=device)
    options.print_conversion(loaded)
    folder = out or Path(f"continual-{config.name}")
    with progress(quiet=as_json) as bars:
        report = bars if as_json or sys.stderr.isatty() else _print_finished_cell
        results = run_continual(config, loaded, folder, data, report, shlex.join(["addenda", *sys.argv[1:]]))
    if as_json:
        print_json(results.to_json())
    else:
        print_report(results, folder)
    if not all(cell.identical in (True, None) for cell in results.of("addenda")):
        raise typer.Exit(1)


def _print_finished_cell(what: str, done: int, total: int) -> None:
    """Prints a plain line for each finished cell, for a standard error that is not a terminal."""
    from addenda.benchmarks.continual.experiment import DONE

    if what.endswith(f", {DONE}"):
        print(what, file=sys.stderr, flush=True)


@app.command("compare")
def bench_compare(
    first: Annotated[Path, Argument(help="A report of `bench continual`: its folder, or its results.json.")],
    second: Annotated[Path, Argument(help="Another report of the same stream.")],
    as_json: options.Json = False,
) -> None:
    """Compares two runs of a stream: the change from the first to the second, with the spread of both."""
    from addenda.benchmarks.continual.columns import compare_reports, print_comparison

    comparison = compare_reports(first, second)
    if as_json:
        print_json(comparison)
    else:
        print_comparison(comparison)


@app.command("cost")
def bench_cost(
    backbones: Annotated[
        str | None,
        Option(help="timm model names, separated by commas. Default: ViT-Ti, ViT-S and ViT-B; with --quick ViT-S."),
    ] = None,
    quick: Annotated[bool, Option("--quick", help="At most 100 tasks: takes under two minutes.")] = False,
    batch: Annotated[int, Option(min=1, help="Images per call.")] = 8,
    rounds: Annotated[int, Option(min=2, help="Timed calls of each variant.")] = 7,
    out: Annotated[
        Path | None, Option(help="Folder for the table, the plot and the JSON. Default: print the table only.")
    ] = None,
    img_size: options.ImgSize = None,
    precision: options.Precision = None,
    device: options.Device = "auto",
) -> None:
    """Times the combined forward pass of many tasks.

    Compares it with the backbone alone, a dense attention mask and one forward pass per task.
    """
    from addenda.benchmarks.cost import FULL, QUICK, run_cost

    names = backbones.split(",") if backbones else list(QUICK if quick else FULL)
    run_cost(names, out, quick, batch, rounds, precision or "float32", device, img_size)


@app.command("registry")
def bench_registry(
    registry: Annotated[
        list[str] | None,
        Option(help="An empty database to measure too, such as a PostgreSQL URL; it stays filled. Repeat for several."),
    ] = None,
    tasks: Annotated[int, Option(min=40, help="Number of tasks to register and load.")] = 1000,
    listed: Annotated[int, Option(min=100, help="Length of the task list from which pages are read.")] = 100_000,
    quick: Annotated[bool, Option("--quick", help="100 tasks, a list of 5,000: takes under two minutes.")] = False,
    backbone: BackboneOption = options.DEFAULT_BACKBONE,
    img_size: options.ImgSize = None,
    out: Annotated[
        Path | None, Option(help="Folder for the table and the JSON. Default: print the table only.")
    ] = None,
) -> None:
    """Times the registry: registering tasks, reading and hashing them, paging a long list, and noticing a change."""
    from addenda.backbones import untrained_backbone
    from addenda.benchmarks.registry.registry_timings import run_registry

    run_registry(untrained_backbone(backbone, img_size=img_size), registry or (), out, quick, tasks, listed)


@app.command("serving")
def bench_serving(
    quick: Annotated[bool, Option("--quick", help="1 and 10 tasks, loads of 2 s, 2 rounds, 20 cycles.")] = False,
    tasks: Annotated[
        str | None,
        Option(
            help="Numbers of served tasks, separated by commas. Default: 1,10,100,1000; with --quick 1,10; with --ray "
            "10."
        ),
    ] = None,
    seconds: Annotated[float, Option(min=0.1, help="Duration of each load in seconds.")] = 20,
    rounds: Annotated[int, Option(min=2, help="Measured rounds.")] = 5,
    cycles: Annotated[
        int, Option(min=10, help="Number of tasks to register and retire while memory use is measured.")
    ] = 1000,
    ray: Annotated[
        str | None,
        Option(help="Measure replicas on a Ray cluster instead: local, auto or HOST:PORT. Default: one process."),
    ] = None,
    replicas: Annotated[str, Option(help="With --ray: numbers of replicas, separated by commas.")] = "1,2",
    workers: Annotated[
        int, Option(min=0, max=64, help="Load a server with this many workers too, in turn; 0: none.")
    ] = 0,
    out: Annotated[
        Path | None, Option(help="Folder for the table and the JSON. Default: print the table only.")
    ] = None,
    backbone: BackboneOption = options.DEFAULT_BACKBONE,
    weights: options.TimmWeights = None,
    img_size: options.ImgSize = None,
    device: options.Device = "auto",
) -> None:
    """Load-tests a server of 1 to 1,000 tasks: throughput relative to the bare model, latency, registry changes."""
    from addenda.benchmarks.serving.serving_timings import run_serving

    counts = None if tasks is None else _counts("--tasks", tasks)
    loaded = options.load_backbone(backbone, weights, None, None, img_size, None, device)
    run_serving(
        loaded, weights, out, quick, counts, seconds, rounds, cycles, ray, _counts("--replicas", replicas), workers
    )


def _counts(option: str, text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise AddendaError(f"{option} must be whole numbers from 1, such as '1,2'; got {text!r}.")
    return [int(count) for count in text.split(",")]


@app.command("training")
def bench_training(
    data: Annotated[Path, Argument(help="A folder with train/ and test/, each with class folders.")],
    quick: Annotated[bool, Option("--quick", help="200 images, fewer rounds: takes under two minutes.")] = False,
    limit: Annotated[int, Option(min=20, help="Training images, at most, drawn at random.")] = 1000,
    rounds: Annotated[int, Option(min=2, help="Measured rounds.")] = 5,
    dense_epochs: Annotated[
        int, Option(min=1, help="Epochs for which the dense mask is trained; the rest is extrapolated.")
    ] = 2,
    out: Annotated[
        Path | None, Option(help="Folder for the table, the plot and the JSON. Default: print the table only.")
    ] = None,
    backbone: BackboneOption = options.DEFAULT_BACKBONE,
    weights: options.TimmWeights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    img_size: options.ImgSize = None,
    precision: options.Precision = None,
    device: options.Device = "auto",
) -> None:
    """Measures time and memory of learning against timm's forward pass, a dense mask and full fine-tuning."""
    from addenda.benchmarks.training.learning_cost import run_training

    loaded = options.load_backbone(backbone, weights, mean, std, img_size, precision, device)
    run_training(loaded, data, out, quick, limit, rounds, dense_epochs)


@app.command("paper")
def bench_paper(
    data: Annotated[Path, Argument(help="A folder of datasets, each with train/ and test/.")],
    out: Annotated[Path, Option(help="Folder of the results; an interrupted run in it is resumed.")],
    sets: Annotated[str, Option(help="Datasets in DATA, separated by commas, in the order for pairs and collapse.")],
    seeds: Annotated[int, Option(min=1, help="Number of seeds.")] = 3,
    limit: Annotated[
        int | None, Option(min=4, help="Training images per dataset, at most, balanced over classes. Default: all.")
    ] = None,
    methods: Annotated[str | None, Option(help=PAPER_METHODS)] = None,
    epochs: Annotated[
        int, Option(min=1, help="Epochs of head+class, memory, adapters and pairs; early stopping may end sooner.")
    ] = 30,
    baseline_epochs: Annotated[
        int, Option(min=1, help="Epochs of full, lora, unmasked and attentive; validation selects one.")
    ] = 30,
    views: Annotated[
        int,
        Option(min=0, help="Random views of each training image; default, default+adapters and probes have their own."),
    ] = 3,
    bf16: Annotated[
        bool, Option("--bf16", help="Train full, lora, unmasked and attentive under bfloat16 autocast.")
    ] = False,
    backbone: BackboneOption = options.DEFAULT_BACKBONE,
    weights: options.TimmWeights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    img_size: options.ImgSize = None,
    device: options.Device = "auto",
) -> None:
    """Compares learnable memory (Sandler et al., 2022), masked and unmasked, with LoRA and full fine-tuning.

    Exits with 1 if any bit of a logit of a task in `pairs` changed beside the others.
    """
    from addenda.benchmarks.baselines.paper_methods import BaselineConfig
    from addenda.benchmarks.paper import paper_grid

    names, method_names = sets.split(","), methods.split(",") if methods else paper_grid.METHODS
    paper_grid.check_run(data, names, method_names)
    augmentation = addenda.Augmentation(views=views)
    config = paper_grid.PaperConfig(
        options.load_backbone(backbone, weights, mean, std, img_size, None, device), data, limit,
        replace(paper_grid.OURS, epochs=epochs, augmentation=augmentation),
        BaselineConfig(epochs=baseline_epochs, augmentation=augmentation, autocast=bf16),
    )  # fmt: skip
    cells = paper_grid.run_paper(config, names, seeds, method_names, out)
    if not all(cell.get("identical", True) for cell in cells):
        raise typer.Exit(1)


def demo() -> None:
    """Learns five tasks one after another and verifies that the logits of earlier ones did not change.

    Takes under a minute and needs no network.
    """
    from addenda.benchmarks.demo import run_demo

    if not run_demo():
        raise typer.Exit(1)
