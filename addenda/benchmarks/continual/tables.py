"""The tables of a report, and the notes below the first of them, as texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from addenda.benchmarks.continual.results import Metrics, Results
from addenda.benchmarks.continual.summary import CHANGED, NOTHING, OURS, PRICE, QUALITY, Spread, exactness, shown

Setting = Literal["told", "untold"]
SETTINGS: tuple[Setting, ...] = ("told", "untold")
METRICS = tuple(Metrics.__dataclass_fields__)
UNVERIFIED = "†"
NOT_OFFERED = (
    "Forward transfer, and accuracy on an experience before it is learned, are given only where a method can already "
    "answer with a class of that experience; in a stream of new classes, nowhere."
)


class Table(NamedTuple):
    """Cells as texts; the first `num_left` columns are aligned to the left. `ours` is the row of our method."""

    columns: list[str]
    rows: list[list[str]]
    num_left: int = 1
    ours: int | None = None


def comparison_table(results: Results) -> Table:
    """How the methods compare: mean ± standard deviation over seeds."""
    rows = []
    for note in results.methods:
        cells = results.of(note.name)
        quality, price = ([column.text(cells) for column in part] for part in (QUALITY, PRICE))
        rows.append([note.label + ("" if note.verified else f" {UNVERIFIED}"), *quality, exactness(cells), *price])
    titles = ["method", *(c.title for c in QUALITY), "old tasks' logits", *(c.title for c in PRICE)]
    names = [note.name for note in results.methods]
    return Table(titles, rows, ours=names.index(OURS) if OURS in names else None)


def footnotes(results: Results) -> list[str]:
    """What must be known to read the table rightly."""
    labels = {note.name: note.label for note in results.methods}
    notes = [f"{note.label}: {note.note.rstrip('.')}." for note in results.methods if note.note]
    if unverified := [note.label for note in results.methods if not note.verified]:
        notes.insert(0, f"{UNVERIFIED} {', '.join(unverified)}: code not checked against a published figure.")
    rivals = [labels[name] for name in labels if name != OURS and exactness(results.of(name)) == "identical"]
    if rivals:
        notes.append(
            f"No old logit moves either, when the task is told, with {', '.join(rivals)}: see accuracy and the price "
            "columns."
        )
    changed = [(label, CHANGED.text(results.of(name))) for name, label in labels.items()]
    if said := [f"{label} {text} %" for label, text in changed if text != NOTHING]:
        notes.append(
            "Untold decisions can change when classes join, even where no logit moves. Of the answers on old "
            f"experiences' test images, these are no longer those given when learned: {', '.join(said)}."
        )
    return notes


def proof_table(results: Results) -> Table | None:
    """What was compared byte by byte, seed by seed: each old task after each later experience.

    None where there was nothing to compare, or nothing of ours.
    """
    cells, many = results.of(OURS), len(results.experiences)
    if not cells or many == 1:
        return None
    images = sum((many - 1 - place) * one.num_test for place, one in enumerate(results.experiences))
    rows = [
        [
            str(one.seed),
            str(one.comparisons),
            str(images),
            "yes" if one.identical else "NO",
            f"{one.max_difference:.2g}",
        ]
        for one in cells
    ]
    return Table(["seed", "comparisons", "images compared", "identical", "largest difference"], rows)


def extra_table(results: Results) -> Table | None:
    """Routers, in percent, and whatever else only some methods have."""
    rows = []
    for note in results.methods:
        flat = [dict(_flat(cell.extra)) for cell in results.of(note.name)]
        for what, name in dict.fromkeys(key for values in flat for key in values):
            spread = Spread.of(values.get((what, name)) for values in flat)
            text = f"{shown(spread, '%')} %" if what == "routers" else shown(spread, "plain")
            rows.append([note.label, f"{what}: {name}" if name else what, text])
    return Table(["method", "figure", "value"], rows, num_left=2) if rows else None


def _flat(extra: Mapping[str, float | Mapping[str, float]]) -> Iterator[tuple[tuple[str, str], float]]:
    for what, value in extra.items():
        if isinstance(value, Mapping):
            yield from (((what, name), figure) for name, figure in value.items())
        else:
            yield (what, ""), value


def metrics_table(results: Results) -> Table:
    """All of Avalanche's figures that any method has."""
    every = [metrics for cell in results.cells for metrics in (cell.told_metrics, cell.untold_metrics)]
    names = [name for name in METRICS if any(getattr(metrics, name) is not None for metrics in every)]
    rows = []
    for note in results.methods:
        for setting in SETTINGS:
            found = [getattr(cell, f"{setting}_metrics") for cell in results.of(note.name)]
            spreads = [Spread.of(getattr(metrics, name) for metrics in found) for name in names]
            rows.append([note.label, setting, *(shown(spread, "%") for spread in spreads)])
    return Table(["method", "task", *(name.replace("_", " ") for name in names)], rows, num_left=2)


def experience_table(results: Results) -> Table:
    """The stream's experiences, their classes and how many images each has."""
    rows = [
        [one.name, ", ".join(results.labels[i] for i in one.classes), str(one.num_train), str(one.num_test)]
        for one in results.experiences
    ]
    return Table(["experience", "classes", "images to learn from", "test images"], rows, num_left=2)
