"""The command line: one thin function for each command."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from addenda import __version__
from addenda.exceptions import AddendaError, BackboneError, DataError, IntegrityError, RegistryError

if TYPE_CHECKING:
    from addenda import FrozenBackbone, Registry
    from addenda.registry import TaskRecord

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    help="Adds vision tasks to a frozen Vision Transformer; every earlier task keeps its outputs, bit for bit.",
)
tasks_app = typer.Typer(no_args_is_help=True, help="The registered tasks.")
backbones_app = typer.Typer(no_args_is_help=True, help="The backbones that tasks can be learned on.")
bench_app = typer.Typer(no_args_is_help=True, help="Measurements that anyone can repeat.")
cache_app = typer.Typer(no_args_is_help=True, help="Activations kept for later runs on the same images.")
app.add_typer(tasks_app, name="tasks")
app.add_typer(backbones_app, name="backbones")
app.add_typer(bench_app, name="bench")
app.add_typer(cache_app, name="cache")

INTERRUPTED = 130  # typer's exit code after Ctrl-C
DEFAULT_BACKBONE = "vit_base_patch16_224.augreg_in21k"

RegistryOption = Annotated[
    str, typer.Option("--registry", envvar="ADDENDA_REGISTRY", help="Path or URL of the registry.", show_default=True)
]
BackboneOption = Annotated[
    str | None, typer.Option("--backbone", help="timm name, or 'glyphs'. Default: the registry's own.")
]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="Local weights file of the backbone.")]
MeanOption = Annotated[str | None, typer.Option("--mean", help="Normalisation: one number or three with commas.")]
StdOption = Annotated[str | None, typer.Option("--std", help="Normalisation: one number or three with commas.")]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="float32 (default) or bfloat16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, or auto.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")]
DEFAULT_REGISTRY = "addenda.db"


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Adds vision tasks to a frozen Vision Transformer; every earlier task keeps its outputs, bit for bit."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def learn(
    name: Annotated[str, typer.Argument(help="What to call the task.")],
    data: Annotated[Path, typer.Argument(help="A folder of class folders, or one with train/ and test/ in it.")],
    test: Annotated[Path | None, typer.Option(help="Test images, scored once. Default: test/ beside train/.")] = None,
    memory: Annotated[
        list[int] | None, typer.Option(help="Memory tokens in each layer, to try; may be given again.")
    ] = None,
    head_only: Annotated[bool | None, typer.Option("--head-only", help="No token: the regression alone.")] = None,
    extends: Annotated[list[str] | None, typer.Option(help="A task to extend; may be given again.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images, at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in an optimiser step.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="A learning rate to try; may be given again.")] = None,
    weight_decay: Annotated[list[float] | None, typer.Option(help="A weight decay to try; may be given again.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd (the paper) or adamw.")] = None,
    refit: Annotated[bool | None, typer.Option("--refit/--no-refit", help="Train the winner on all images.")] = None,
    views: Annotated[int | None, typer.Option(help="Random views of each image to learn from; 0: as it is.")] = None,
    fresh: Annotated[bool | None, typer.Option("--fresh", help="New views in each epoch, none kept: slow.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of split, memory and order; more to try more.")] = None,
    cache_gb: Annotated[
        float | None,
        typer.Option(help="Most that kept activations take on disk; 0 keeps none. Default: half of what is free."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options given here win.")] = None,
    new_version: Annotated[bool, typer.Option("--new-version", help="Add a version to a name already taken.")] = False,
    skip_bad: SkipBadOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    backbone: BackboneOption = None,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Learns a task from images and registers it."""
    from addenda import Learner, Registry
    from addenda.learner import ActivationCache
    from addenda.registry import check_name
    from addenda.terminal import console, print_json, progress, show_log

    given = {
        "num_memory_tokens": memory, "head_only": head_only, "extends": extends, "epochs": epochs, "seed": seed,
        "batch_size": batch_size, "learning_rate": lr, "optimizer": optimizer, "refit": refit,
        "weight_decay": weight_decay,
    }  # fmt: skip
    settings = _settings(config, given, {"views": views, "fresh": fresh})
    check_name(name)
    with Registry.open(registry) as opened:
        before = opened.generation
        loaded = _backbone_to_learn_on(opened, backbone, weights, mean, std, precision, device)
        learner = Learner(loaded, opened, ActivationCache(budget_gb=cache_gb))
        with show_log(quiet=as_json), progress(quiet=as_json) as report:
            task = learner.learn(name, data, test, settings, new_version=new_version, skip_bad=skip_bad, report=report)
        already = opened.generation == before
        record = opened.record(task.ref)
    if as_json:
        print_json({"task": task.ref, "sha256": task.sha256, "already": already, "metrics": dict(task.metrics)})
        return
    if already:
        console.print(f"{task.ref} was learned before from these images with these settings; nothing was done.")
    for path in task.data["skipped"]:
        console.print(f"left out: {path}", markup=False)
    _show(record)


@app.command()
def evaluate(
    name: Annotated[str, typer.Argument(help="The task: NAME, NAME:VERSION or NAME@ALIAS.")],
    data: Annotated[Path, typer.Argument(help="A folder of class folders, or one with test/ in it.")],
    skip_bad: SkipBadOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Scores a task on labelled images and records the result."""
    from addenda import Learner, Registry
    from addenda.terminal import console, percent, print_json, progress, table

    with Registry.open(registry, create=False) as opened:
        loaded = _recorded_backbone(opened, weights, device, fingerprint=opened.record(name).backbone)
        with progress(quiet=as_json) as report:
            result = Learner(loaded, opened).evaluate(name, data, skip_bad, report)
    if as_json:
        print_json({"task": result.task, "generation": result.generation, "metrics": result.metrics,
                    "data": result.data_fingerprint, "logits_digest": result.logits_digest})  # fmt: skip
        return
    metrics = result.metrics
    console.print(
        f"{result.task} on {metrics['num_images']} images: accuracy {percent(metrics['accuracy'])} %, balanced "
        f"{percent(metrics['balanced_accuracy'])} %, calibration error {percent(metrics['calibration_error'])} %. "
        f"Recorded at generation {result.generation}."
    )
    rows = [(label, percent(value)) for label, value in metrics["per_class"].items()]
    console.print(table("Accuracy by class", ("class", "%"), rows, right=("%",)))


@tasks_app.command("list")
def tasks_list(
    retired: Annotated[bool, typer.Option("--retired", help="Show retired tasks too.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Lists every registered version of every task."""
    from addenda import Registry
    from addenda.terminal import console, percent, print_json, size, table

    with Registry.open(registry, create=False) as opened:
        records, generation = opened.tasks(include_retired=retired), opened.generation
        names = {b["fingerprint"]: b["name"] for b in opened.backbones()}
    if as_json:
        print_json([_record_json(record) for record in records])
        return
    rows = [
        (
            r.ref + "".join(f" @{alias}" for alias in r.aliases) + (" (retired)" if r.retired is not None else ""),
            len(r.labels),
            r.num_memory_tokens,
            percent(r.metrics.get("validation", {}).get("accuracy")),
            percent(r.metrics.get("test", {}).get("accuracy")),
            percent(r.metrics.get("regression", {}).get("test", {}).get("accuracy")),
            size(r.size_bytes),
            names[r.backbone],
            ", ".join(r.extends),
            r.created_at[:16].replace("T", " "),
        )
        for r in records
    ]
    columns = ("task", "classes", "memory", "val %", "test %", "regression %", "size", "backbone", "extends", "learned")
    title = f"{len(rows)} task{'' if len(rows) == 1 else 's'} in {registry}, generation {generation}"
    console.print(table(title, columns, rows, right=columns[1:7]))


@tasks_app.command("show")
def tasks_show(
    name: Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Shows all that is recorded of one task."""
    from addenda import Registry
    from addenda.terminal import console, percent, print_json, table

    with Registry.open(registry, create=False) as opened:
        record, evaluations = opened.record(name), opened.evaluations(name)
    if as_json:
        print_json(_record_json(record) | {"evaluations": [vars(e) for e in evaluations]})
        return
    _show(record)
    if evaluations:
        rows = [
            (
                e.created_at[:16].replace("T", " "),
                e.generation,
                e.metrics["num_images"],
                percent(e.metrics["accuracy"]),
                e.data_fingerprint[:12],
                e.logits_digest[:12],
            )
            for e in evaluations
        ]
        columns = ("when", "generation", "images", "accuracy %", "data", "logits")
        console.print(table("Evaluations", columns, rows, right=columns[1:4]))


@tasks_app.command("alias")
def tasks_alias(
    name: Annotated[str, typer.Argument(help="NAME or NAME:VERSION.")],
    alias: Annotated[str, typer.Argument(help="The alias, such as production.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Points NAME@ALIAS at a version."""
    from addenda import Registry

    with Registry.open(registry, create=False) as opened:
        opened.set_alias(alias, name)
        record = opened.record(name)
    typer.echo(f"{record.name}@{alias} is {record.ref}.")


@tasks_app.command("retire")
def tasks_retire(
    name: Annotated[str, typer.Argument(help="NAME or NAME:VERSION.")],
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Hides a version; nothing is deleted."""
    from addenda import Registry

    with Registry.open(registry, create=False) as opened:
        record = opened.record(name)
        opened.retire(record.ref, reason)
    typer.echo(f"{record.ref} is retired; it stays in the registry.")


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    task: Annotated[list[str] | None, typer.Option(help="Answer this task only; may be given again.")] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Labels for each task, at most. Default: 3; of a multi-label task all likely ones."),
    ] = None,
    skip_bad: SkipBadOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV, a row for each image, task and label given.")
    ] = False,
    inexact: Annotated[
        bool, typer.Option("--inexact", help="Without the promise of equal bits: no self-test, nothing filled up.")
    ] = False,
) -> None:
    """Answers every registered task about some images, in one pass."""
    from addenda import Registry
    from addenda.terminal import console, print_json, progress, table

    paths = _image_files(images)
    with Registry.open(registry, create=False) as opened:
        chosen = [opened.get(ref) for ref in task or ()]
        loaded = _recorded_backbone(opened, weights, device, chosen[0].backbone if chosen else None)
        from addenda import CombinedModel

        model = CombinedModel(loaded, chosen or opened.load(loaded), exact=not inexact)
    if not model.tasks:
        raise DataError(f"The registry {str(registry)!r} holds no active task. `addenda learn` adds one.")
    answers: dict[str, dict[str, list[tuple[str, float]]]] = {}
    bad: list[str] = []
    with progress(quiet=as_json or as_csv or len(paths) < 16) as report:
        for done, start in enumerate(range(0, len(paths), model.micro_batch)):
            batch = paths[start : start + model.micro_batch]
            for path, answer in _answers(model, batch, top, skip_bad, bad):
                answers[str(path)] = answer
            report("predicting", min((done + 1) * model.micro_batch, len(paths)), len(paths))
    for message in bad:
        typer.echo(f"left out: {message}", err=True)
    if as_json:
        images_json = {path: {name: [{"label": label, "probability": p} for label, p in best]
                              for name, best in answer.items()} for path, answer in answers.items()}  # fmt: skip
        print_json({"exact": model.exact, "images": images_json})
        return
    rows = [
        (path, name, label, p) for path, answer in answers.items() for name, best in answer.items() for label, p in best
    ]
    if as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(("image", "task", "label", "probability"))
        writer.writerows(rows)
        return
    shown = [
        (path, *(", ".join(f"{label} {100 * p:.0f} %" for label, p in best) or "none" for best in answer.values()))
        for path, answer in answers.items()
    ]
    title = f"{len(shown)} images, {len(model.tasks)} tasks" + ("" if model.exact else ", not exact")
    console.print(table(title, ("image", *model.tasks), shown))


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Tasks to verify. Default: all active ones.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Verify retired tasks too.")] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Keep probes that passed under new numerics, to compare bits from now on.")
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Recomputes tasks' golden probes and compares every bit; exits with 1 if one differs."""
    from addenda import Registry
    from addenda.terminal import console, print_json, table

    with Registry.open(registry, create=False) as opened:
        refs = list(dict.fromkeys(opened.record(name).ref for name in names or ()))
        refs = refs or [r.ref for r in opened.tasks(include_retired=everything)]
        verdicts = _verdicts(opened, refs, weights, device, record)
    if as_json:
        print_json(verdicts)
    else:
        rows = [(v["task"], "ok" if v["ok"] else "FAILED", v.get("compared", "–"), v["detail"]) for v in verdicts]
        title = f"{len(rows)} task{'' if len(rows) == 1 else 's'} verified on golden probes"
        console.print(table(title, ("task", "", "compared", "result"), rows))
        for now in dict.fromkeys(v["numerics_fingerprint"] for v in verdicts if "numerics_fingerprint" in v):
            console.print(f"Computed under numerics {now[:12]}….")
        if not record and any(v["ok"] and not v["same_numerics"] for v in verdicts):
            console.print("New numerics: `addenda verify --record` keeps these probes, to compare bits from now on.")
    failed = [v["task"] for v in verdicts if not v["ok"]]
    if failed:
        typer.echo(f"Failed: {', '.join(failed)}.", err=True)
        raise typer.Exit(1)


@backbones_app.command("list")
def backbones_list(
    pattern: Annotated[str, typer.Argument(help="Pattern over timm's names.")] = "vit_*_patch16_224",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Lists backbones: those in the registry, the package's own, and timm's that match a pattern."""
    from addenda import Registry
    from addenda.backbones import catalogue
    from addenda.terminal import console, print_json, table

    rows: list[tuple[str, str, str]] = []
    with suppress(RegistryError), Registry.open(registry, create=False) as opened:  # without one, the rest is listed
        rows = [
            (b["name"], "in this registry", f"{b['fingerprint'][:12]}… from {b['source']}") for b in opened.backbones()
        ]
    rows.append(("glyphs", "works", "in the package; for the demo and tests"))
    rows += [(n, "works" if why is None else "refused", why or "") for n, why in catalogue(pattern)]
    if as_json:
        print_json([{"name": n, "status": s, "detail": d} for n, s, d in rows])
        return
    console.print(table(f"Backbones, timm's by the pattern {pattern!r}", ("name", "status", "detail"), rows))


@backbones_app.command("show")
def backbones_show(
    name: Annotated[str, typer.Argument(help="timm name, or 'glyphs'.")],
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    memory: Annotated[int, typer.Option(min=0, help="Memory tokens of the task whose price is shown.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Loads a backbone and shows it, with the price of one task on it."""
    from addenda import load_backbone
    from addenda.combined import task_cost
    from addenda.terminal import console, print_json, size, table

    loaded = load_backbone(name, weights, _numbers(mean), _numbers(std), device="cpu")
    record = loaded.record()
    cost = task_cost(loaded, memory)
    if as_json:
        print_json(record | {"task_cost": vars(cost)})
        return
    rows = [(key, str(value)) for key, value in record.items()]
    rows += [
        (f"one task with {memory} memory tokens", f"{size(cost.token_bytes)}, its head apart"),
        ("its arithmetic", f"{100 * cost.relative_operations:.2f} % of the backbone's pass"),
    ]
    console.print(table(name, ("", "value"), rows))


@cache_app.command("list")
def cache_list(as_json: JsonOption = False) -> None:
    """Lists the activations that are kept for later runs on the same images."""
    from addenda.learner import ActivationCache
    from addenda.terminal import console, print_json, size, table

    cache = ActivationCache()
    kept = cache.sets()
    if as_json:
        print_json([vars(one) | {"used_at": one.used_at.isoformat()} for one in kept])
        return
    rows = [
        (k.name, k.backbone, k.num_images, k.num_done, size(k.num_bytes), f"{k.used_at:%Y-%m-%d %H:%M}") for k in kept
    ]
    total = size(sum(one.num_bytes for one in kept))
    title = f"{len(kept)} set{'' if len(kept) == 1 else 's'} of activations in {cache.folder}, {total}"
    console.print(
        table(title, ("set", "backbone", "images", "done", "size", "used"), rows, right=("images", "done", "size"))
    )


@cache_app.command("clear")
def cache_clear(
    names: Annotated[list[str] | None, typer.Argument(help="Sets, as `cache list` names them. Default: all.")] = None,
) -> None:
    """Deletes kept activations; they are computed anew when they are needed."""
    from addenda.learner import ActivationCache
    from addenda.terminal import size

    cache = ActivationCache()
    unknown = set(names or ()) - {kept.name for kept in cache.sets()}
    if unknown:
        raise DataError(f"No set of activations is named {min(unknown)!r}. See: addenda cache list")
    typer.echo(f"{size(cache.clear(names or None))} set free in {cache.folder}.")


@app.command()
def demo() -> None:
    """Learns five tasks one after another and proves that no earlier one moved. Under a minute, no network."""
    from addenda.benchmarks.demo import run_demo

    if not run_demo():
        raise typer.Exit(1)


@bench_app.command("continual")
def bench_continual(
    stream: Annotated[str, typer.Argument(help="The stream: digits.")] = "digits",
    memory: Annotated[int, typer.Option(min=0, help="Memory tokens in each layer.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Runs a stream of tasks under Avalanche and checks every old task's logits, byte for byte."""
    from addenda.benchmarks.continual import run_continual
    from addenda.terminal import print_json

    result = run_continual(stream, memory, seed, quiet=as_json)
    if as_json:
        print_json(result)
    if not result["identical"]:
        raise typer.Exit(1)


@bench_app.command("cost")
def bench_cost(
    backbones: Annotated[str | None, typer.Option(help="timm names, with commas. Default: ViT-Ti, S and B.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="ViT-S, up to 100 tasks: under two minutes.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images in a call.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Measured calls of each way.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Folder for the table, the plot and the JSON.")] = None,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Times the combined pass of many tasks beside the backbone alone, the paper's dense mask and separate passes."""
    from addenda.benchmarks.cost import FULL, QUICK, run_cost

    names = backbones.split(",") if backbones else list(QUICK if quick else FULL)
    run_cost(names, out, quick, batch, rounds, precision or "float32", device)


@bench_app.command("training")
def bench_training(
    data: Annotated[Path, typer.Argument(help="A folder with train/ and test/, each of class folders.")],
    quick: Annotated[bool, typer.Option("--quick", help="200 images, fewer rounds: under two minutes.")] = False,
    limit: Annotated[int, typer.Option(min=20, help="Training images, drawn at random.")] = 1000,
    rounds: Annotated[int, typer.Option(min=2, help="Measured rounds.")] = 5,
    dense_epochs: Annotated[int, typer.Option(min=1, help="Epochs that the dense mask really trains.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder for the table, the plot and the JSON.")] = None,
    backbone: BackboneOption = DEFAULT_BACKBONE,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Times and weighs learning beside stock timm's pass, the paper's dense mask and full fine-tuning."""
    from addenda import load_backbone
    from addenda.benchmarks.training import run_training

    name, chosen = backbone or DEFAULT_BACKBONE, precision or "float32"
    loaded = load_backbone(name, weights, _numbers(mean), _numbers(std), chosen, device)
    run_training(loaded, data, out, quick, limit, rounds, dense_epochs)


@bench_app.command("sets")
def bench_sets(
    data: Annotated[Path, typer.Argument(help="A folder of data sets, each with train/ and test/.")],
    sets: Annotated[str, typer.Option(help="Names of the sets, with commas, in order.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    memory: Annotated[int, typer.Option(min=0, help="Memory tokens in each layer.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the table to this Markdown file too.")] = None,
    backbone: BackboneOption = DEFAULT_BACKBONE,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Learns data sets one after another, each beside its logistic regression, over several seeds."""
    from addenda import load_backbone
    from addenda.benchmarks.sets import run_sets

    loaded = load_backbone(backbone or DEFAULT_BACKBONE, weights, _numbers(mean), _numbers(std), device=device)
    if not run_sets(loaded, data, sets.split(","), seeds, memory, out):
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; bad input is one line and exit code 2, never a traceback."""
    try:
        app()
    except AddendaError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("Interrupted. This run registered nothing.", err=True)
        raise


def _settings(file: Path | None, given: dict[str, Any], augmentation: dict[str, Any]) -> Any:
    """Settings by precedence: defaults, file, command line."""
    import yaml

    from addenda import LearnConfig

    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = yaml.safe_load(file.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"The configuration {str(file)!r} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"The configuration {str(file)!r} must be a mapping of settings to values.")
    varied = {key: value for key, value in augmentation.items() if value is not None}
    if varied:
        values["augmentation"] = (values.get("augmentation") or {}) | varied
    return LearnConfig.parse(values | {key: _single(value) for key, value in given.items() if value is not None})


def _single(value: Any) -> Any:
    """An option that may be given again, given once."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _numbers(text: str | None) -> tuple[float, ...] | None:
    """'0.5' -> (0.5, 0.5, 0.5); '0.1,0.2,0.3' -> those."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BackboneError(f"{text!r} is not one number, nor three with commas between them.") from error
    return values * 3 if len(values) == 1 else values


def _backbone_to_learn_on(
    registry: Registry,
    name: str | None,
    weights: Path | None,
    mean: str | None,
    std: str | None,
    precision: str | None,
    device: str,
) -> FrozenBackbone:
    """The backbone as it is described; where only its name is given, or nothing, the registry's own."""
    from addenda import load_backbone

    records = registry.backbones()
    described = [option for option, value in (("--mean", mean), ("--std", std), ("--precision", precision)) if value]
    if name is None and records:
        if described:
            raise BackboneError(
                f"{' and '.join(described)} would make another backbone than the registry's own: "
                "name it with --backbone."
            )
        return _recorded_backbone(registry, weights, device)
    if not described and weights is None and [b["name"] for b in records].count(name or "") == 1:
        return _recorded_backbone(registry, None, device, name=name)
    return load_backbone(
        name or DEFAULT_BACKBONE, weights, _numbers(mean), _numbers(std), precision or "float32", device
    )


def _recorded_backbone(
    registry: Registry, weights: Path | None, device: str, fingerprint: str | None = None, name: str | None = None
) -> FrozenBackbone:
    """Loads the registry's one backbone, or that of a fingerprint or name, and checks its fingerprint."""
    from addenda import load_backbone

    records = [b for b in registry.backbones() if fingerprint in (None, b["fingerprint"]) and name in (None, b["name"])]
    if not records:
        raise BackboneError(f"The registry {registry.location!r} holds no task yet. `addenda learn` adds one.")
    if len(records) > 1:
        names = ", ".join(b["name"] for b in records)
        raise BackboneError(
            f"The registry holds tasks on several backbones ({names}): name a task, or for `learn` one with --backbone."
        )
    (record,) = records
    given = record["source"] if record["source"] not in ("hub", "embedded") else None
    if weights is None and given is not None and not Path(given).exists():
        raise BackboneError(f"The weights of {record['name']!r} are no longer at {given!r}. Say where: --weights FILE.")
    preprocessing = record["preprocessing"]
    loaded = load_backbone(
        record["name"], weights or given, preprocessing["mean"], preprocessing["std"], record["precision"], device
    )
    if loaded.preprocessing != preprocessing:
        raise IntegrityError(
            f"The backbone {record['name']!r} as loaded prepares images by {loaded.preprocessing}; "
            f"the registry's tasks were learned with {preprocessing}."
        )
    if loaded.fingerprint != record["fingerprint"]:
        raise IntegrityError(
            f"The backbone {record['name']!r} as loaded from {str(weights or record['source'])!r} has fingerprint "
            f"{loaded.fingerprint[:12]}…; the registry's tasks were learned on {record['fingerprint'][:12]}…. "
            "These are other weights."
        )
    return loaded


def _image_files(places: Sequence[Path]) -> list[Path]:
    from addenda.backbones import SUFFIXES

    paths: list[Path] = []
    for place in places:
        if place.is_dir():
            found = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"The folder {str(place)!r} holds no images.")
            paths += found
        else:
            paths.append(place)
    return paths


def _answers(
    model: Any, batch: Sequence[Path], top: int | None, skip_bad: bool, bad: list[str]
) -> list[tuple[Path, dict[str, list[tuple[str, float]]]]]:
    """A micro-batch's answers; with skip_bad, unreadable images are left out and noted."""
    from addenda.backbones import read_image

    good = list(batch)
    if skip_bad:
        good = []
        for path in batch:
            try:
                read_image(path)
                good.append(path)
            except DataError as error:
                bad.append(str(error))
    answers = model.predict(good, top)
    return [(path, {name: best[i] for name, best in answers.items()}) for i, path in enumerate(good)]


def _verdicts(
    registry: Registry, refs: Sequence[str], weights: Path | None, device: str, record: bool
) -> list[dict[str, Any]]:
    """Each task's verdict; one that cannot be trusted does not keep the others from being verified."""
    from addenda.combined import golden
    from addenda.combined import verify as verify_tasks

    verdicts: dict[str, dict[str, Any]] = {}
    stored: dict[str, list[Any]] = {}  # by backbone
    for ref in refs:
        try:
            found = registry.get(ref), registry.goldens(ref)
            stored.setdefault(found[0].backbone, []).append(found)
        except IntegrityError as error:
            verdicts[ref] = {"task": ref, "ok": False, "detail": str(error)}
    for fingerprint, recorded in stored.items():
        try:
            loaded = _recorded_backbone(registry, weights, device, fingerprint)
        except IntegrityError as error:
            verdicts |= {task.ref: {"task": task.ref, "ok": False, "detail": str(error)} for task, _ in recorded}
            continue
        for (task, _), verdict in zip(recorded, verify_tasks(loaded, recorded), strict=True):
            verdicts[task.ref] = vars(verdict)
            if record and verdict.ok and not verdict.same_numerics:
                registry.add_golden(task.ref, golden(loaded, task))
    return [verdicts[ref] for ref in refs]


def _record_json(record: TaskRecord) -> dict[str, Any]:
    return {"ref": record.ref, **vars(record)}


def _show(record: TaskRecord) -> None:
    """A task for people: what it is, how good beside its rival, where it came from."""
    from addenda.terminal import console, percent, size, table

    labels = ", ".join(record.labels[:12]) + (", …" if len(record.labels) > 12 else "")
    weight = f"{record.num_parameters:,} parameters, {size(record.size_bytes)}"
    rows = [
        ("classes", f"{len(record.labels)}: {labels}"),
        ("memory tokens", f"{record.num_memory_tokens} in each layer; {weight}"),
        ("extends", ", ".join(record.extends) or "nothing"),
        ("learned from", f"{record.data.get('num_images', '?')} images"),
        ("sha256", record.sha256),
        ("registered", f"{record.created_at[:19].replace('T', ' ')} UTC by {record.created_by}"),
    ]
    metrics = record.metrics
    if "candidates" in metrics:
        chosen, text = metrics["chosen"], "the regression was better on validation: the token adds nothing"
        if chosen is not None:
            settings = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in chosen.items())
            text = f"{settings}; of {len(metrics['candidates'])} candidates"
        rows.insert(4, ("chosen", text))
    if record.retired is not None:
        rows.append(("retired", record.retired or "yes"))
    console.print(table(record.ref, ("", "value"), rows))
    rival = metrics.get("regression", {})
    scores = []
    for part in (part for part in ("validation", "test") if part in metrics):
        pair = (metrics[part], rival.get(part, {}))
        kinds = ("accuracy", "balanced_accuracy", "calibration_error")
        scores.append((f"{part} ({pair[0]['num_images']})", *(percent(m.get(kind)) for kind in kinds for m in pair)))
    if scores:
        columns = ("part", "accuracy", "regression", "balanced", "regression", "calib. error", "regression")
        title = "Scores in %, beside the logistic regression on the same images"
        console.print(table(title, columns, scores, right=columns[1:]))


if __name__ == "__main__":
    main()
