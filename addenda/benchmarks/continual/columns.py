"""The columns that methods are compared by, and the tables of a report with the notes below the first of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from addenda.benchmarks.continual.results import Cell, ContinualMetrics, Results, largest
from addenda.benchmarks.report.tables import Spread, Table, Unit, shown

OURS = "addenda"
"""The method whose promise the report is about."""

Setting = Literal["task_incremental", "class_incremental"]
SETTINGS: tuple[Setting, ...] = ("task_incremental", "class_incremental")
UNVERIFIED = "†"
NOT_OFFERED = (
    "Forward transfer, and accuracy on an experience before it is learned, are given only where a method can already "
    "answer with a class of that experience; in a stream of new classes, nowhere."
)


@dataclass(frozen=True)
class Column:
    """One figure of a cell: its key for programs, its title for people, its unit, and how a cell gives it."""

    key: str
    title: str
    unit: Unit
    of: Callable[[Cell], float | None]

    def spread(self, cells: Iterable[Cell]) -> Spread | None:
        """Over a method's cells."""
        return Spread.of(map(self.of, cells))

    def text(self, cells: Iterable[Cell]) -> str:
        """The same, as people read it."""
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
    Column("train_seconds", "training seconds", "s", lambda cell: sum(cell.train_seconds)),
    Column("relative_inference", "inference, passes", "passes", lambda cell: cell.relative_inference),
)


def exactness(cells: Sequence[Cell]) -> str:
    """Whether old tasks' logits kept every byte in all seeds, or the most that one moved."""
    if not any(cell.comparisons for cell in cells):
        return "nothing to compare"
    if all(cell.identical for cell in cells):
        return "identical"
    return f"moves by {largest(cell.max_difference for cell in cells):.2g}"


def verdict(results: Results) -> str:
    """One sentence: whether our method kept its promise; without it, the method of highest accuracy."""
    cells = results.of(OURS)
    if not cells:
        means = ((AVERAGE_CLASS_INCREMENTAL.spread(results.of(note.name)), note.label) for note in results.methods)
        spread, label = max((spread, label) for spread, label in means if spread is not None)
        value = shown(spread, AVERAGE_CLASS_INCREMENTAL.unit)
        return f"{label}: the highest class-incremental average accuracy, {value} %."
    label = next(note.label for note in results.methods if note.name == OURS)
    seeds = "the one seed" if len(cells) == 1 else f"all {len(cells)} seeds"
    moved = sum(not cell.identical for cell in cells)
    task_incremental, class_incremental = (
        column.text(cells) for column in (FORGETTING_TASK_INCREMENTAL, FORGETTING_CLASS_INCREMENTAL)
    )
    kept = {
        "nothing to compare": "one experience alone, so no old task's logits to compare",
        "identical": f"old tasks' logits identical, byte for byte, in {seeds}",
    }.get(exactness(cells), f"old tasks' logits MOVED in {moved} of {len(cells)} seeds ({exactness(cells)})")
    forgetting = f"forgetting {task_incremental} points task-incremental, {class_incremental} class-incremental"
    return f"{label}: {kept}; {forgetting}."


def comparison_table(results: Results) -> Table:
    """How the methods compare: mean ± standard deviation over seeds."""
    rows = []
    for note in results.methods:
        cells = results.of(note.name)
        quality, price = ([column.text(cells) for column in part] for part in (QUALITY, PRICE))
        rows.append([note.label + ("" if note.verified else f" {UNVERIFIED}"), *quality, exactness(cells), *price])
    titles = ["method", *(c.title for c in QUALITY), "old tasks' logits", *(c.title for c in PRICE)]
    return Table(titles, rows, ours=next((i for i, note in enumerate(results.methods) if note.name == OURS), None))


def footnotes(results: Results) -> list[str]:
    """What must be known to read the table rightly."""
    labels = {note.name: note.label for note in results.methods}
    notes = [f"{note.label}: {note.note.rstrip('.')}." for note in results.methods if note.note]
    if unverified := [note.label for note in results.methods if not note.verified]:
        notes.insert(0, f"{UNVERIFIED} {', '.join(unverified)}: code not checked against a published figure.")
    baselines = [labels[name] for name in labels if name != OURS and exactness(results.of(name)) == "identical"]
    if baselines:
        notes.append(
            f"With {', '.join(baselines)} no old logit moves either in the task-incremental setting: compare accuracy "
            "and price."
        )
    changed = {label: Spread.of(cell.changed_decisions for cell in results.of(name)) for name, label in labels.items()}
    if said := [f"{label} {shown(spread)} %" for label, spread in changed.items() if spread]:
        notes.append(
            "Class-incremental predictions can change when classes join, even where no logit moves. Share of changed "
            f"predictions on the test images of old experiences: {', '.join(said)}."
        )
    return notes


def proof_table(results: Results) -> Table | None:
    """What was compared byte by byte, seed by seed; None where there was nothing to compare, or nothing of ours."""
    cells, many = results.of(OURS), len(results.experiences)
    if not cells or many == 1:
        return None
    images = sum((many - 1 - place) * one.num_test for place, one in enumerate(results.experiences))
    rows = [
        (str(c.seed), str(c.comparisons), str(images), "yes" if c.identical else "NO", f"{c.max_difference:.2g}")
        for c in cells
    ]
    return Table(["seed", "comparisons", "images compared", "identical", "largest difference"], rows)


def extra_table(results: Results) -> Table | None:
    """Routers, in percent, and whatever else only some methods have."""
    rows = []
    for note in results.methods:
        extras = [dict(flat(cell.extra)) for cell in results.of(note.name)]
        for name in dict.fromkeys(name for extra in extras for name in extra):
            spread = Spread.of(extra.get(name) for extra in extras)
            text = f"{shown(spread)} %" if name.startswith("routers.") else shown(spread, "plain")
            rows.append([note.label, name.replace(".", ": ", 1), text])
    return Table(["method", "figure", "value"], rows, num_left=2) if rows else None


def flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings by its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def metrics_table(results: Results) -> Table:
    """All of Avalanche's figures that any method has."""
    every = [
        metrics for cell in results.cells for metrics in (cell.task_incremental_metrics, cell.class_incremental_metrics)
    ]
    names = [
        name
        for name in ContinualMetrics.__dataclass_fields__
        if any(getattr(metrics, name) is not None for metrics in every)
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
    """The stream's experiences, their classes and how many images each has."""
    rows = [
        [one.name, ", ".join(results.labels[i] for i in one.classes), str(one.num_train), str(one.num_test)]
        for one in results.experiences
    ]
    return Table(["experience", "classes", "training images", "test images"], rows, num_left=2)
