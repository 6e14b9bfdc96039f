"""Learning tasks, one or a file of them, and scoring them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import addenda
from addenda.commands import options
from addenda.commands.tasks import HEADLINES, headlines, show_task
from addenda.exceptions import AddendaError
from addenda.terminal import PER_CLASS, SCORES, answer, console, percent, print_json, progress, show_log, size, table
from addenda.text import shown_lines


def learn(
    name: Annotated[str, Argument(help="What to call the task.")],
    data: Annotated[
        Path,
        Argument(
            help="A folder of class folders, or a .csv or .parquet listing with the columns path and label (or labels, "
            "any number of them). A folder may hold train/ and test/, a listing a column split."
        ),
    ],
    test: Annotated[
        Path | None, Option(help="Test images, scored once: a folder or listing. Default: the test part of DATA.")
    ] = None,
    memory: Annotated[list[int] | None, Option(help="Memory tokens in each layer, to try; may be given again.")] = None,
    head_only: Annotated[
        bool | None, Option("--head-only", help="No token: the better probe of the frozen network alone.")
    ] = None,
    layer_head: Annotated[
        bool | None, Option("--layer-head/--no-layer-head", help="Read every block's output too. Default: yes.")
    ] = None,
    group_by: Annotated[
        str | None,
        Option(
            help="A regular expression that finds in a file's path what the image belongs to, such as its video; what "
            "belongs together is held out together."
        ),
    ] = None,
    adapter_rank: Annotated[
        list[str] | None,
        Option(
            help="Rank of the task's own low-rank updates, to try; may be given again. 'auto' takes them where "
            "validation says they pay. Default: none."
        ),
    ] = None,
    adapter_lr: Annotated[
        list[float] | None, Option(help="A learning rate of the adapters to try; may be given again.")
    ] = None,
    extends: Annotated[
        list[str] | None, Option(help="A task to extend; may be given again. 'auto' takes those that help, or none.")
    ] = None,
    epochs: Annotated[int | None, Option(help="Passes over the training images, at most.")] = None,
    batch_size: Annotated[int | None, Option(help="Images in an optimiser step.")] = None,
    lr: Annotated[list[float] | None, Option(help="A learning rate to try; may be given again.")] = None,
    weight_decay: Annotated[list[float] | None, Option(help="A weight decay to try; may be given again.")] = None,
    optimizer: Annotated[str | None, Option(help="sgd (the paper) or adamw.")] = None,
    label_smoothing: Annotated[
        float | None, Option(help="Share of each target that all classes get alike; below 1.")
    ] = None,
    class_weights: Annotated[
        str | None, Option(help="none, or balanced: each class's images weigh as much together as any other's.")
    ] = None,
    refit: Annotated[bool | None, Option("--refit/--no-refit", help="Train the winner on all images.")] = None,
    views: Annotated[int | None, Option(help="Random views of each image to learn from; 0: as it is.")] = None,
    fresh: Annotated[bool | None, Option("--fresh", help="New views in each epoch, none kept: slow.")] = None,
    seed: Annotated[list[int] | None, Option(help="Seed of split, memory and order; more to try more.")] = None,
    cache_gb: options.CacheGb = None,
    config: Annotated[Path | None, Option(help="YAML file of settings; options given here win.")] = None,
    new_version: options.NewVersion = False,
    skip_bad: options.SkipBad = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    precision: options.Precision = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Learns a task from images and registers it."""
    from addenda.learner import ActivationCache, open_parts
    from addenda.registry import check_new_name

    single = options.single
    given = {
        "num_memory_tokens": single(memory), "head_only": head_only, "adapter_rank": options.ranks(adapter_rank),
        "adapter_learning_rate": single(adapter_lr), "extends": "auto" if extends == ["auto"] else extends,
        "epochs": epochs, "seed": single(seed), "batch_size": batch_size, "learning_rate": single(lr),
        "weight_decay": single(weight_decay), "optimizer": optimizer, "label_smoothing": label_smoothing,
        "class_weights": class_weights, "refit": refit, "layer_head": layer_head, "group_by": group_by,
    }  # fmt: skip
    settings = options.learn_settings(config, given, {"views": views, "fresh": fresh})
    check_new_name(name)
    open_parts(data, test, skip_bad)  # a wrong path is reported before weights are fetched or a registry is made
    with options.open_registry(registry, create=True) as opened:
        before = opened.generation
        loaded = options.backbone_to_learn_on(opened, backbone, weights, mean, std, precision, device)
        _print_price(loaded, [settings], quiet=as_json)
        learner = addenda.Learner(loaded, opened, ActivationCache(budget_gb=cache_gb))
        with show_log(quiet=as_json), progress(quiet=as_json) as report:
            task = learner.learn(name, data, test, settings, new_version=new_version, skip_bad=skip_bad, report=report)
        record, after = opened.record(task.ref), opened.generation
    already, of_test = record.generation <= before, task.data.get("test", {})
    if as_json:
        print_json({"task": task.ref, "sha256": task.sha256, "already": already, "metrics": dict(task.metrics),
                    **_found_of(task.data)})  # fmt: skip
        return
    if already:
        done = "nothing was done" if after == before else "it was scored on this test set now"
        console.print(f"{task.ref} was learned before from these images with these settings; {done}.")
    for message in (*task.data["skipped"], *of_test.get("skipped", ())):
        console.print(f"left out: {message}", markup=False, highlight=False, soft_wrap=True)
    show_task(record)


def _found_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """What was found out about the images that a task was learned from and scored on, for programs."""
    return {key: data.get(key) for key in ("repeated", "skipped", "left_out", "test")}


def learn_many(
    file: Annotated[
        Path,
        Argument(
            help="YAML with tasks: a list of name, data, and where wanted test, extends and config; and, for all of "
            "them, config. Paths are relative to the file."
        ),
    ],
    ray: Annotated[
        str | None,
        Option(help="Learn side by side on a Ray cluster: 'local' starts one here, 'auto' is on, or HOST:PORT."),
    ] = None,
    cpus: Annotated[
        int | None, Option(min=1, help="With --ray: CPUs of each task, and its threads. Default: 1.")
    ] = None,
    gpus: Annotated[
        float | None, Option(min=0, max=1, help="With --ray: each task's share of a GPU. Default: 0.")
    ] = None,
    new_version: options.NewVersion = False,
    skip_bad: options.SkipBad = False,
    cache_gb: options.CacheGb = None,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    precision: options.Precision = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Learns tasks from a file, in order; given again, it goes on where it was. Exits with 1 if one failed."""
    from addenda import learner as learning

    if ray is None and (cpus is not None or gpus is not None):
        raise AddendaError("--cpus and --gpus are what a task takes of a cluster: say which, with --ray.")
    with options.open_registry(registry, create=True) as opened:
        rows = learning.read_rows(file, opened, skip_bad)
        loaded = options.backbone_to_learn_on(opened, backbone, weights, mean, std, precision, "cpu" if ray else device)
        _print_price(loaded, [row.config for row in rows], quiet=as_json)
        with show_log(quiet=as_json), progress(quiet=as_json) as report:
            if ray is None:
                learner = addenda.Learner(loaded, opened, learning.ActivationCache(budget_gb=cache_gb))
                outcomes = list(learning.learn_many(learner, rows, new_version, skip_bad, report))
            else:
                from addenda.distributed.cluster import connected
                from addenda.distributed.ray_learner import LearningJob, learn_on_cluster

                place = options.workplace(registry, opened, weights, device, gpus, loaded.fingerprint)
                job = LearningJob(place, cpus or 1, gpus or 0, new_version, skip_bad, cache_gb)
                with connected(ray):
                    opened.add_backbone(loaded.record())
                    outcomes = learn_on_cluster(job, rows, opened, report)
        records = [None if outcome.ref is None else opened.record(outcome.ref) for outcome in outcomes]
    missing = [outcome for outcome in outcomes if outcome.ref is None]
    if as_json:
        found = [{key: held for key, held in vars(outcome).items() if key != "data"} for outcome in outcomes]
        for told, outcome, r in zip(found, outcomes, records, strict=True):
            told |= {} if r is None else {"sha256": r.sha256, **_found_of(outcome.data)}
        print_json(found)
    else:
        columns = ["task", "images", "classes", *HEADLINES, "seconds", "state"]
        lines: list[list[object]] = []
        for outcome, r in zip(outcomes, records, strict=True):
            what = [r.data["num_images"], len(r.labels), *headlines(r, outcome.metrics)] if r else ["–"] * 6
            lines.append([outcome.ref or outcome.name, *what, f"{outcome.seconds:.1f}", outcome.state])
        if not {line[3] for line in lines} - {"accuracy", "–"}:  # which score it is goes without saying
            columns, lines = columns[:3] + columns[4:], [line[:3] + line[4:] for line in lines]
        title = f"{len(rows) - len(missing)} of {len(rows)} tasks of {file} are in {opened.location}"
        console.print(table(title, columns, lines, right=("images", "classes", *HEADLINES[1:], "seconds")))
        for outcome in missing:
            reason = shown_lines(f"{outcome.name} {outcome.state}: {outcome.reason}")
            console.print(reason, markup=False, highlight=False)
    if missing:
        raise typer.Exit(1)


def evaluate(
    name: Annotated[str, Argument(help="The task: NAME, NAME:VERSION or NAME@ALIAS.")],
    data: Annotated[
        Path, Argument(help="A folder of class folders, or a .csv or .parquet listing; its test part where it has one.")
    ],
    skip_bad: options.SkipBad = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    weights: options.Weights = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Scores a task on labelled images and records the result."""
    from addenda.combined import recorded_backbone

    with options.open_registry(registry) as opened:
        record = opened.record(name)
        loaded = recorded_backbone(opened, weights, device, fingerprint=record.backbone)
        with show_log(quiet=as_json), progress(quiet=as_json) as report:
            result = addenda.Learner(loaded, opened).evaluate(name, data, skip_bad, report)
    metrics = result.metrics
    scores = ", ".join(f"{called} {percent(metrics[key])} %" for key, called in SCORES[record.objective].items())
    skipped = f" ({metrics['skipped']} left out)" if metrics.get("skipped") else ""
    said = f"{result.task} on {metrics['num_images']} images{skipped}: {scores}."
    figure, each = PER_CLASS[record.objective]
    rows = [(label, percent(value)) for label, value in metrics["per_class"].items()]
    answer(
        as_json,
        {"task": result.task, "generation": result.generation, "metrics": metrics,
         "data": result.data_fingerprint, "logits_digest": result.logits_digest},
        f"{said} Recorded at generation {result.generation}.",
        table(f"{figure.capitalize()} by {each}", (each, "%"), rows, right=("%",)),
    )  # fmt: skip


def _print_price(backbone: addenda.FrozenBackbone, configs: Sequence[addenda.LearnConfig], quiet: bool) -> None:
    """Says on standard error what the largest adapters that are asked for cost, beside a task without."""
    from addenda.combined import task_cost

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
