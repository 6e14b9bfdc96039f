"""The `predict` command: predictions of every task, or of the task that a router chooses for each image."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

import addenda
from addenda.commands import options
from addenda.exceptions import AddendaError, DataError
from addenda.terminal import console, print_json, progress, size, table
from addenda.text import csv_row, estimate, plural, shown

if TYPE_CHECKING:
    from addenda.backbones import LeftOut
    from addenda.combined import Choice, Router
    from addenda.distributed.prediction import Summary

Best = Sequence[tuple[str, float]]
"""Labels with their probabilities."""
Rendered = tuple[dict[str, Any], list[tuple[Any, ...]], tuple[str, Sequence[str], list[tuple[str, ...]]]]
"""Predictions in each output format: `images` of the JSON; CSV rows with header; title, columns and rows of a table."""


def predict(
    images: Annotated[list[Path], Argument(help="Image files, or folders of images.")],
    task: Annotated[
        list[str] | None,
        Option(
            help="Task to predict with: NAME, NAME:VERSION, NAME@ALIAS, or a pattern with * over the newest versions; "
            "repeat for several. 'auto' chooses one task for each image, or reports that the image resembles none. "
            "Default: the newest version of each task."
        ),
    ] = None,
    tag: Annotated[str | None, Option(help="Predict only with tasks whose newest version has this tag.")] = None,
    top: Annotated[
        int | None,
        Option(
            min=1, help="Labels per task, at most. Default: 3; with --min-probability, or for a multi-label task, all."
        ),
    ] = None,
    min_probability: Annotated[
        float | None,
        Option(min=0, max=1, help="Minimum probability of a label. Default: 0; for a multi-label task 0.5."),
    ] = None,
    skip_bad: options.SkipBad = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    backbone: options.RecordedBackbone = None,
    weights: options.Weights = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    as_csv: Annotated[
        bool,
        Option(
            "--csv",
            help="Print CSV for spreadsheets: one row per image, task and predicted label. Text that a spreadsheet "
            "would take for a formula begins with '; programs read --json.",
        ),
    ] = False,
    inexact: Annotated[
        bool,
        Option(
            "--inexact",
            help="Skip the exactness self-test and the padding of batches; bitwise reproducibility is then not "
            "guaranteed.",
        ),
    ] = False,
    ray: Annotated[
        str | None, Option(help=f"Predict on a Ray cluster, into --out: {options.RAY} Default: without Ray.")
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            help="With --ray: output folder for Parquet files, on storage that all nodes share. Repeat the command to "
            "compute missing files."
        ),
    ] = None,
    part_size: Annotated[int | None, Option(min=1, help="With --ray: images per Parquet file. Default: 1000.")] = None,
    workers: Annotated[
        int | None, Option(min=1, help="With --ray: maximum number of workers. Default: as many as fit on the cluster.")
    ] = None,
    cpus: Annotated[int | None, Option(min=1, help="With --ray: CPUs, and so threads, per worker. Default: 1.")] = None,
    gpus: Annotated[
        float | None, Option(min=0, max=1, help="With --ray: share of a GPU per worker, from 0 to 1. Default: 0.")
    ] = None,
) -> None:
    """Predicts with every active task, in one forward pass per batch of images."""
    auto = task == ["auto"]
    if as_json and as_csv:
        raise AddendaError("--json and --csv exclude each other; give one of them.")
    if task is not None and "auto" in task and not auto:
        raise AddendaError("--task auto chooses among all tasks; give it alone, or give task names without it.")
    if auto and tag is not None:
        raise AddendaError("--task auto chooses among all tasks and cannot be combined with --tag.")
    if ray is not None:
        if tag is not None or any("*" in ref for ref in task or ()):
            raise AddendaError("--tag and patterns cannot be used with --ray; name each task with --task.")
        if as_csv or auto:
            option = "--csv" if as_csv else "--task auto"
            raise AddendaError(f"{option} cannot be used with --ray, which writes each task's predictions to Parquet.")
        if out is None:
            raise AddendaError("--ray requires --out FOLDER.")
        from addenda.distributed.cluster import connected
        from addenda.distributed.prediction import PART_SIZE, PredictionJob, predict_many

        paths = _image_files(images)[0]
        with options.open_registry(registry) as opened:
            job = PredictionJob(
                options.workplace(registry, opened, weights, device, gpus, backbone), tuple(task or ()), top,
                min_probability, not inexact, part_size or PART_SIZE, skip_bad, workers, cpus or 1, gpus or 0.0,
            )  # fmt: skip
            with connected(ray), progress(quiet=as_json) as report:
                summary = predict_many(job, paths, out, opened, report)
        _print_summary(summary, as_json)
        return
    ray_options = {"--out": out, "--part-size": part_size, "--workers": workers, "--cpus": cpus, "--gpus": gpus}
    if used := [option for option, value in ray_options.items() if value is not None]:
        raise AddendaError(f"{', '.join(used)} require{'s' if len(used) == 1 else ''} --ray.")
    from addenda.backbones import counted, read_files
    from addenda.combined import recorded_backbone

    paths, left_out = _image_files(images)
    with options.open_registry(registry) as opened:
        named = [ref for ref in task or () if "*" not in ref and not auto]
        backbone = backbone or (opened.record(named[0]).backbone if named else None)
        loaded = recorded_backbone(opened, weights, device, backbone)
        requested = [] if auto else _requested(opened, loaded, task, tag)
        model = addenda.CombinedModel(loaded, requested or opened.load(loaded), exact=not inexact)
        router = _router(opened, model) if auto and model.tasks else None
    if not model.tasks:
        raise DataError(f"The registry {opened.location!r} holds no active task. `addenda learn` adds one.")
    predictions: dict[str, Any] = {}
    skipped: list[str] = []
    with progress(quiet=as_json or as_csv or len(paths) < 16) as report:
        try:
            done, started = 0, time.monotonic()
            for files in read_files(loaded, paths, model.micro_batch, skip_bad):
                if files.paths and router is not None:
                    routed = model.route_images(files.images, router, top, min_probability)
                    predictions |= zip(map(str, files.paths), routed, strict=True)
                elif files.paths:
                    by_task = model.predict_images(files.images, top, None, min_probability)
                    for i, path in enumerate(files.paths):
                        predictions[str(path)] = {name: best[i] for name, best in by_task.items()}
                skipped += files.bad.values()
                done += len(files.asked)
                ahead = estimate("images", len(paths), done, time.monotonic() - started)
                if ahead and done == len(files.asked) and not as_json:
                    typer.echo(ahead, err=True)
                report("predicting", done, len(paths))
        except DataError as error:
            raise DataError(f"{str(error).removesuffix('.')}. Pass --skip-bad to skip unreadable images.") from error
    for message in skipped:
        typer.echo(f"skipped: {shown(message)}", err=True)
    values, rows, (title, columns, lines) = (_render_all if router is None else _render_routed)(predictions, model)
    if as_json:
        print_json({"exact": model.exact, "images": values, "skipped": skipped, "left_out": counted(left_out)})
    elif as_csv:
        csv.writer(sys.stdout).writerows(map(csv_row, rows))
    else:
        console.print(table(title + ("" if model.exact else ", inexact"), columns, lines))


def _requested(
    registry: addenda.Registry, backbone: addenda.FrozenBackbone, refs: list[str] | None, tag: str | None
) -> list[addenda.Task]:
    """The tasks that --task and --tag select; empty if neither is given."""
    from addenda.registry import select_tasks

    selectors = refs if tag is not None else [ref for ref in refs or () if "*" in ref]
    selected = [] if tag is not None else [ref for ref in refs or () if "*" not in ref]
    if selectors or tag is not None:
        records = {record.name: record for record in registry.current(backbone)[1]}
        selected += [records[name].ref for name in select_tasks(records, selectors, tag)]
    return [registry.get(ref) for ref in selected]


def _render_all(predictions: dict[str, dict[str, Best]], model: addenda.CombinedModel) -> Rendered:
    """Renders every task's labels for each image."""
    values = {path: {name: _as_json(best) for name, best in tasks.items()} for path, tasks in predictions.items()}
    rows: list[tuple[Any, ...]] = [("image", "task", "label", "probability")]
    rows += (
        (path, name, *pair) for path, tasks in predictions.items() for name, best in tasks.items() for pair in best
    )
    lines = [(path, *(_as_text(best) or "none" for best in tasks.values())) for path, tasks in predictions.items()]
    return (
        values,
        rows,
        (f"{plural(len(predictions), 'image')}, {plural(len(model.tasks), 'task')}", ("image", *model.tasks), lines),
    )


def _render_routed(predictions: dict[str, tuple[Choice, Best]], model: addenda.CombinedModel) -> Rendered:
    """Renders the task chosen for each image, and its labels."""
    values: dict[str, Any] = {}
    rows: list[tuple[Any, ...]] = [("image", "task", "task_probability", "familiar", "label", "probability")]
    lines: list[tuple[str, ...]] = []
    for path, (choice, best) in predictions.items():
        values[path] = choice._asdict() | {"labels": _as_json(best)}
        rows += ((path, *choice, *pair) for pair in best)
        task = choice.task if choice.familiar else f"none; nearest {choice.task}"
        lines.append((path, task, f"{100 * choice.probability:.0f} %", _as_text(best) if choice.familiar else "–"))
    title = f"{plural(len(predictions), 'image')}, task chosen from {len(model.tasks)}"
    return values, rows, (title, ("image", "task", "task probability", "labels"), lines)


def _as_json(best: Best) -> list[dict[str, Any]]:
    return [{"label": label, "probability": probability} for label, probability in best]


def _as_text(best: Best) -> str:
    return ", ".join(f"{label} {100 * probability:.0f} %" for label, probability in best)


def _print_summary(summary: Summary, as_json: bool) -> None:
    """Prints what the output folder of a run on a cluster holds, and what this run computed."""
    if as_json:
        print_json(vars(summary) | {"images_per_second": summary.images_per_second})
        return
    exact = "" if summary.exact else ", inexact"
    skipped = f", {summary.left_out} of them skipped (reasons in the column left_out)" if summary.left_out else ""
    console.print(
        f"{summary.images} images{skipped}, {summary.tasks} tasks{exact}: {summary.rows} rows in {summary.parts} "
        f"files, {size(summary.size_bytes)}, in {summary.folder}",
        soft_wrap=True,
    )
    if summary.computed_parts < summary.parts:
        console.print(f"{summary.parts - summary.computed_parts} files existed already.")
    if summary.computed_parts:
        console.print(
            f"Computed {summary.computed_images} images in {summary.computed_parts} files on {summary.nodes} nodes in "
            f"{summary.seconds:.1f} s, {summary.images_per_second:.1f} images per second."
        )


def _image_files(paths: Sequence[Path]) -> tuple[list[Path], LeftOut]:
    """The image files under some paths, in order; other files in folders are reported on standard error."""
    from addenda.backbones import image_files, in_words, joined

    images: list[Path] = []
    left_out: list[LeftOut] = []
    for path in paths:
        if os.path.isdir(path):
            in_folder, others = image_files(path)
            description = in_words(others, path)
            if not in_folder:
                reason = f", but {description}" if description else ""
                raise DataError(f"The folder {str(path)!r} holds no images{reason}.")
            if description:
                typer.echo(shown(f"left out of {str(path)!r}: {description}."), err=True)
            images += in_folder
            left_out.append(others)
        else:
            images.append(path)
    return images, joined(left_out)


def _router(registry: addenda.Registry, model: addenda.CombinedModel) -> Router:
    """A router over a model's tasks; tasks without routing statistics are named on standard error."""
    from addenda.combined import Router, can_be_routed

    stored = {name: registry.statistics(task.ref) for name, task in model.tasks.items()}
    width = model.backbone.embed_dim
    usable = {name: entry for name, entry in stored.items() if entry is not None and can_be_routed(entry, width)}
    if missing := [name for name in stored if name not in usable]:
        typer.echo(
            f"Not considered, without routing statistics: {', '.join(missing)}. Single-label tasks store them when "
            "they are learned.",
            err=True,
        )
    if not usable:
        raise DataError("No registered task has routing statistics, so none can be chosen; name tasks with --task.")
    return Router(usable)
