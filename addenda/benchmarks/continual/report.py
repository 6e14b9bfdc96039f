"""Report of a run: results.json, report.md with its pictures, and the single-file report.html."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml

from addenda.benchmarks.continual import columns
from addenda.benchmarks.continual.columns import OURS, Setting
from addenda.benchmarks.continual.results import FILE, Cell, Results
from addenda.benchmarks.report.plots import Picture, Scheme, curves, heat_map, scale
from addenda.benchmarks.report.tables import NOTHING, Spread, Table, show, write_json, write_pages
from addenda.terminal import console


class Drawn(NamedTuple):
    """A picture in a light and a dark colour scheme, with its file name for Markdown and its alt text."""

    file: str
    alt: str
    light: Picture
    dark: Picture
    narrow: tuple[Picture, Picture] | None = None  # light and dark, for narrow screens


def write_report(results: Results, folder: Path) -> None:
    """Write results.json, report.md with its pictures, and report.html; the folder is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    values = results.to_json()
    write_json(folder / FILE, values)
    names = [note.name for note in results.experiences]
    lines = {note.name: (note.label, accuracy_so_far(results.of(note.name))) for note in results.methods}
    final = ", ".join(f"{label} {100 * last.mean:.1f} %" for label, (*_, last) in lines.values() if last)
    curves_caption = f"Class-incremental accuracy after each experience, averaged over those so far; final: {final}"
    draw = partial(curves, lines, OURS, names)
    along = _drawn("curves.png", curves_caption, draw, partial(draw, narrow=True))
    colours = _drawn("scale.png", "Colour scale from 0 to 100 % accuracy", scale)
    matrices: list[tuple[str, list[Drawn]]] = []
    for note in results.methods:
        pair = []
        for setting in columns.SETTINGS:
            matrix, setting_name = mean_matrix(results.of(note.name), setting), setting.replace("_", "-")
            last = ", ".join(NOTHING if value is None else f"{100 * value:.1f}" for value in matrix[-1])
            alt = f"Accuracy matrix of {note.label}, {setting_name}; last row, in %: {last}"
            pair.append(_drawn(f"accuracy-{note.name}-{setting_name}.png", alt, partial(heat_map, matrix, names)))
        matrices.append((note.label, pair))
    for drawn in (along, colours, *(matrix for _, pair in matrices for matrix in pair)):
        (folder / drawn.file).write_bytes(drawn.light.png)
    accuracies = (matrix for cell in results.cells for matrix in (cell.task_incremental, cell.class_incremental))
    early = (value for matrix in accuracies for i, row in enumerate(matrix) for value in row[i + 1 :])
    content = {
        "results": results,
        "verdict": columns.verdict(results),
        "exact": all(cell.identical for cell in results.of(OURS)),
        "comparison": columns.comparison_table(results),
        "footnotes": columns.footnotes(results),
        "curves": along,
        "scale": colours,
        "matrices": matrices,
        "proof": columns.proof_table(results),
        "extra": columns.extra_table(results),
        "metrics": columns.metrics_table(results),
        "not_offered": columns.NOT_OFFERED if len(names) > 1 else "",
        "early": any(value is not None for value in early),
        "experiences": columns.experience_table(results),
    }
    for key in ("expected", "config", "environment"):
        content[key] = yaml.safe_dump(values[key], sort_keys=False, allow_unicode=True) if values[key] else ""
    write_pages("continual", content, folder)


def print_report(results: Results, folder: Path) -> None:
    """Print the comparison table, its notes and the paths of the report."""
    console.print(columns.verdict(results))
    titles = "method", "task-inc. %", "class-inc. %", "forgetting", "old logits", "per task", "train s", "passes"
    rows = columns.method_rows(results, columns.SHORT)
    show(f"Accuracy on stream {results.stream}", Table(titles, rows))
    for note in columns.footnotes(results):
        console.print(f"- {note}")
    console.print(f"Report: {folder / 'report.html'} and {folder / 'report.md'}")


def mean_matrix(cells: Sequence[Cell], setting: Setting) -> list[list[float | None]]:
    """The accuracy matrix averaged over seeds; None where no seed has a value."""
    stages = range(len(cells[0].task_incremental))
    spreads = [[Spread.of(getattr(cell, setting)[i][j] for cell in cells) for j in stages] for i in stages]
    return [[spread.mean if spread else None for spread in row] for row in spreads]


def accuracy_so_far(cells: Sequence[Cell]) -> list[Spread | None]:
    """Class-incremental accuracy after each experience, averaged over those so far; None without predictions."""
    means = [[Spread.of(row[: i + 1]) for i, row in enumerate(cell.class_incremental)] for cell in cells]
    return [Spread.of(spread.mean for spread in stage if spread) for stage in zip(*means, strict=True)]


def _drawn(
    file: str, alt: str, draw: Callable[[Scheme], Picture], narrow: Callable[[Scheme], Picture] | None = None
) -> Drawn:
    return Drawn(file, alt, draw("light"), draw("dark"), narrow and (narrow("light"), narrow("dark")))
