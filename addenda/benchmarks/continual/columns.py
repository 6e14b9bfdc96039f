"""Columns, tables and notes of the report of `addenda bench continual`, and the comparison of two runs of a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from addenda.benchmarks.continual.results import Cell, ContinualMetrics, Results, largest, read_results
from addenda.benchmarks.report.tables import NOTHING, Spread, Table, Unit, number, show, shown
from addenda.exceptions import DataError
from addenda.terminal import console

OURS = "addenda"
"""The method whose exactness the report verifies."""

Setting = Literal["task_incremental", "class_incremental"]
SETTINGS: tuple[Setting, ...] = ("task_incremental", "class_incremental")
NOT_OFFERED = (
    "Forward transfer, and accuracy on an experience before it is learned, are shown only where a method can already "
    "predict a class of that experience; with new classes in every experience it never can."
)


@dataclass(frozen=True)
class Column:
    """A metric of a cell: its JSON key, its title, its unit and how to read it from a cell."""

    key: str
    title: str
    unit: Unit
    of: Callable[[Cell], float | None]

    def spread(self, cells: Iterable[Cell]) -> Spread | None:
        """Mean and standard deviation over a method's cells."""
        return Spread.of(map(self.of, cells))

    def text(self, cells: Iterable[Cell]) -> str:
        """Mean ± standard deviation as text."""
        return shown(self.spread(cells), self.unit)


def _metric(name: str, setting: Setting, title: str) -> Column:
    return Column(f"{name}_{setting}", title, "%", lambda cell: getattr(getattr(cell, f"{setting}_metrics"), name))


QUALITY = (
    _metric("average_accuracy", "task_incremental", "task-incremental accuracy, %"),
    _metric("average_accuracy", "class_incremental", "class-incremental accuracy, %"),
    _metric("average_incremental_accuracy", "class_incremental", "average incremental accuracy, %"),
    _metric("forgetting", "task_incremental", "task-incremental forgetting"),
    _metric("forgetting", "class_incremental", "class-incremental forgetting"),
)
TASK_ACCURACY, CLASS_ACCURACY, _, TASK_FORGETTING, CLASS_FORGETTING = QUALITY
SHORT = TASK_ACCURACY, CLASS_ACCURACY, CLASS_FORGETTING  # where there is room for three
PRICE = (
    Column("stored_bytes", "stored per task", "bytes", lambda cell: cell.stored_bytes),
    Column("train_seconds", "training, s", "s", lambda cell: sum(cell.train_seconds)),
    Column("relative_inference", "forward passes per image", "passes", lambda cell: cell.relative_inference),
)
COLUMNS = {column.key: column for column in (*QUALITY, *PRICE)}


def exactness(cells: Sequence[Cell]) -> str:
    """Whether old tasks' logits are identical in all seeds, or their largest change."""
    if not any(cell.comparisons for cell in cells):
        return "nothing to compare"
    if all(cell.identical for cell in cells):
        return "identical"
    return f"change by {largest(cell.max_difference for cell in cells):.2g}"


def verdict(results: Results) -> str:
    """One sentence on Addenda's exactness and forgetting; without Addenda, on the method with the highest accuracy."""
    labels, cells = {note.name: note.label for note in results.methods}, results.of(OURS)
    if not cells:
        means = ((CLASS_ACCURACY.spread(results.of(name)), label) for name, label in labels.items())
        spread, label = max((spread, label) for spread, label in means if spread is not None)
        return f"{label} has the highest class-incremental average accuracy, {shown(spread)} %."
    seeds = "the single seed" if len(cells) == 1 else f"all {len(cells)} seeds"
    num_changed, change = sum(not cell.identical for cell in cells), exactness(cells).removeprefix("change by ")
    logits = {
        "nothing to compare": "no old task's logits to compare, since there is only one experience",
        "identical": f"old tasks' logits identical, byte for byte, in {seeds}",
    }.get(change, f"old tasks' logits CHANGED in {num_changed} of {len(cells)} seeds (by up to {change})")
    forgetting = (
        f"{TASK_FORGETTING.text(cells)} points task-incremental, {CLASS_FORGETTING.text(cells)} class-incremental"
    )
    return f"{labels[OURS]}: {logits}; forgetting {forgetting}."


def method_rows(results: Results, quality: Sequence[Column] = QUALITY) -> list[list[str]]:
    """A row per method: label, metrics as mean ± standard deviation over seeds, exactness and price."""
    rows = []
    for note in results.methods:
        cells = results.of(note.name)
        values, price = ([column.text(cells) for column in group] for group in (quality, PRICE))
        rows.append([note.label, *values, exactness(cells), *price])
    return rows


def comparison_table(results: Results) -> Table:
    """The main metrics of all methods."""
    titles = ["method", *(c.title for c in QUALITY), "old tasks' logits", *(c.title for c in PRICE)]
    ours = next((i for i, note in enumerate(results.methods) if note.name == OURS), None)
    return Table(titles, method_rows(results), ours=ours)


def footnotes(results: Results) -> list[str]:
    """Notes below the comparison table."""
    labels = {note.name: note.label for note in results.methods}
    notes = [f"{note.label}: {note.note.rstrip('.')}." for note in results.methods if note.note]
    baselines = [labels[name] for name in labels if name != OURS and exactness(results.of(name)) == "identical"]
    if baselines:
        notes.append(
            f"Old task-incremental logits do not change with {', '.join(baselines)} either: compare accuracy and cost."
        )
    changed = {name: Spread.of(cell.changed_decisions for cell in results.of(name)) for name in labels}
    if shares := [f"{labels[name]} {shown(spread)} %" for name, spread in changed.items() if spread]:
        notes.append(
            "Class-incremental predictions can change when classes are added, even if no logit does. Share of changed "
            f"predictions on the test images of old experiences: {', '.join(shares)}."
        )
    return notes


def proof_table(results: Results) -> Table | None:
    """The bytewise comparisons of Addenda's logits for each seed; None if there were none."""
    cells, num_experiences = results.of(OURS), len(results.experiences)
    if not cells or num_experiences == 1:
        return None
    images = sum((num_experiences - 1 - i) * note.num_test for i, note in enumerate(results.experiences))
    rows = [
        (str(c.seed), str(c.comparisons), str(images), "yes" if c.identical else "NO", f"{c.max_difference:.2g}")
        for c in cells
    ]
    return Table(["seed", "comparisons", "images compared", "identical", "largest difference"], rows)


def extra_table(results: Results) -> Table | None:
    """Accuracy of routers, and other metrics that only some methods have."""
    rows = []
    for note in results.methods:
        extras = [dict(flat(cell.extra)) for cell in results.of(note.name)]
        for name in dict.fromkeys(name for extra in extras for name in extra):
            spread = Spread.of(extra.get(name) for extra in extras)
            text = f"{shown(spread)} %" if name.startswith("routers.") else shown(spread, "plain")
            rows.append([note.label, name.replace(".", ": ", 1), text])
    return Table(["method", "metric", "value"], rows, num_left=2) if rows else None


def flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def metrics_table(results: Results) -> Table:
    """All of Avalanche's metrics that at least one method has."""
    fields = ContinualMetrics.__dataclass_fields__
    names = [name for name in fields if any(_metric(name, setting, "").spread(results.cells) for setting in SETTINGS)]
    rows = []
    for note in results.methods:
        for setting in SETTINGS:
            values = (_metric(name, setting, "").text(results.of(note.name)) for name in names)
            rows.append([note.label, setting.replace("_", "-"), *values])
    return Table(["method", "setting", *(name.replace("_", " ") for name in names)], rows, num_left=2)


def experience_table(results: Results) -> Table:
    """The stream's experiences with their classes and numbers of images."""
    rows = [
        [note.name, ", ".join(results.labels[i] for i in note.classes), str(note.num_train), str(note.num_test)]
        for note in results.experiences
    ]
    return Table(["experience", "classes", "training images", "test images"], rows, num_left=2)


def compare_reports(a: Path, b: Path) -> dict[str, Any]:
    """Compare two runs of a stream, each given as a report's folder or its results.json.

    Returns:
        The stream, the paths `a` and `b`, and, of the methods in both runs: `differences`, each metric in a, in b and
        b minus a, accuracy and forgetting as fractions; `exactness`, whether old logits changed in a and in b. Then the
        methods of only one run, and `settings`, all other differences by dotted name.
    """
    first, second = read_results(a), read_results(b)
    streams = [(run.stream, run.labels, [(e.name, e.classes) for e in run.experiences]) for run in (first, second)]
    if streams[0] != streams[1]:
        difference = (
            f"{str(a)!r} is of {first.stream!r}, {str(b)!r} of {second.stream!r}"
            if first.stream != second.stream
            else f"{str(a)!r} and {str(b)!r} are both of {first.stream!r}, but their experiences differ"
        )
        raise DataError(f"Runs of different streams cannot be compared: {difference}. Give two runs of one stream.")
    names_a, names_b = ([note.name for note in results.methods] for results in (first, second))
    both = [name for name in names_a if name in names_b]
    if not both:
        raise DataError(
            f"The runs have no method in common: {str(a)!r} has {', '.join(names_a)}; {str(b)!r} has "
            f"{', '.join(names_b)}. Give two runs that share a method."
        )
    differences = []
    for name in both:
        for key, column in COLUMNS.items():
            before, after = column.spread(first.of(name)), column.spread(second.of(name))
            change = None if before is None or after is None else after.mean - before.mean
            values = {"a": before and asdict(before), "b": after and asdict(after), "change": change}
            differences.append({"method": name, "figure": key, **values})
    return {
        "stream": first.stream,
        "a": str(a),
        "b": str(b),
        "differences": differences,
        "exactness": {name: [exactness(first.of(name)), exactness(second.of(name))] for name in both},
        "only_a": [name for name in names_a if name not in both],
        "only_b": [name for name in names_b if name not in both],
        "settings": _settings(first, second, both),
    }


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """Print the metrics of every method in both runs, then the other differences."""
    rows: list[tuple[str, ...]] = []
    for name, logits in comparison["exactness"].items():
        for i, metric in enumerate(m for m in comparison["differences"] if m["method"] == name):
            column = COLUMNS[metric["figure"]]
            change = NOTHING if metric["change"] is None else number(metric["change"], column.unit, "+")
            values = (shown(metric[run] and Spread(**metric[run]), column.unit) for run in ("a", "b"))
            rows.append((name if i == 0 else "", column.title, *values, change))
        rows.append(("", "old tasks' logits", *logits, ""))
    title = f"{comparison['stream']}: B minus A; mean ± standard deviation over seeds"
    show(title, Table(("method", "metric", "A", "B", "B - A"), rows, num_left=2))
    for run in ("a", "b"):
        only = comparison[f"only_{run}"]
        text = f"{run.upper()}: {comparison[run]}" + (f"; only in {run.upper()}: {', '.join(only)}" if only else "")
        console.print(text, soft_wrap=True)
    if comparison["settings"]:
        settings = [(name, *values) for name, values in comparison["settings"].items()]
        show("Other differences", Table(("setting", "A", "B"), settings, num_left=3))
    else:
        console.print("Configuration, environment and numbers of images are the same.")


def _settings(first: Results, second: Results, both: Sequence[str]) -> dict[str, list[str]]:
    a, b = (
        {name: str(value) for name, value in flat({
            "config": run.config, "environment": run.environment, "hardware": run.hardware,
            "images": {note.name: f"{note.num_train} + {note.num_test}" for note in run.experiences},
            "seeds": {name: [cell.seed for cell in run.of(name)] for name in both},
        })}
        for run in (first, second)
    )  # fmt: skip
    names = [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]
    return {name: [a.get(name, NOTHING), b.get(name, NOTHING)] for name in names}
