"""The report of a run: results.json, and the same story as Markdown with pictures and as one page of HTML."""

from __future__ import annotations

import html
import json
import re
import textwrap
from base64 import b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from addenda.benchmarks.continual.figures import Picture, accuracy_so_far, curves, heat_map, mean_matrix, scale
from addenda.benchmarks.continual.results import FILE, Cell, Results
from addenda.benchmarks.continual.summary import NOTHING, OURS, verdict
from addenda.benchmarks.continual.tables import (
    NOT_OFFERED,
    SETTINGS,
    Setting,
    comparison_table,
    experience_table,
    extra_table,
    footnotes,
    metrics_table,
    proof_table,
)
from addenda.terminal import console, table


class Drawn(NamedTuple):
    """A picture, light and dark, with the file it has beside the Markdown and what it shows in words."""

    file: str
    alt: str
    light: Picture
    dark: Picture
    narrow: tuple[Picture, Picture] | None = None  # the same for a phone


def write_report(results: Results, folder: Path) -> None:
    """Writes results.json, report.md, its pictures and report.html.

    Args:
        results: of a whole run.
        folder: is made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = results.to_json()
    (folder / FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    content = _content(results, values)
    for drawn in (content["curves"], content["scale"], *(one for _, pair in content["matrices"] for one in pair)):
        (folder / drawn.file).write_bytes(drawn.light.png)
    (folder / "report.md").write_text(_templates(_markdown).get_template("report.md.j2").render(content), "utf-8")
    (folder / "report.html").write_text(_templates(None).get_template("report.html.j2").render(content), "utf-8")


def print_report(results: Results, folder: Path) -> None:
    """Prints the comparison, and where the report lies."""
    made = comparison_table(results)
    shown = {
        "method": 0, "told %": 1, "untold %": 2, "forgets untold": 5, "old logits": 6, "a task": 7, "train s": 8,
        "passes": 9,
    }  # fmt: skip
    console.print(verdict(results), markup=False, highlight=False)
    rows = [[row[place] for place in shown.values()] for row in made.rows]
    console.print(table(f"The stream {results.stream}, accuracy", tuple(shown), rows, right=tuple(shown)[1:]))
    for note in footnotes(results):
        console.print(f"- {note}", markup=False, highlight=False)
    console.print(f"The report: {folder / 'report.html'} and {folder / 'report.md'}", markup=False, highlight=False)


def _content(results: Results, values: dict[str, Any]) -> dict[str, Any]:
    """What both templates show."""
    names = [one.name for one in results.experiences]
    lines = {note.name: (note.label, accuracy_so_far(results.of(note.name))) for note in results.methods}
    return {
        "results": results,
        "verdict": verdict(results),
        "kept": all(cell.identical for cell in results.of(OURS)),
        "comparison": comparison_table(results),
        "footnotes": footnotes(results),
        "curves": Drawn(
            "curves.png",
            "Untold accuracy after each experience, in the mean over all met: at the end "
            + ", ".join(f"{label} {100 * last.mean:.1f} %" for label, (*_, last) in lines.values() if last),
            curves(lines, names, "light"),
            curves(lines, names, "dark"),
            (curves(lines, names, "light", narrow=True), curves(lines, names, "dark", narrow=True)),
        ),
        "scale": Drawn("scale.png", "Colours from 0 to 100 % accuracy", scale("light"), scale("dark")),
        "matrices": [
            (
                note.label,
                [_matrix(note.name, note.label, results.of(note.name), setting, names) for setting in SETTINGS],
            )
            for note in results.methods
        ],
        "proof": proof_table(results),
        "extra": extra_table(results),
        "metrics": metrics_table(results),
        "not_offered": NOT_OFFERED if len(names) > 1 else "",
        "early": any(value is not None for cell in results.cells for value in _early(cell)),
        "experiences": experience_table(results),
        "expected": _yaml(values["expected"]),
        "config": _yaml(values["config"]),
        "environment": _yaml(values["environment"]),
    }


def _early(cell: Cell) -> list[float | None]:
    """Accuracies before the experience was learned."""
    return [value for matrix in (cell.told, cell.untold) for i, row in enumerate(matrix) for value in row[i + 1 :]]


def _matrix(name: str, label: str, cells: list[Cell], setting: Setting, names: list[str]) -> Drawn:
    matrix = mean_matrix(cells, setting)
    last = ", ".join(NOTHING if value is None else f"{100 * value:.1f}" for value in matrix[-1])
    return Drawn(
        f"accuracy-{name}-{setting}.png",
        f"Accuracy matrix of {label}, task {setting}; last row, in %: {last}",
        heat_map(matrix, names, "light"),
        heat_map(matrix, names, "dark"),
    )


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True) if values else ""


def _templates(finalize: Callable[[Any], Any] | None) -> Environment:
    """Both templates escape whatever is put into them; Markdown by `finalize`, before HTML's own way."""
    made = Environment(
        loader=PackageLoader(__package__), autoescape=True, finalize=finalize, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {"base64": _base64, "block": _block}
    return made


def _markdown(value: Any) -> Any:
    """Text that Markdown, and the HTML in it, show as it is."""
    if hasattr(value, "__html__"):
        return value
    return Markup(re.sub(r"([\\`*_\[\]|$~])", r"\\\1", html.escape(str(value), quote=False)).replace("\n", " "))


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


def _block(text: str) -> Markup:
    """A block of code by indentation, which no content can end."""
    return Markup(textwrap.indent(text, "    ", lambda line: True))
