"""The `bench` commands: measurements, each with the options that it can be repeated with."""

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

BackboneOption = Annotated[str, Option("--backbone", help="timm name, or 'glyphs'.")]
STREAM_BACKBONE = f"timm name, or 'glyphs'. Default: the stream's, or {options.DEFAULT_BACKBONE}."
METHODS = (
    "Names with commas: addenda, addenda-adapters, naive, joint, ewc, lwf, replay, slda, nearest-mean, ranpac, "
    "linear-probe, full, lora-R of any rank R. Default: the file's, else all, lora-8 among them."
)
PAPER_METHODS = (
    "Names with commas: full, lora-R, unmasked-M, attentive, head, head+class, memory-M, adapters-R, linear-probe, "
    "layer-probe, default, default+adapters, pairs, collapse; M memory tokens, R the rank. Default: full, lora-8, "
    "attentive, head, head+class, memory-1, memory-5, memory-10, memory-20, unmasked-5, adapters-8, linear-probe, "
    "layer-probe, default, default+adapters, pairs, collapse."
)


class _Measurements(TyperGroup):
    """Says what to install where a measurement lacks a package."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if (error.name or "addenda").partition(".")[0] == "addenda":
                raise
            raise AddendaError(f"This measurement needs {error.name}: pip install 'addenda[bench]'.") from error


app = typer.Typer(cls=_Measurements, no_args_is_help=True, help="Measurements that anyone can repeat.")


@app.command("continual")
def bench_continual(
    stream: Annotated[
        str, Argument(help="A stream of the package (digits, split-cifar10, …), a YAML file, or a folder to split.")
    ] = "digits",
    out: Annotated[
        Path | None, Option(help="Folder of the report; a run there goes on. Default: continual-STREAM.")
    ] = None,
    data: Annotated[Path | None, Option(help="Where the stream's folders of images lie.")] = None,
    split: Annotated[int | None, Option(min=1, help="Experiences to split one set's classes into.")] = None,
    methods: Annotated[str | None, Option(help=METHODS)] = None,
    seeds: Annotated[int | None, Option(min=1, help="How many seeds. Default: the file's.")] = None,
    jobs: Annotated[int | None, Option(min=1, help="Processes side by side. Default: the file's.")] = None,
    limit: Annotated[int | None, Option(min=4, help="Training images of an experience, at most.")] = None,
    test_limit: Annotated[int | None, Option(min=1, help="Test images of an experience, at most.")] = None,
    epochs: Annotated[int | None, Option(min=1, help="Passes over the training images: the baselines'.")] = None,
    bf16: Annotated[bool | None, Option("--bf16", help="Train the baselines in bfloat16 autocast.")] = None,
    download: Annotated[bool | None, Option("--download", help="Fetch missing images where that works.")] = None,
    backbone: Annotated[str | None, Option("--backbone", help=STREAM_BACKBONE)] = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Runs a stream of tasks, ours beside the methods that the field knows, and writes a report; see docs/avalanche.md.

    Exits with 1 if a logit of an old task of ours has moved by a bit.
    """
    from addenda.benchmarks.continual.config import read_config
    from addenda.benchmarks.continual.experiment import check_run, run_continual
    from addenda.benchmarks.continual.report import print_report

    if split is not None and not hasattr(read_config(stream).data, "num_experiences"):
        raise AddendaError(f"--split is for a folder, or a stream of one set; {stream!r} has experiences of its own.")
    config = read_config(stream, {
        "backbone": {"name": backbone, "weights": weights, "mean": options.numbers(mean), "std": options.numbers(std)},
        "baselines": {"epochs": epochs, "autocast": bf16}, "seeds": seeds, "jobs": jobs,
        "limit": limit, "test_limit": test_limit, "download": download,
        "methods": methods.split(",") if methods else None,
        **({"data": {"num_experiences": split}} if split is not None else {}),
    })  # fmt: skip
    check_run(config, data)
    chosen = config.backbone
    loaded = addenda.load_backbone(chosen.name, chosen.weights, chosen.mean, chosen.std, device=device)
    folder = out or Path(f"continual-{config.name}")
    with progress(quiet=as_json) as bars:
        report = bars if as_json or sys.stderr.isatty() else _line
        results = run_continual(config, loaded, folder, data, report, shlex.join(["addenda", *sys.argv[1:]]))
    if as_json:
        print_json(results.to_json())
    else:
        print_report(results, folder)
    if not all(cell.identical in (True, None) for cell in results.of("addenda")):
        raise typer.Exit(1)


def _line(what: str, done: int, total: int) -> None:
    """Where standard error is no terminal, a plain line there for each cell that is done."""
    from addenda.benchmarks.continual.cell import DONE

    if what.endswith(f", {DONE}"):
        print(what, file=sys.stderr, flush=True)


@app.command("compare")
def bench_compare(
    one: Annotated[Path, Argument(help="A report of `bench continual`: its folder, or its results.json.")],
    other: Annotated[Path, Argument(help="Another of the same stream.")],
    as_json: options.Json = False,
) -> None:
    """Compares two runs of a stream: what the second has more or less, beside the spread of both."""
    from addenda.benchmarks.continual.comparison import compare_reports, print_comparison

    comparison = compare_reports(one, other)
    if as_json:
        print_json(comparison.to_json())
    else:
        print_comparison(comparison)


@app.command("cost")
def bench_cost(
    backbones: Annotated[str | None, Option(help="timm names, with commas. Default: ViT-Ti, S and B.")] = None,
    quick: Annotated[bool, Option("--quick", help="ViT-S, up to 100 tasks: under two minutes.")] = False,
    batch: Annotated[int, Option(min=1, help="Images in a call.")] = 8,
    rounds: Annotated[int, Option(min=2, help="Measured calls of each way.")] = 7,
    out: Annotated[Path | None, Option(help="Folder for the table, the plot and the JSON.")] = None,
    precision: options.Precision = None,
    device: options.Device = "auto",
) -> None:
    """Times the combined pass of many tasks beside the backbone alone, the paper's dense mask and separate passes."""
    from addenda.benchmarks.cost import FULL, QUICK, run_cost

    names = backbones.split(",") if backbones else list(QUICK if quick else FULL)
    run_cost(names, out, quick, batch, rounds, precision or "float32", device)


@app.command("registry")
def bench_registry(
    registry: Annotated[
        list[str] | None, Option(help="An empty database to measure too, such as a PostgreSQL URL; it stays full.")
    ] = None,
    tasks: Annotated[int, Option(min=40, help="Tasks to register and load.")] = 1000,
    listed: Annotated[int, Option(min=100, help="Tasks in the list that pages are read of.")] = 100_000,
    quick: Annotated[bool, Option("--quick", help="100 tasks, a list of 5,000: under two minutes.")] = False,
    backbone: BackboneOption = options.DEFAULT_BACKBONE,
    out: Annotated[Path | None, Option(help="Folder for the table and the JSON.")] = None,
) -> None:
    """Times the registry: registering, reading and hashing, pages of a long list, and how soon a change is noticed."""
    from addenda.backbones import untrained_backbone
    from addenda.benchmarks.registry.registry_timings import run_registry

    run_registry(untrained_backbone(backbone), registry or (), out, quick, tasks, listed)


@app.command("serving")
def bench_serving(
    quick: Annotated[bool, Option("--quick", help="1 and 10 tasks, short loads, 20 cycles.")] = False,
    tasks: Annotated[str | None, Option(help="Of a server. Default: 1,10,100,1000, and with --ray 10.")] = None,
    seconds: Annotated[float, Option(min=0.1, help="Of each load.")] = 20,
    rounds: Annotated[int, Option(min=2, help="Measured rounds.")] = 5,
    cycles: Annotated[int, Option(min=10, help="Tasks to register and retire while memory is weighed.")] = 1000,
    ray: Annotated[str | None, Option(help="Measure replicas on Ray instead: local, auto or HOST:PORT.")] = None,
    replicas: Annotated[str, Option(help="How many replicas, with commas, with --ray.")] = "1,2",
    out: Annotated[Path | None, Option(help="Folder for the table and the JSON.")] = None,
    backbone: BackboneOption = options.DEFAULT_BACKBONE,
    weights: options.Weights = None,
    device: options.Device = "auto",
) -> None:
    """Loads a server of 1 to 1,000 tasks from another process: throughput beside the bare model, latency, changes."""
    from addenda.benchmarks.serving.serving_timings import run_serving

    counts = None if tasks is None else _counts("--tasks", tasks)
    loaded = addenda.load_backbone(backbone, weights, device=device)
    run_serving(loaded, weights, out, quick, counts, seconds, rounds, cycles, ray, _counts("--replicas", replicas))


def _counts(option: str, given: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given):
        raise AddendaError(f"{option} {given!r} is no list of numbers with commas, such as 1,2.")
    return [int(count) for count in given.split(",")]


@app.command("training")
def bench_training(
    data: Annotated[Path, Argument(help="A folder with train/ and test/, each of class folders.")],
    quick: Annotated[bool, Option("--quick", help="200 images, fewer rounds: under two minutes.")] = False,
    limit: Annotated[int, Option(min=20, help="Training images, drawn at random.")] = 1000,
    rounds: Annotated[int, Option(min=2, help="Measured rounds.")] = 5,
    dense_epochs: Annotated[int, Option(min=1, help="Epochs that the dense mask really trains.")] = 2,
    out: Annotated[Path | None, Option(help="Folder for the table, the plot and the JSON.")] = None,
    backbone: BackboneOption = options.DEFAULT_BACKBONE,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    precision: options.Precision = None,
    device: options.Device = "auto",
) -> None:
    """Times and weighs learning beside stock timm's pass, the paper's dense mask and full fine-tuning."""
    from addenda.benchmarks.training.learning_cost import run_training

    loaded = options.load_backbone(backbone, weights, mean, std, precision, device)
    run_training(loaded, data, out, quick, limit, rounds, dense_epochs)


@app.command("paper")
def bench_paper(
    data: Annotated[Path, Argument(help="A folder of data sets, each with train/ and test/.")],
    out: Annotated[Path, Option(help="Folder of what is found; a run there goes on where it was stopped.")],
    sets: Annotated[str, Option(help="Names of the sets, with commas, in order.")],
    seeds: Annotated[int, Option(min=1, help="How many seeds.")] = 3,
    limit: Annotated[int | None, Option(min=4, help="Training images of a set. Default: all.")] = None,
    methods: Annotated[str | None, Option(help=PAPER_METHODS)] = None,
    epochs: Annotated[int, Option(min=1, help="Passes over the training images, at most: ours.")] = 30,
    baseline_epochs: Annotated[int, Option(min=1, help="The same of full, lora and unmasked.")] = 30,
    views: Annotated[int, Option(min=0, help="Random views of each image to learn from; 0: as it is.")] = 3,
    bf16: Annotated[bool, Option("--bf16", help="Train full, lora and unmasked in bfloat16 autocast.")] = False,
    backbone: BackboneOption = options.DEFAULT_BACKBONE,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    device: options.Device = "auto",
) -> None:
    """Compares the paper's regimes, masked and not, with LoRA and full fine-tuning on any sets, over several seeds."""
    from addenda.benchmarks.baselines.paper_methods import BaselineConfig
    from addenda.benchmarks.paper import paper_grid

    names, chosen = sets.split(","), methods.split(",") if methods else paper_grid.METHODS
    paper_grid.check_run(data, names, chosen)
    varied = addenda.Augmentation(views=views)
    comparison = paper_grid.PaperConfig(
        options.load_backbone(backbone, weights, mean, std, None, device), data, limit,
        replace(paper_grid.OURS, epochs=epochs, augmentation=varied),
        BaselineConfig(epochs=baseline_epochs, augmentation=varied, autocast=bf16),
    )  # fmt: skip
    cells = paper_grid.run_paper(comparison, names, seeds, chosen, out)
    if not all(cell.get("identical", True) for cell in cells):
        raise typer.Exit(1)


def demo() -> None:
    """Learns five tasks one after another and proves that no earlier one moved. Under a minute, no network."""
    from addenda.benchmarks.demo import run_demo

    if not run_demo():
        raise typer.Exit(1)
