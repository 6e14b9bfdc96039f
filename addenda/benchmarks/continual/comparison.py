"""Two runs of one stream side by side: what differs in their figures, and in how they were made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from addenda.benchmarks.continual.results import Results, read_results
from addenda.benchmarks.continual.tables import PRICE, QUALITY, Column, exactness
from addenda.benchmarks.report.spread import NOTHING, Spread, number, shown
from addenda.benchmarks.report.tables import Table, show
from addenda.exceptions import DataError
from addenda.terminal import console


@dataclass(frozen=True)
class Difference:
    """One figure of a method in both runs; `change` is B less A, None where one of them lacks it."""

    method: str
    column: Column
    a: Spread | None
    b: Spread | None
    change: float | None


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
        """Plain values; accuracies and forgetting as fractions, as in the results."""
        differences = [
            {
                "method": one.method,
                "figure": one.column.key,
                "a": one.a and one.a._asdict(),
                "b": one.b and one.b._asdict(),
                "change": one.change,
            }
            for one in self.differences
        ]
        return asdict(self) | {"differences": differences}


def compare_reports(a: Path, b: Path) -> Comparison:
    """Compares two runs of one stream.

    Args:
        a: a report's folder, or its results.json.
        b: likewise; differences are b less a.

    Raises:
        DataError: one cannot be read, they are of different streams, or no method is in both.
    """
    first, second = read_results(a), read_results(b)
    if _stream(first) != _stream(second):
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
    return Comparison(
        first.stream, str(a), str(b),
        tuple(_difference(name, column, first, second) for name in both for column in (*QUALITY, *PRICE)),
        {name: (exactness(first.of(name)), exactness(second.of(name))) for name in both},
        tuple(name for name in ours if name not in both),
        tuple(name for name in theirs if name not in both),
        _settings(first, second, both),
    )  # fmt: skip


def print_comparison(comparison: Comparison) -> None:
    """Prints the figures of every method in both, then what else differs."""
    rows: list[tuple[str, ...]] = []
    for name, (a, b) in comparison.exactness.items():
        mine = [one for one in comparison.differences if one.method == name]
        rows += [
            (
                name if i == 0 else "",
                one.column.title,
                shown(one.a, one.column.unit),
                shown(one.b, one.column.unit),
                _change(one),
            )
            for i, one in enumerate(mine)
        ]
        rows.append(("", "old tasks' logits", a, b, ""))
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


def _stream(results: Results) -> tuple[Any, ...]:
    """What makes a stream: its name, its labels, and which classes come when."""
    return results.stream, results.labels, [(one.name, one.classes) for one in results.experiences]


def _difference(name: str, column: Column, first: Results, second: Results) -> Difference:
    a, b = column.spread(first.of(name)), column.spread(second.of(name))
    return Difference(name, column, a, b, None if a is None or b is None else b.mean - a.mean)


def _change(one: Difference) -> str:
    return NOTHING if one.change is None else number(one.change, one.column.unit, "+")


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
