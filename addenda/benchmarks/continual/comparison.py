"""Two runs of one stream side by side: what differs in their figures, and in how they were made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from addenda.benchmarks.continual.results import Results, read_results
from addenda.benchmarks.continual.tables import PRICE, QUALITY, Column, exactness
from addenda.benchmarks.report.tables import NOTHING, Spread, Table, number, show, shown
from addenda.exceptions import DataError
from addenda.terminal import console


@dataclass(frozen=True)
class Difference:
    """One figure of a method in both runs; `change` is B less A, None where one of them lacks it."""

    method: str
    column: Column
    a: Spread | None
    b: Spread | None

    @property
    def change(self) -> float | None:
        """B less A, in the mean."""
        return None if self.a is None or self.b is None else self.b.mean - self.a.mean

    def to_json(self) -> dict[str, Any]:
        """Plain values; accuracies and forgetting as fractions, as in the results."""
        a, b = (spread and spread._asdict() for spread in (self.a, self.b))
        return {"method": self.method, "figure": self.column.key, "a": a, "b": b, "change": self.change}

    def cells(self) -> tuple[str, ...]:
        """The figure's row, less the method."""
        unit = self.column.unit
        change = NOTHING if self.change is None else number(self.change, unit, "+")
        return self.column.title, shown(self.a, unit), shown(self.b, unit), change


@dataclass(frozen=True)
class Comparison:
    """Run B beside run A.

    Attributes:
        stream: of both.
        a: where run A was read.
        b: where run B was read.
        differences: the headline figures of every method in both.
        exactness: of every method in both, what became of old tasks' logits in A and in B.
        only_a: methods that B lacks.
        only_b: methods that A lacks.
        settings: what else is not the same, by dotted name: its text in A and in B.
    """

    stream: str
    a: str
    b: str
    differences: tuple[Difference, ...]
    exactness: Mapping[str, tuple[str, str]]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    settings: Mapping[str, tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"differences": [one.to_json() for one in self.differences]}


def compare_reports(a: Path, b: Path) -> Comparison:
    """Compares two runs of one stream.

    Args:
        a: a report's folder, or its results.json.
        b: likewise; differences are b less a.

    Raises:
        DataError: one cannot be read, they are of different streams, or no method is in both.
    """
    first, second = read_results(a), read_results(b)
    made = [(one.stream, one.labels, [(e.name, e.classes) for e in one.experiences]) for one in (first, second)]
    if made[0] != made[1]:
        what = (
            f"{str(a)!r} is of {first.stream!r}, {str(b)!r} of {second.stream!r}"
            if first.stream != second.stream
            else f"{str(a)!r} and {str(b)!r} are both called {first.stream!r}, but their experiences differ"
        )
        raise DataError(f"Two runs of different streams cannot be compared: {what}. Give two runs of one stream.")
    ours, theirs = ([note.name for note in results.methods] for results in (first, second))
    both = [name for name in ours if name in theirs]
    if not both:
        raise DataError(f"No method is in both: {str(a)!r} has {', '.join(ours)}; {str(b)!r} has {', '.join(theirs)}.")
    cells = {name: (first.of(name), second.of(name)) for name in both}
    return Comparison(
        first.stream, str(a), str(b),
        tuple(
            Difference(name, column, *map(column.spread, cells[name])) for name in both for column in (*QUALITY, *PRICE)
        ),
        {name: (exactness(one), exactness(other)) for name, (one, other) in cells.items()},
        tuple(name for name in ours if name not in both), tuple(name for name in theirs if name not in both),
        _settings(first, second, both),
    )  # fmt: skip


def print_comparison(comparison: Comparison) -> None:
    """Prints the figures of every method in both, then what else differs."""
    rows: list[tuple[str, ...]] = []
    for name, (a, b) in comparison.exactness.items():
        mine = [one.cells() for one in comparison.differences if one.method == name]
        rows += [(name if i == 0 else "", *cells) for i, cells in enumerate([*mine, ("old tasks' logits", a, b, "")])]
    title = f"{comparison.stream}: B less A; mean ± standard deviation over seeds"
    show(title, Table(("method", "figure", "A", "B", "B - A"), rows, num_left=2))
    for run, where, only in (("A", comparison.a, comparison.only_a), ("B", comparison.b, comparison.only_b)):
        text = f"{run}: {where}" + (f"; only there: {', '.join(only)}" if only else "")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if comparison.settings:
        settings = [(name, *values) for name, values in comparison.settings.items()]
        show("What else differs", Table(("setting", "A", "B"), settings, num_left=3))
    else:
        console.print("Configuration, environment and numbers of images are the same.")


def _settings(first: Results, second: Results, both: Sequence[str]) -> dict[str, tuple[str, str]]:
    a, b = (
        dict(_flat({
            "config": one.config, "environment": one.environment, "hardware": one.hardware,
            "images": {each.name: f"{each.num_train} + {each.num_test}" for each in one.experiences},
            "seeds": {name: [cell.seed for cell in one.of(name)] for name in both},
        }))
        for one in (first, second)
    )  # fmt: skip
    names = [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]
    return {name: (a.get(name, NOTHING), b.get(name, NOTHING)) for name in names}


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Every value by its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", str(value)
