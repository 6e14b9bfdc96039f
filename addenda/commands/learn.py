"""The commands `learn`, `learn-many` and `evaluate`: learn one task or many, and evaluate a registered one."""

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
from addenda.terminal import (
    PER_CLASS,
    SCORES,
    console,
    percent,
    print_json,
    print_result,
    progress,
    show_log,
    size,
    table,
)
from addenda.text import plural, shown_lines


def learn(
    context: typer.Context,
    name: Annotated[str, Argument(help="Name of the task.")],
    data: Annotated[
        Path,
        Argument(
            help="Training images: a folder of class folders, or a .csv or .parquet listing with the columns path and "
            "label (multi-label: labels). A folder may hold train/ and test/, a listing may have a column split."
        ),
    ],
    test: Annotated[
        Path | None,
        Option(help="Test images, evaluated once: a folder or listing. Default: the test split of DATA, if any."),
    ] = None,
    memory: Annotated[list[int] | None, Option(help=f"Memory tokens per layer. {options.REPEAT} Default: 5.")] = None,
    head_only: Annotated[
        bool | None,
        Option("--head-only", help="Train no tokens: the task is the layer probe (--no-layer-head: the linear probe)."),
    ] = None,
    layer_head: Annotated[
        bool | None,
        Option(
            "--layer-head/--no-layer-head",
            help="Let the head also read the layer features of earlier blocks, weighted by cross-validation. "
            "Default: yes.",
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        Option(
            help="Regular expression: its match, or first capture group, in an image's path within DATA is the image's "
            "group, such as a video. Validation holds out whole groups. Default: no groups."
        ),
    ] = None,
    adapter_rank: Annotated[
        list[str] | None,
        Option(
            help=f"Rank of the task's adapters (low-rank updates). {options.REPEAT} 'auto' tries rank 8 and keeps it "
            "if validation loss falls by more than one standard error. Default: 0, no adapters."
        ),
    ] = None,
    adapter_lr: Annotated[
        list[float] | None,
        Option(help=f"Learning rate of the adapters. {options.REPEAT} Default: 0.001 and 0.002 (sgd: 0.1 and 0.3)."),
    ] = None,
    extends: Annotated[
        list[str] | None,
        Option(
            help="Registered task whose tokens this task attends to; repeat for several. 'auto' tries the most "
            "promising and keeps those that lower validation loss by more than one standard error. Default: none."
        ),
    ] = None,
    epochs: Annotated[int | None, Option(help="Training epochs; early stopping may end sooner. Default: 30.")] = None,
    batch_size: Annotated[int | None, Option(help="Images per optimiser step. Default: 64.")] = None,
    lr: Annotated[
        list[float] | None,
        Option(
            help=f"Learning rate of class token and memory tokens. {options.REPEAT} Default: 0.001 and 0.003 (sgd: "
            "0.1, 0.3 and 1.0)."
        ),
    ] = None,
    weight_decay: Annotated[
        list[float] | None,
        Option(help=f"Weight decay of tokens and adapters. {options.REPEAT} Default: 0.05 (sgd: 0)."),
    ] = None,
    optimizer: Annotated[
        str | None, Option(help="Optimiser: adamw, or sgd with momentum, as in Sandler et al. Default: adamw.")
    ] = None,
    label_smoothing: Annotated[float | None, Option(help="Label smoothing, from 0 to below 1. Default: 0.")] = None,
    class_weights: Annotated[
        str | None, Option(help="none, or balanced: weight classes inversely to their frequency. Default: none.")
    ] = None,
    refit: Annotated[
        bool | None,
        Option(
            "--refit/--no-refit", help="Refit probe and token to training and validation images together. Default: yes."
        ),
    ] = None,
    views: Annotated[
        int | None,
        Option(help="Cached random views of each training image, beside the image itself; 0 for none. Default: 3."),
    ] = None,
    fresh: Annotated[
        bool | None,
        Option("--fresh", help="Draw new random views in every epoch instead of caching them; slow. Default: cached."),
    ] = None,
    seed: Annotated[
        list[int] | None,
        Option(
            help="Seed of the split, the image order and the initial tokens. Repeat to try several, which differ in "
            "the initial tokens only. Default: 0."
        ),
    ] = None,
    cache_gb: options.CacheGb = None,
    config: Annotated[
        Path | None, Option(help="YAML file of LearnConfig settings; command-line options override it. Default: none.")
    ] = None,
    new_version: options.NewVersion = False,
    grow: Annotated[
        bool,
        Option(
            "--grow",
            help="Register the next version of task NAME, with the further classes or images in DATA, without its "
            "earlier images. Takes no training settings.",
        ),
    ] = False,
    skip_bad: options.SkipBad = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    img_size: options.ImgSize = None,
    precision: options.Precision = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Learns a task from labelled images and registers it.

    A fifth of the images is held out for validation, which selects and calibrates the task.
    """
    from addenda.registry import check_new_name

    if not grow:
        check_new_name(name)  # before the imports that take seconds

    from addenda.combined import recorded_backbone
    from addenda.learner import ActivationCache, open_parts

    single = options.single
    given_options = {
        "num_memory_tokens": single(memory), "head_only": head_only, "adapter_rank": options.ranks(adapter_rank),
        "adapter_learning_rate": single(adapter_lr), "extends": "auto" if extends == ["auto"] else extends,
        "epochs": epochs, "seed": single(seed), "batch_size": batch_size, "learning_rate": single(lr),
        "weight_decay": single(weight_decay), "optimizer": optimizer, "label_smoothing": label_smoothing,
        "class_weights": class_weights, "refit": refit, "layer_head": layer_head, "group_by": group_by,
    }  # fmt: skip
    augmentation = {"views": views, "fresh": fresh}
    if grow:
        options.check_growing(context)
    settings = options.learn_settings(config, given_options, augmentation)
    if not grow:
        open_parts(data, test, skip_bad)  # a wrong path is reported before weights are fetched or a registry is made
    with options.open_registry(registry, create=not grow) as opened:
        before = opened.generation
        if grow:
            fingerprint = opened.record(name).backbone
            loaded = recorded_backbone(opened, weights, device, fingerprint)
        else:
            loaded = options.backbone_to_learn_on(opened, backbone, weights, mean, std, img_size, precision, device)
            if memory is not None and not settings.head_only:
                loaded.check_tokens("--memory")
            _print_cost(loaded, [settings], quiet=as_json)
        learner = addenda.Learner(loaded, opened, ActivationCache(budget_gb=cache_gb))
        with show_log(quiet=as_json), progress(quiet=as_json) as report:
            if grow:
                task = learner.grow(name, data, test, skip_bad, report)
            else:
                task = learner.learn(
                    name, data, test, settings, new_version=new_version, skip_bad=skip_bad, report=report
                )
        record, after = opened.record(task.ref), opened.generation
    already, test_data = record.generation <= before, task.data.get("test", {})
    if as_json:
        print_json({"task": task.ref, "sha256": task.sha256, "already": already, "grown_from": record.grown_from,
                    "metrics": dict(task.metrics), **_data_summary(task.data)})  # fmt: skip
        return
    if already:
        action = "nothing was done" if after == before else "it was now evaluated on this test split"
        console.print(f"{task.ref} was already learned from these images with these settings; {action}.")
    elif record.grown_from:
        added, known = task.data["grown_from"]["added"], task.data["grown_from"]["known"]
        verb = "was" if known == 1 else "were"
        left_out = f"; {plural(known, 'image')} that it was learned from {verb} left out" if known else ""
        console.print(f"{task.ref} was grown from {record.grown_from} by {plural(added, 'image')}{left_out}.")
    when = "skipped when it was learned" if already else "skipped"
    for message in task.data["skipped"]:
        console.print(f"{when}: {message}", soft_wrap=True)
    for message in test_data.get("skipped", ()):
        console.print(f"skipped: {message}", soft_wrap=True)
    show_task(record, task.metrics)


def _data_summary(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON output says about the training and test images."""
    return {key: data.get(key) for key in ("repeated", "skipped", "left_out", "test")}


def learn_many(
    file: Annotated[
        Path,
        Argument(
            help="YAML file with `tasks`, a list of entries with name and data, and optionally test, extends and "
            "config; an optional `config` applies to all. Paths are relative to the file."
        ),
    ],
    ray: Annotated[
        str | None,
        Option(help=f"Learn in parallel on a Ray cluster: {options.RAY} Default: one task after another, without Ray."),
    ] = None,
    cpus: Annotated[int | None, Option(min=1, help="With --ray: CPUs, and so threads, per task. Default: 1.")] = None,
    gpus: Annotated[
        float | None, Option(min=0, max=1, help="With --ray: share of a GPU per task, from 0 to 1. Default: 0.")
    ] = None,
    new_version: options.NewVersion = False,
    skip_bad: options.SkipBad = False,
    cache_gb: options.CacheGb = None,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    img_size: options.ImgSize = None,
    precision: options.Precision = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Learns the tasks listed in a YAML file; repeat the command to resume. Exits with 1 if a task failed."""
    from addenda import learner as learning

    if ray is None and (cpus is not None or gpus is not None):
        raise AddendaError("--cpus and --gpus require --ray.")
    if options.is_absent(registry):
        learning.read_rows(file, None, skip_bad)  # a faulty file is refused before a registry is created
    with options.open_registry(registry, create=True) as opened:
        rows = learning.read_rows(file, opened, skip_bad)
        loaded = options.backbone_to_learn_on(
            opened, backbone, weights, mean, std, img_size, precision, "cpu" if ray else device
        )
        _print_cost(loaded, [row.config for row in rows], quiet=as_json)
        with show_log(quiet=as_json), progress(quiet=as_json) as report:
            if ray is None:
                learner = addenda.Learner(loaded, opened, learning.ActivationCache(budget_gb=cache_gb))
                outcomes = list(learning.learn_many(learner, rows, new_version, skip_bad, report))
            else:
                from addenda.distributed.cluster import connected
                from addenda.distributed.ray_learner import LearningJob, learn_on_cluster

                workplace = options.workplace(registry, opened, weights, device, gpus, loaded.fingerprint)
                job = LearningJob(workplace, cpus or 1, gpus or 0, new_version, skip_bad, cache_gb)
                with connected(ray):
                    opened.add_backbone(loaded.record())
                    outcomes = learn_on_cluster(job, rows, opened, report)
        records = [None if outcome.ref is None else opened.record(outcome.ref) for outcome in outcomes]
    missing = [outcome for outcome in outcomes if outcome.ref is None]
    if as_json:
        results = [{key: value for key, value in vars(outcome).items() if key != "data"} for outcome in outcomes]
        for result, outcome, record in zip(results, outcomes, records, strict=True):
            result |= {} if record is None else {"sha256": record.sha256, **_data_summary(outcome.data)}
        print_json(results)
    else:
        columns = ["task", "images", "classes", *HEADLINES, "seconds", "state"]
        lines: list[list[object]] = []
        for outcome, r in zip(outcomes, records, strict=True):
            cells = [r.data["num_images"], len(r.labels), *headlines(r, outcome.metrics)] if r else ["–"] * 6
            lines.append([outcome.ref or outcome.name, *cells, f"{outcome.seconds:.1f}", outcome.state])
        if not {line[3] for line in lines} - {"accuracy", "–"}:  # no column for the score's name
            columns, lines = columns[:3] + columns[4:], [line[:3] + line[4:] for line in lines]
        title = f"{len(rows) - len(missing)} of {len(rows)} tasks of {file} learned; registry {opened.location}"
        console.print(table(title, columns, lines, right=("images", "classes", *HEADLINES[1:], "seconds")))
        for outcome in outcomes:
            for message in (*outcome.data.get("skipped", ()), *outcome.data.get("test", {}).get("skipped", ())):
                console.print(f"{outcome.name}, skipped: {message}", soft_wrap=True)
        for outcome in missing:
            reason = shown_lines(f"{outcome.name} {outcome.state}: {outcome.reason}")
            console.print(reason)
    if missing:
        raise typer.Exit(1)


def evaluate(
    name: options.Ref,
    data: Annotated[
        Path,
        Argument(
            help="Labelled images: a folder of class folders, or a .csv or .parquet listing. If it has splits, the "
            "test split is evaluated."
        ),
    ],
    skip_bad: options.SkipBad = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    weights: options.Weights = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Evaluates a task on labelled images and records the result."""
    from addenda.combined import recorded_backbone

    with options.open_registry(registry) as opened:
        record = opened.record(name)
        loaded = recorded_backbone(opened, weights, device, record.backbone)
        with show_log(quiet=as_json), progress(quiet=as_json) as report:
            result = addenda.Learner(loaded, opened).evaluate(name, data, skip_bad, report)
    metrics = result.metrics
    scores = ", ".join(f"{title} {percent(metrics[key])} %" for key, title in SCORES[record.objective].items())
    skipped = f" ({metrics['skipped']} skipped)" if metrics.get("skipped") else ""
    summary = f"{result.task} on {metrics['num_images']} images{skipped}: {scores}."
    figure, unit = PER_CLASS[record.objective]
    rows = [(label, percent(value)) for label, value in metrics["per_class"].items()]
    print_result(
        as_json,
        {"task": result.task, "generation": result.generation, "metrics": metrics,
         "data": result.data_fingerprint, "logits_digest": result.logits_digest},
        f"{summary} Recorded at generation {result.generation}.",
        table(f"{figure.capitalize()} by {unit}", (unit, "%"), rows, right=("%",)),
    )  # fmt: skip


def _print_cost(backbone: addenda.FrozenBackbone, configs: Sequence[addenda.LearnConfig], quiet: bool) -> None:
    """Prints on standard error what the largest requested adapters add to the cost of a task."""
    from addenda.combined import task_cost

    sweep = [candidate for config in configs if not config.head_only for candidate in config.candidates]
    rank, memory = max(((settings.adapter_rank, settings.num_memory_tokens) for settings in sweep), default=(0, 0))
    if quiet or not rank or backbone.token_obstacle() is not None:
        return
    plain, adapted = task_cost(backbone, memory), task_cost(backbone, memory, rank)
    typer.echo(
        f"Adapters of rank {rank} add {size(adapted.token_bytes - plain.token_bytes)} to the "
        f"{size(plain.token_bytes)} of class token and memory tokens; a task takes "
        f"{100 * adapted.relative_operations:.2f} % of the backbone's arithmetic instead of "
        f"{100 * plain.relative_operations:.2f} %.",
        err=True,
    )
