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
    from addenda import CombinedModel, FrozenBackbone, LearnConfig, Registry, Task
    from addenda.combined import Choice, Router
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
CacheOption = Annotated[
    float | None,
    typer.Option(help="Most that kept activations take on disk; 0 keeps none. Default: half of what is free."),
]
NewVersionOption = Annotated[bool, typer.Option("--new-version", help="Add a version to a name already taken.")]
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
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder of class folders, or a .csv or .parquet listing with the columns path and label (or labels, "
            "any number of them). A folder may hold train/ and test/, a listing a column split."
        ),
    ],
    test: Annotated[
        Path | None, typer.Option(help="Test images, scored once: a folder or listing. Default: the test part of DATA.")
    ] = None,
    memory: Annotated[
        list[int] | None, typer.Option(help="Memory tokens in each layer, to try; may be given again.")
    ] = None,
    head_only: Annotated[bool | None, typer.Option("--head-only", help="No token: the regression alone.")] = None,
    adapter_rank: Annotated[
        list[str] | None,
        typer.Option(
            help="Rank of the task's own low-rank updates, to try; may be given again. 'auto' takes them where "
            "validation says they pay. Default: none."
        ),
    ] = None,
    adapter_lr: Annotated[
        list[float] | None, typer.Option(help="A learning rate of the adapters to try; may be given again.")
    ] = None,
    extends: Annotated[
        list[str] | None,
        typer.Option(help="A task to extend; may be given again. 'auto' takes those that help, or none."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images, at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in an optimiser step.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="A learning rate to try; may be given again.")] = None,
    weight_decay: Annotated[list[float] | None, typer.Option(help="A weight decay to try; may be given again.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd (the paper) or adamw.")] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of each target that all classes get alike; below 1.")
    ] = None,
    class_weights: Annotated[
        str | None, typer.Option(help="none, or balanced: each class's images weigh as much together as any other's.")
    ] = None,
    refit: Annotated[bool | None, typer.Option("--refit/--no-refit", help="Train the winner on all images.")] = None,
    views: Annotated[int | None, typer.Option(help="Random views of each image to learn from; 0: as it is.")] = None,
    fresh: Annotated[bool | None, typer.Option("--fresh", help="New views in each epoch, none kept: slow.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of split, memory and order; more to try more.")] = None,
    cache_gb: CacheOption = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options given here win.")] = None,
    new_version: NewVersionOption = False,
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
        "num_memory_tokens": _single(memory), "head_only": head_only, "adapter_rank": _ranks(adapter_rank),
        "adapter_learning_rate": _single(adapter_lr), "epochs": epochs,
        "extends": "auto" if extends == ["auto"] else extends,
        "seed": _single(seed), "batch_size": batch_size, "learning_rate": _single(lr),
        "weight_decay": _single(weight_decay), "optimizer": optimizer, "label_smoothing": label_smoothing,
        "class_weights": class_weights, "refit": refit,
    }  # fmt: skip
    settings = _settings(config, given, {"views": views, "fresh": fresh})
    check_name(name)
    with Registry.open(registry) as opened:
        before = opened.generation
        loaded = _backbone_to_learn_on(opened, backbone, weights, mean, std, precision, device)
        _print_price(loaded, [settings], quiet=as_json)
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
    _show(record, task)


@app.command("learn-many")
def learn_many(
    file: Annotated[
        Path,
        typer.Argument(
            help="YAML with tasks: a list of name, data, and where wanted test, extends and config; and, for all of "
            "them, config. Paths are relative to the file."
        ),
    ],
    new_version: NewVersionOption = False,
    skip_bad: SkipBadOption = False,
    cache_gb: CacheOption = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    backbone: BackboneOption = None,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Learns tasks from a file, in order; given again, it goes on where it was. Exits with 1 if one failed."""
    from addenda import Learner, Registry
    from addenda import learner as learning
    from addenda.terminal import console, print_json, progress, show_log, table

    with Registry.open(registry) as opened:
        rows = learning.read_rows(file, opened)
        loaded = _backbone_to_learn_on(opened, backbone, weights, mean, std, precision, device)
        _print_price(loaded, [row.config for row in rows], quiet=as_json)
        learner = Learner(loaded, opened, learning.ActivationCache(budget_gb=cache_gb))
        with show_log(quiet=as_json), progress(quiet=as_json) as report:
            outcomes = list(learning.learn_many(learner, rows, new_version, skip_bad, report))
        records = [None if outcome.ref is None else opened.record(outcome.ref) for outcome in outcomes]
    missing = [outcome for outcome in outcomes if outcome.ref is None]
    if as_json:
        made = [{"sha256": r.sha256, "metrics": r.metrics} if r is not None else {} for r in records]
        print_json([vars(outcome) | more for outcome, more in zip(outcomes, made, strict=True)])
    else:
        lines = [
            (
                outcome.ref or outcome.name,
                *((r.data["num_images"], len(r.labels), *_headlines(r)) if r is not None else ("–",) * 6),
                f"{outcome.seconds:.1f}",
                outcome.state,
            )
            for outcome, r in zip(outcomes, records, strict=True)
        ]
        columns = ("task", "images", "classes", *HEADLINES, "seconds", "state")
        title = f"{len(rows) - len(missing)} of {len(rows)} tasks of {file} are in {registry}"
        console.print(table(title, columns, lines, right=("images", "classes", *HEADLINES[1:], "seconds")))
        for outcome in missing:
            console.print(f"{outcome.name} {outcome.state}: {outcome.reason}", markup=False, highlight=False)
    if missing:
        raise typer.Exit(1)


@app.command()
def evaluate(
    name: Annotated[str, typer.Argument(help="The task: NAME, NAME:VERSION or NAME@ALIAS.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder of class folders, or a .csv or .parquet listing; its test part where it has one."
        ),
    ],
    skip_bad: SkipBadOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Scores a task on labelled images and records the result."""
    from addenda import Learner, Registry
    from addenda.terminal import SCORES, console, percent, print_json, progress, table

    with Registry.open(registry, create=False) as opened:
        record = opened.record(name)
        objective = record.objective
        loaded = _recorded_backbone(opened, weights, device, fingerprint=record.backbone)
        with progress(quiet=as_json) as report:
            result = Learner(loaded, opened).evaluate(name, data, skip_bad, report)
    if as_json:
        print_json({"task": result.task, "generation": result.generation, "metrics": result.metrics,
                    "data": result.data_fingerprint, "logits_digest": result.logits_digest})  # fmt: skip
        return
    metrics = result.metrics
    scores = ", ".join(f"{called} {percent(metrics[key])} %" for key, called in SCORES[objective].items())
    console.print(
        f"{result.task} on {metrics['num_images']} images: {scores}. Recorded at generation {result.generation}."
    )
    title = "Accuracy by class" if objective == "single-label" else "Average precision by label"
    rows = [(label, percent(value)) for label, value in metrics["per_class"].items()]
    console.print(table(title, ("class" if objective == "single-label" else "label", "%"), rows, right=("%",)))


@tasks_app.command("list")
def tasks_list(
    retired: Annotated[bool, typer.Option("--retired", help="Show retired tasks too.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Lists every registered version of every task."""
    from addenda import Registry
    from addenda.terminal import console, print_json, size, table

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
            *_headlines(r),
            size(r.size_bytes + r.statistics_bytes),
            names[r.backbone],
            ", ".join(r.extends),
            r.created_at[:16].replace("T", " "),
        )
        for r in records
    ]
    columns = ("task", "classes", "memory", *HEADLINES, "size", "backbone", "extends", "learned")
    title = f"{len(rows)} task{'' if len(rows) == 1 else 's'} in {registry}, generation {generation}"
    console.print(table(title, columns, rows, right=("classes", "memory", *HEADLINES[1:], "size")))


@tasks_app.command("show")
def tasks_show(
    name: Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Shows all that is recorded of one task."""
    from addenda import Registry
    from addenda.registry import headline
    from addenda.terminal import SCORES, console, percent, print_json, table

    with Registry.open(registry, create=False) as opened:
        record, evaluations, task = opened.record(name), opened.evaluations(name), opened.get(name)
    if as_json:
        inside = {"adapter_rank": task.adapter_rank, "temperature": task.temperature}
        print_json(_record_json(record) | inside | {"evaluations": [vars(e) for e in evaluations]})
        return
    _show(record, task)
    if evaluations:
        kind = headline(record.objective)
        rows = [
            (
                e.created_at[:16].replace("T", " "),
                e.generation,
                e.metrics["num_images"],
                percent(e.metrics[kind]),
                e.data_fingerprint[:12],
                e.logits_digest[:12],
            )
            for e in evaluations
        ]
        columns = ("when", "generation", "images", f"{SCORES[record.objective][kind]} %", "data", "logits")
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
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer this task only; may be given again. 'auto' chooses one for each image, or says that it looks "
            "like none of their images."
        ),
    ] = None,
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

    paths, auto = _image_files(images), task == ["auto"]
    with Registry.open(registry, create=False) as opened:
        chosen = [opened.get(ref) for ref in task or () if not auto]
        loaded = _recorded_backbone(opened, weights, device, chosen[0].backbone if chosen else None)
        from addenda import CombinedModel

        model = CombinedModel(loaded, chosen or opened.load(loaded), exact=not inexact)
        router = _router(opened, model) if auto and model.tasks else None
    if not model.tasks:
        raise DataError(f"The registry {str(registry)!r} holds no active task. `addenda learn` adds one.")
    answers: dict[str, Any] = {}
    bad: list[str] = []
    with progress(quiet=as_json or as_csv or len(paths) < 16) as report:
        for done, start in enumerate(range(0, len(paths), model.micro_batch)):
            batch = paths[start : start + model.micro_batch]
            batch = _readable(batch, bad) if skip_bad else batch
            if router is not None:
                answers |= {str(path): one for path, one in zip(batch, model.route(batch, router, top), strict=True)}
            else:
                found = model.predict(batch, top)
                answers |= {str(path): {n: best[i] for n, best in found.items()} for i, path in enumerate(batch)}
            report("predicting", min((done + 1) * model.micro_batch, len(paths)), len(paths))
    for message in bad:
        typer.echo(f"left out: {message}", err=True)
    if router is not None:
        _show_routed(answers, model, as_json, as_csv)
        return
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
    adapter_rank: Annotated[int, typer.Option(min=0, help="Rank of its adapters; 0: none, as by default.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Loads a backbone and shows it, with the price of one task on it."""
    from addenda import load_backbone
    from addenda.combined import task_cost
    from addenda.terminal import console, print_json, size, table

    loaded = load_backbone(name, weights, _numbers(mean), _numbers(std), device="cpu")
    record = loaded.record()
    cost = task_cost(loaded, memory, adapter_rank)
    if as_json:
        print_json(record | {"task_cost": vars(cost)})
        return
    adapted = f" and adapters of rank {adapter_rank}" if adapter_rank else ""
    rows = [(key, str(value)) for key, value in record.items()]
    rows += [
        (f"one task with {memory} memory tokens{adapted}", f"{size(cost.token_bytes)}, its head apart"),
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
    stream: Annotated[
        str,
        typer.Argument(help="A stream of the package (digits, split-cifar10, …), a YAML file, or a folder to split."),
    ] = "digits",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; a run there goes on. Default: continual-STREAM.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Where the stream's folders of images lie.")] = None,
    split: Annotated[int | None, typer.Option(min=1, help="Experiences to split a folder's classes into.")] = None,
    methods: Annotated[str | None, typer.Option(help="Names with commas. Default: the file's, else all.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds. Default: the file's.")] = None,
    limit: Annotated[int | None, typer.Option(min=4, help="Training images of an experience, at most.")] = None,
    test_limit: Annotated[int | None, typer.Option(min=1, help="Test images of an experience, at most.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images: the baselines'.")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16", help="Train the baselines in bfloat16 autocast.")] = None,
    download: Annotated[bool | None, typer.Option("--download", help="Fetch missing images where that works.")] = None,
    backbone: BackboneOption = None,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Runs a stream of tasks, ours beside the methods that the field knows, and writes a report; see docs/avalanche.md.

    Exits with 1 if a logit of an old task of ours has moved by a bit.
    """
    from addenda import load_backbone
    from addenda.benchmarks.continual.config import read_config
    from addenda.benchmarks.continual.report import print_report
    from addenda.benchmarks.continual.run import run_continual
    from addenda.terminal import print_json, progress

    config = read_config(stream, {
        "backbone": {"name": backbone, "weights": weights, "mean": _numbers(mean), "std": _numbers(std)},
        "baselines": {"epochs": epochs, "autocast": bf16}, "seeds": seeds, "limit": limit, "test_limit": test_limit,
        "methods": methods.split(",") if methods else None, "download": download,
        **({"data": {"num_experiences": split}} if split is not None else {}),
    })  # fmt: skip
    chosen = config.backbone
    loaded = load_backbone(chosen.name, chosen.weights, chosen.mean, chosen.std, device=device)
    folder = out or Path(f"continual-{config.name}")
    with progress(quiet=as_json) as report:
        results = run_continual(config, loaded, folder, data, report)
    if as_json:
        print_json(results.to_json())
    else:
        print_report(results, folder)
    if not all(cell.identical in (True, None) for cell in results.of("addenda")):
        raise typer.Exit(1)


@bench_app.command("compare")
def bench_compare(
    one: Annotated[Path, typer.Argument(help="A report of `bench continual`: its folder, or its results.json.")],
    other: Annotated[Path, typer.Argument(help="Another of the same stream.")],
    as_json: JsonOption = False,
) -> None:
    """Compares two runs of a stream: what the second has more or less, beside the spread of both."""
    from addenda.benchmarks.continual.comparison import compare_reports, print_comparison
    from addenda.terminal import print_json

    comparison = compare_reports(one, other)
    if as_json:
        print_json(comparison.to_json())
    else:
        print_comparison(comparison)


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


@bench_app.command("paper")
def bench_paper(
    data: Annotated[Path, typer.Argument(help="A folder of data sets, each with train/ and test/.")],
    out: Annotated[Path, typer.Option(help="Folder of what is found; a run there goes on where it was stopped.")],
    sets: Annotated[str, typer.Option(help="Names of the sets, with commas, in order.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    limit: Annotated[int | None, typer.Option(min=4, help="Training images of a set. Default: all.")] = None,
    regimes: Annotated[
        str | None,
        typer.Option(help="Names with commas, such as full,head,memory-5,lora-8,pairs. Default: the paper's."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images, at most: ours.")] = 30,
    rival_epochs: Annotated[int, typer.Option(min=1, help="The same of full, lora and unmasked.")] = 8,
    views: Annotated[int, typer.Option(min=0, help="Random views of each image to learn from; 0: as it is.")] = 3,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train full, lora and unmasked in bfloat16 autocast.")] = False,
    backbone: BackboneOption = DEFAULT_BACKBONE,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Compares the paper's regimes, masked and not, with LoRA and full fine-tuning on any sets, over several seeds."""
    from dataclasses import replace

    from addenda import load_backbone
    from addenda.benchmarks.paper import OURS, REGIMES, Comparison, run_paper
    from addenda.learner import Augmentation
    from addenda.learner.regimes import RivalConfig

    varied = Augmentation(views=views)
    comparison = Comparison(
        load_backbone(backbone or DEFAULT_BACKBONE, weights, _numbers(mean), _numbers(std), device=device), data, limit,
        replace(OURS, epochs=epochs, augmentation=varied),
        RivalConfig(epochs=rival_epochs, augmentation=varied, autocast=bf16),
    )  # fmt: skip
    cells = run_paper(comparison, sets.split(","), seeds, regimes.split(",") if regimes else REGIMES, out)
    if not all(cell.get("identical", True) for cell in cells):
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; bad input is one line and exit code 2, never a traceback."""
    try:
        app()
    except AddendaError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a place that may not be read or written, or whose name cannot be one
        typer.echo(f"Error: {str(error)[:500]}.", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("Interrupted. Nothing half done was registered.", err=True)
        raise


def _settings(file: Path | None, given: dict[str, Any], augmentation: dict[str, Any]) -> LearnConfig:
    """Settings by precedence: defaults, file, command line."""
    from addenda import LearnConfig
    from addenda.learner import read_mapping

    values = {} if file is None else read_mapping(file)
    varied = {key: value for key, value in augmentation.items() if value is not None}
    own = values.get("augmentation") or {}
    if varied and isinstance(own, dict):
        values["augmentation"] = own | varied
    return LearnConfig.parse(values | {key: value for key, value in given.items() if value is not None})


def _print_price(backbone: FrozenBackbone, configs: Sequence[LearnConfig], quiet: bool) -> None:
    """Says on standard error what the largest adapters that are asked for cost, beside a task without."""
    from addenda.combined import task_cost
    from addenda.terminal import size

    sweep = [candidate for config in configs if not config.head_only for candidate in config.candidates]
    rank, memory = max(((one.adapter_rank, one.num_memory_tokens) for one in sweep), default=(0, 0))
    if quiet or not rank:
        return
    plain, adapted = task_cost(backbone, memory), task_cost(backbone, memory, rank)
    typer.echo(
        f"Adapters of rank {rank} weigh {size(adapted.token_bytes - plain.token_bytes)}, beside "
        f"{size(plain.token_bytes)} of token and memory; a task takes {100 * adapted.relative_operations:.2f} % of the "
        f"backbone's arithmetic, {100 * plain.relative_operations:.2f} % without.",
        err=True,
    )


def _single(values: list[Any] | None) -> Any:
    """An option that may be given again, given once."""
    return values[0] if values is not None and len(values) == 1 else values


def _ranks(given: list[str] | None) -> Any:
    """--adapter-rank as the configuration has it: the word auto, or whole numbers."""
    if given is None:
        return None
    if given == ["auto"]:
        return "auto"
    if not all(rank.isdecimal() for rank in given):
        raise DataError(f"--adapter-rank is {' '.join(given)!r}: give whole numbers, or the one word auto.")
    return _single([int(rank) for rank in given])


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


def _readable(paths: Sequence[Path], bad: list[str]) -> list[Path]:
    """The images that can be read; what is wrong with the others is noted."""
    from addenda.backbones import read_image

    good = []
    for path in paths:
        try:
            read_image(path)
            good.append(path)
        except DataError as error:
            bad.append(str(error))
    return good


def _router(registry: Registry, model: CombinedModel) -> Router:
    """A router of a model's tasks; those that it cannot know of are named on standard error."""
    from addenda.combined import Router

    kept = {name: registry.statistics(task.ref) for name, task in model.tasks.items()}
    known = {name: statistics for name, statistics in kept.items() if statistics is not None}
    left_out = [name for name in kept if name not in known]
    if left_out:
        typer.echo(
            f"Not chosen from, since nothing was kept of their images: {', '.join(left_out)}. (Single-label tasks keep "
            "statistics when they are learned.)",
            err=True,
        )
    if not known:
        raise DataError("There is no task to choose from: nothing was kept of any task's images.")
    return Router(known)


def _show_routed(
    answers: dict[str, tuple[Choice, list[tuple[str, float]]]], model: CombinedModel, as_json: bool, as_csv: bool
) -> None:
    """Prints which task was chosen for each image, and its answer."""
    from addenda.terminal import console, print_json, table

    if as_json:
        images = {
            path: choice._asdict() | {"labels": [{"label": label, "probability": p} for label, p in best]}
            for path, (choice, best) in answers.items()
        }
        print_json({"exact": model.exact, "images": images})
        return
    if as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(("image", "task", "task_probability", "familiar", "label", "probability"))
        writer.writerows((path, *choice, *pair) for path, (choice, best) in answers.items() for pair in best)
        return
    rows = [
        (
            path,
            choice.task if choice.familiar else f"none; nearest {choice.task}",
            f"{100 * choice.probability:.0f} %",
            ", ".join(f"{label} {100 * p:.0f} %" for label, p in best) if choice.familiar else "–",
        )
        for path, (choice, best) in answers.items()
    ]
    title = f"{len(rows)} images, the task chosen among {len(model.tasks)}" + ("" if model.exact else ", not exact")
    console.print(table(title, ("image", "task", "sure", "labels"), rows))


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


HEADLINES = ("score", "val %", "test %", "regression %")


def _headlines(record: TaskRecord) -> tuple[str, ...]:
    """The figures that stand for a task, as HEADLINES names them."""
    from addenda.registry import headline
    from addenda.terminal import SCORES, percent

    kind, metrics = headline(record.objective), record.metrics
    parts = (metrics.get("validation", {}), metrics.get("test", {}), metrics.get("regression", {}).get("test", {}))
    return SCORES[record.objective][kind], *(percent(part.get(kind)) for part in parts)


def _show(record: TaskRecord, task: Task) -> None:
    """A task for people: what it is, how good beside its rival, where it came from."""
    from addenda.terminal import SCORES, console, percent, size, table

    labels = ", ".join(record.labels[:12]) + (", …" if len(record.labels) > 12 else "")
    weight = f"{record.num_parameters:,} parameters, {size(record.size_bytes)}"
    rows = [
        ("classes", f"{len(record.labels)}: {labels}"),
        ("objective", record.objective),
        ("memory tokens", f"{record.num_memory_tokens} in each layer; {weight}"),
        ("extends", ", ".join(record.extends) or "nothing"),
        ("temperature", f"{task.temperature:.3g}"),
        (
            "statistics",
            f"{size(record.statistics_bytes)}, for choosing the task" if record.statistics_bytes else "none",
        ),
        ("learned from", f"{record.data.get('num_images', '?')} images"),
        ("sha256", record.sha256),
        ("registered", f"{record.created_at[:19].replace('T', ' ')} UTC by {record.created_by}"),
    ]
    if task.adapter_rank:
        rows.insert(3, ("adapters", f"of rank {task.adapter_rank}"))
    metrics = record.metrics
    if "candidates" in metrics:
        chosen, text = metrics["chosen"], "the regression was better on validation: the token adds nothing"
        if chosen is not None:
            used = {key: value for key, value in chosen.items() if task.adapter_rank or not key.startswith("adapter")}
            settings = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in used.items())
            text = f"{settings}; of {len(metrics['candidates'])} candidates"
        rows.insert(-3, ("chosen", text))
    if record.retired is not None:
        rows.append(("retired", record.retired or "yes"))
    console.print(table(record.ref, ("", "value"), rows))
    rival, shown = metrics.get("regression", {}), SCORES[record.objective]
    scores = []
    for part in (part for part in ("validation", "test") if part in metrics):
        pair = (metrics[part], rival.get(part, {}))
        scores.append((f"{part} ({pair[0]['num_images']})", *(percent(m.get(kind)) for kind in shown for m in pair)))
    if scores:
        columns = ("part", *(column for called in shown.values() for column in (called, "regression")))
        title = "Scores in %, beside the logistic regression on the same images"
        console.print(table(title, columns, scores, right=columns[1:]))


if __name__ == "__main__":
    main()
