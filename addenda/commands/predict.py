"""Predicting: every task about some images, or the one that a router chooses for each."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

import addenda
from addenda.commands import options
from addenda.exceptions import AddendaError, DataError
from addenda.terminal import console, print_json, progress, size, table
from addenda.text import csv_row, shown

if TYPE_CHECKING:
    from addenda.backbones import LeftOut
    from addenda.combined import Choice, Router
    from addenda.distributed.prediction import Summary

Best = Sequence[tuple[str, float]]
"""Labels with their probabilities."""
Shown = tuple[dict[str, Any], list[tuple[Any, ...]], tuple[str, Sequence[str], list[tuple[str, ...]]]]
"""Answers as they are printed: JSON's images; rows of CSV, the head first; a table's title, columns and rows."""


def predict(
    images: Annotated[list[Path], Argument(help="Image files, or folders of them.")],
    task: Annotated[
        list[str] | None,
        Option(
            help="Answer this task only; may be given again. 'auto' chooses one for each image, or says that it looks "
            "like none of their images."
        ),
    ] = None,
    top: Annotated[
        int | None,
        Option(min=1, help="Labels for each task, at most. Default: 3; of a multi-label task all likely ones."),
    ] = None,
    skip_bad: options.SkipBad = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    weights: options.Weights = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    as_csv: Annotated[bool, Option("--csv", help="Print CSV, a row for each image, task and label given.")] = False,
    inexact: Annotated[
        bool, Option("--inexact", help="Without the promise of equal bits: no self-test, nothing filled up.")
    ] = False,
    ray: Annotated[
        str | None,
        Option(help="Predict on a Ray cluster, into --out: 'local' starts one here, 'auto' is on, or HOST:PORT."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="With --ray: folder of Parquet files, seen by all nodes. What is missing in it is computed."),
    ] = None,
    part_size: Annotated[int | None, Option(min=1, help="With --ray: images in a file. Default: 1000.")] = None,
    workers: Annotated[
        int | None, Option(min=1, help="With --ray: workers at most. Default: as many as there is room for.")
    ] = None,
    cpus: Annotated[
        int | None, Option(min=1, help="With --ray: CPUs of each worker, and its threads. Default: 1.")
    ] = None,
    gpus: Annotated[
        float | None, Option(min=0, max=1, help="With --ray: each worker's share of a GPU. Default: 0.")
    ] = None,
) -> None:
    """Answers every registered task about some images, in one pass."""
    auto = task == ["auto"]
    if as_json and as_csv:
        raise AddendaError("--json and --csv are two ways to print one answer: give one of them.")
    if task is not None and "auto" in task and not auto:
        raise AddendaError("--task auto chooses among all tasks: give it alone, or name tasks without it.")
    if ray is not None:
        if as_csv or auto:
            wrong = "--csv" if as_csv else "--task auto"
            raise AddendaError(f"{wrong} is not for --ray, which writes each task's answers to Parquet.")
        if out is None:
            raise AddendaError("--ray takes --out FOLDER, where its files go.")
        from addenda.distributed.cluster import connected
        from addenda.distributed.prediction import PART_SIZE, Crew, Question, predict_many

        question = Question(tuple(task or ()), top, not inexact, part_size or PART_SIZE, skip_bad)
        crew, paths = Crew(workers, cpus or 1, gpus or 0.0), _image_files(images)[0]
        with options.open_registry(registry) as opened:
            place = options.workplace(registry, opened, weights, device, crew.gpus, None)
            with connected(ray), progress(quiet=as_json) as report:
                summary = predict_many(paths, out, opened, place, question, crew, report)
        _print_summary(summary, as_json)
        return
    of_ray = {"--out": out, "--part-size": part_size, "--workers": workers, "--cpus": cpus, "--gpus": gpus}
    if used := [option for option, value in of_ray.items() if value is not None]:
        raise AddendaError(f"{', '.join(used)}: only with --ray, which says on which cluster.")
    from addenda.backbones import counted, read_files
    from addenda.combined import recorded_backbone

    paths, left_out = _image_files(images)
    with options.open_registry(registry) as opened:
        chosen = [opened.get(ref) for ref in task or () if not auto]
        loaded = recorded_backbone(opened, weights, device, chosen[0].backbone if chosen else None)
        model = addenda.CombinedModel(loaded, chosen or opened.load(loaded), exact=not inexact)
        router = _router(opened, model) if auto and model.tasks else None
    if not model.tasks:
        raise DataError(f"The registry {opened.location!r} holds no active task. `addenda learn` adds one.")
    answers: dict[str, Any] = {}
    bad: list[str] = []
    with progress(quiet=as_json or as_csv or len(paths) < 16) as report:
        try:
            done = 0
            for files in read_files(loaded, paths, model.micro_batch, skip_bad):
                if files.paths and router is not None:
                    answers |= zip(map(str, files.paths), model.route_images(files.images, router, top), strict=True)
                elif files.paths:
                    found = model.predict_images(files.images, top)
                    for i, path in enumerate(files.paths):
                        answers[str(path)] = {name: best[i] for name, best in found.items()}
                bad += files.bad.values()
                done += len(files.asked)
                report("predicting", done, len(paths))
        except DataError as error:
            raise DataError(f"{error} (--skip-bad leaves out what cannot be read.)") from error
    for message in bad:
        typer.echo(f"left out: {shown(message)}", err=True)
    told, rows, (title, columns, lines) = (_of_all if router is None else _routed)(answers, model)
    if as_json:
        print_json({"exact": model.exact, "images": told, "skipped": bad, "left_out": counted(left_out)})
    elif as_csv:
        csv.writer(sys.stdout).writerows(map(csv_row, rows))
    else:
        console.print(table(title + ("" if model.exact else ", not exact"), columns, lines))


def _of_all(answers: dict[str, dict[str, Best]], model: addenda.CombinedModel) -> Shown:
    """Every task's answer about each image."""
    told = {path: {name: _labels(best) for name, best in one.items()} for path, one in answers.items()}
    rows: list[tuple[Any, ...]] = [("image", "task", "label", "probability")]
    rows += ((path, name, *pair) for path, one in answers.items() for name, best in one.items() for pair in best)
    lines = [(path, *(_in_words(best) or "none" for best in one.values())) for path, one in answers.items()]
    return told, rows, (f"{len(answers)} images, {len(model.tasks)} tasks", ("image", *model.tasks), lines)


def _routed(answers: dict[str, tuple[Choice, Best]], model: addenda.CombinedModel) -> Shown:
    """The task that was chosen for each image, and its answer."""
    told: dict[str, Any] = {}
    rows: list[tuple[Any, ...]] = [("image", "task", "task_probability", "familiar", "label", "probability")]
    lines: list[tuple[str, ...]] = []
    for path, (choice, best) in answers.items():
        told[path] = choice._asdict() | {"labels": _labels(best)}
        rows += ((path, *choice, *pair) for pair in best)
        task = choice.task if choice.familiar else f"none; nearest {choice.task}"
        lines.append((path, task, f"{100 * choice.probability:.0f} %", _in_words(best) if choice.familiar else "–"))
    title = f"{len(answers)} images, the task chosen among {len(model.tasks)}"
    return told, rows, (title, ("image", "task", "sure", "labels"), lines)


def _labels(best: Best) -> list[dict[str, Any]]:
    return [{"label": label, "probability": probability} for label, probability in best]


def _in_words(best: Best) -> str:
    return ", ".join(f"{label} {100 * probability:.0f} %" for label, probability in best)


def _print_summary(found: Summary, as_json: bool) -> None:
    """Prints what lies in the folder of a run on a cluster."""
    if as_json:
        print_json(vars(found) | {"images_per_second": found.images_per_second})
        return
    exact = "" if found.exact else ", not exact"
    left_out = f", {found.left_out} of them left out (why stands in the column left_out)" if found.left_out else ""
    console.print(
        f"{found.images} images{left_out}, {found.tasks} tasks{exact}: {found.rows} rows in {found.parts} parts, "
        f"{size(found.size_bytes)}, in {found.folder}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if found.computed_parts < found.parts:
        console.print(f"{found.parts - found.computed_parts} parts were there before.")
    if found.computed_parts:
        console.print(
            f"{found.computed_images} images in {found.computed_parts} parts were computed on {found.nodes} nodes in "
            f"{found.seconds:.1f} s, {found.images_per_second:.1f} a second."
        )


def _image_files(places: Sequence[Path]) -> tuple[list[Path], LeftOut]:
    """The images at some places, in their order; and what else is in those that are folders, said on standard error."""
    from addenda.backbones import image_files, in_words, joined

    paths: list[Path] = []
    left_out: list[LeftOut] = []
    for place in places:
        if os.path.isdir(place):
            found, besides = image_files(place)
            said = in_words(besides, place)
            if not found:
                raise DataError(f"The folder {str(place)!r} holds no images{f', but {said}' if said else ''}.")
            if said:
                typer.echo(shown(f"left out of {str(place)!r}: {said}."), err=True)
            paths += found
            left_out.append(besides)
        else:
            paths.append(place)
    return paths, joined(left_out)


def _router(registry: addenda.Registry, model: addenda.CombinedModel) -> Router:
    """A router of a model's tasks; those that it cannot know of are named on standard error."""
    from addenda.combined import Router, can_be_routed

    kept = {name: registry.statistics(task.ref) for name, task in model.tasks.items()}
    width = model.backbone.embed_dim
    known = {name: one for name, one in kept.items() if one is not None and can_be_routed(one, width)}
    if left_out := [name for name in kept if name not in known]:
        typer.echo(
            f"Not chosen from, since nothing was kept of their images: {', '.join(left_out)}. (Single-label tasks keep "
            "statistics when they are learned.)",
            err=True,
        )
    if not known:
        raise DataError("There is no task to choose from: nothing was kept of any task's images.")
    return Router(known)
