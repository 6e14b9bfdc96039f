"""Columns, tables and notes of the report of `addenda bench continual`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from addenda.benchmarks.continual.results import Cell, ContinualMetrics, Results, largest
from addenda.benchmarks.report.tables import Spread, Table, Unit, shown

OURS = "addenda"
"""The method whose exactness the report verifies."""

Setting = Literal["task_incremental", "class_incremental"]
SETTINGS: tuple[Setting, ...] = ("task_incremental", "class_incremental")
UNVERIFIED = "†"
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


AVERAGE_CLASS_INCREMENTAL = _metric("average_accuracy", "class_incremental", "class-incremental accuracy, %")
FORGETTING_TASK_INCREMENTAL = _metric("forgetting", "task_incremental", "task-incremental forgetting")
FORGETTING_CLASS_INCREMENTAL = _metric("forgetting", "class_incremental", "class-incremental forgetting")
QUALITY = (
    _metric("average_accuracy", "task_incremental", "task-incremental accuracy, %"),
    AVERAGE_CLASS_INCREMENTAL,
    _metric("average_incremental_accuracy", "class_incremental", "average incremental accuracy, %"),
    FORGETTING_TASK_INCREMENTAL,
    FORGETTING_CLASS_INCREMENTAL,
)
PRICE = (
    Column("stored_bytes", "stored per task", "bytes", lambda cell: cell.stored_bytes),
    Column("train_seconds", "training, s", "s", lambda cell: sum(cell.train_seconds)),
    Column("relative_inference", "forward passes per image", "passes", lambda cell: cell.relative_inference),
)


def exactness(cells: Sequence[Cell]) -> str:
    """Whether old tasks' logits are identical in all seeds, or their largest change."""
    if not any(cell.comparisons for cell in cells):
        return "nothing to compare"
    if all(cell.identical for cell in cells):
        return "identical"
    return f"change by {_largest_change(cells)}"


def _largest_change(cells: Sequence[Cell]) -> str:
    return f"{largest(cell.max_difference for cell in cells):.2g}"


def verdict(results: Results) -> str:
    """One sentence on Addenda's exactness and forgetting; without Addenda, on the method with the highest accuracy."""
    cells = results.of(OURS)
    if not cells:
        means = ((AVERAGE_CLASS_INCREMENTAL.spread(results.of(note.name)), note.label) for note in results.methods)
        spread, label = max((spread, label) for spread, label in means if spread is not None)
        value = shown(spread, AVERAGE_CLASS_INCREMENTAL.unit)
        return f"{label} has the highest class-incremental average accuracy, {value} %."
    label = next(note.label for note in results.methods if note.name == OURS)
    seeds = "the single seed" if len(cells) == 1 else f"all {len(cells)} seeds"
    num_changed = sum(not cell.identical for cell in cells)
    task_incremental, class_incremental = (
        column.text(cells) for column in (FORGETTING_TASK_INCREMENTAL, FORGETTING_CLASS_INCREMENTAL)
    )
    changed = f"old tasks' logits CHANGED in {num_changed} of {len(cells)} seeds (by up to {_largest_change(cells)})"
    logits = {
        "nothing to compare": "no old task's logits to compare, since there is only one experience",
        "identical": f"old tasks' logits identical, byte for byte, in {seeds}",
    }.get(exactness(cells), changed)
    forgetting = f"forgetting {task_incremental} points task-incremental, {class_incremental} class-incremental"
    return f"{label}: {logits}; {forgetting}."


def comparison_table(results: Results) -> Table:
    """The main metrics of all methods, as mean ± standard deviation over seeds."""
    rows = []
    for note in results.methods:
        cells = results.of(note.name)
        quality, price = ([column.text(cells) for column in group] for group in (QUALITY, PRICE))
        rows.append([note.label + ("" if note.verified else f" {UNVERIFIED}"), *quality, exactness(cells), *price])
    titles = ["method", *(c.title for c in QUALITY), "old tasks' logits", *(c.title for c in PRICE)]
    return Table(titles, rows, ours=next((i for i, note in enumerate(results.methods) if note.name == OURS), None))


def footnotes(results: Results) -> list[str]:
    """Notes below the comparison table."""
    labels = {note.name: note.label for note in results.methods}
    notes = [f"{note.label}: {note.note.rstrip('.')}." for note in results.methods if note.note]
    if unverified := [note.label for note in results.methods if not note.verified]:
        notes.insert(0, f"{UNVERIFIED} {', '.join(unverified)}: code not checked against a published figure.")
    baselines = [labels[name] for name in labels if name != OURS and exactness(results.of(name)) == "identical"]
    if baselines:
        notes.append(
            f"Old task-incremental logits do not change with {', '.join(baselines)} either: compare accuracy and cost."
        )
    changed = {label: Spread.of(cell.changed_decisions for cell in results.of(name)) for name, label in labels.items()}
    if shares := [f"{label} {shown(spread)} %" for label, spread in changed.items() if spread]:
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
    all_metrics = [
        metrics for cell in results.cells for metrics in (cell.task_incremental_metrics, cell.class_incremental_metrics)
    ]
    names = [
        name
        for name in ContinualMetrics.__dataclass_fields__
        if any(getattr(metrics, name) is not None for metrics in all_metrics)
    ]
    rows = [
        [
            note.label,
            setting.replace("_", "-"),
            *(_metric(name, setting, name).text(results.of(note.name)) for name in names),
        ]
        for note in results.methods
        for setting in SETTINGS
    ]
    return Table(["method", "setting", *(name.replace("_", " ") for name in names)], rows, num_left=2)


def experience_table(results: Results) -> Table:
    """The stream's experiences with their classes and numbers of images."""
    rows = [
        [note.name, ", ".join(results.labels[i] for i in note.classes), str(note.num_train), str(note.num_test)]
        for note in results.experiences
    ]
    return Table(["experience", "classes", "training images", "test images"], rows, num_left=2)
