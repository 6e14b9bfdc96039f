"""Two runs of one stream side by side: what differs in their figures, and in how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from addenda.benchmarks.continual.columns import PRICE, QUALITY, exactness, flat
from addenda.benchmarks.continual.results import Results, read_results
from addenda.benchmarks.report.tables import NOTHING, Spread, Table, number, show, shown
from addenda.exceptions import DataError
from addenda.terminal import console

COLUMNS = {column.key: column for column in (*QUALITY, *PRICE)}


@dataclass(frozen=True)
class MetricChange:
    """One figure of a method in both runs, accuracies and forgetting as fractions; `change` is B less A."""

    method: str
    figure: str
    a: Spread | None
    b: Spread | None
    change: float | None


@dataclass(frozen=True)
class ResultsComparison:
    """Run B beside run A."""

    stream: str
    a: str  # where run A was read
    b: str
    differences: tuple[MetricChange, ...]  # in the headline figures of every method in both
    exactness: Mapping[str, tuple[str, str]]  # of every method in both, what became of old tasks' logits in A and in B
    only_a: tuple[str, ...]  # methods that B lacks
    only_b: tuple[str, ...]
    settings: Mapping[str, tuple[str, str]]  # what else is not the same, by dotted name: its text in A and in B

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_reports(a: Path, b: Path) -> ResultsComparison:
    """Compares two runs of one stream, each a report's folder or its results.json; differences are b less a."""
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
    differences = []
    for name in both:
        for key, column in COLUMNS.items():
            before, after = column.spread(first.of(name)), column.spread(second.of(name))
            change = None if before is None or after is None else after.mean - before.mean
            differences.append(MetricChange(name, key, before, after, change))
    return ResultsComparison(
        first.stream, str(a), str(b), tuple(differences),
        {name: (exactness(first.of(name)), exactness(second.of(name))) for name in both},
        tuple(name for name in ours if name not in both), tuple(name for name in theirs if name not in both),
        _settings(first, second, both),
    )  # fmt: skip


def print_comparison(comparison: ResultsComparison) -> None:
    """Prints the figures of every method in both, then what else differs."""
    rows: list[tuple[str, ...]] = []
    for name, logits in comparison.exactness.items():
        for i, one in enumerate(each for each in comparison.differences if each.method == name):
            column = COLUMNS[one.figure]
            change = NOTHING if one.change is None else number(one.change, column.unit, "+")
            values = shown(one.a, column.unit), shown(one.b, column.unit), change
            rows.append((name if i == 0 else "", column.title, *values))
        rows.append(("", "old tasks' logits", *logits, ""))
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
        {name: str(value) for name, value in flat({
            "config": one.config, "environment": one.environment, "hardware": one.hardware,
            "images": {each.name: f"{each.num_train} + {each.num_test}" for each in one.experiences},
            "seeds": {name: [cell.seed for cell in one.of(name)] for name in both},
        })}
        for one in (first, second)
    )  # fmt: skip
    names = [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]
    return {name: (a.get(name, NOTHING), b.get(name, NOTHING)) for name in names}
