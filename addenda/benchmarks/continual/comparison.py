"""Comparison of two runs of a stream: differences in their metrics and in their settings."""

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
    """A metric of a method in both runs, accuracy and forgetting as fractions; `change` is B minus A."""

    method: str
    figure: str
    a: Spread | None
    b: Spread | None
    change: float | None


@dataclass(frozen=True)
class ResultsComparison:
    """Comparison of run B with run A."""

    stream: str
    a: str  # path of run A
    b: str
    differences: tuple[MetricChange, ...]  # main metrics of every method in both runs
    exactness: Mapping[str, tuple[str, str]]  # whether old logits changed in A and in B, per method in both
    only_a: tuple[str, ...]  # methods missing from B
    only_b: tuple[str, ...]
    settings: Mapping[str, tuple[str, str]]  # other differences by dotted name: the values in A and in B

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return asdict(self)


def compare_reports(a: Path, b: Path) -> ResultsComparison:
    """Compare two runs of a stream, each given as a report's folder or its results.json; differences are b minus a."""
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
            differences.append(MetricChange(name, key, before, after, change))
    return ResultsComparison(
        first.stream, str(a), str(b), tuple(differences),
        {name: (exactness(first.of(name)), exactness(second.of(name))) for name in both},
        tuple(name for name in names_a if name not in both), tuple(name for name in names_b if name not in both),
        _settings(first, second, both),
    )  # fmt: skip


def print_comparison(comparison: ResultsComparison) -> None:
    """Print the metrics of every method in both runs, then the other differences."""
    rows: list[tuple[str, ...]] = []
    for name, logits in comparison.exactness.items():
        for i, metric in enumerate(c for c in comparison.differences if c.method == name):
            column = COLUMNS[metric.figure]
            change = NOTHING if metric.change is None else number(metric.change, column.unit, "+")
            values = shown(metric.a, column.unit), shown(metric.b, column.unit), change
            rows.append((name if i == 0 else "", column.title, *values))
        rows.append(("", "old tasks' logits", *logits, ""))
    title = f"{comparison.stream}: B minus A; mean ± standard deviation over seeds"
    show(title, Table(("method", "metric", "A", "B", "B - A"), rows, num_left=2))
    for run, path, only in (("A", comparison.a, comparison.only_a), ("B", comparison.b, comparison.only_b)):
        text = f"{run}: {path}" + (f"; only in {run}: {', '.join(only)}" if only else "")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if comparison.settings:
        settings = [(name, *values) for name, values in comparison.settings.items()]
        show("Other differences", Table(("setting", "A", "B"), settings, num_left=3))
    else:
        console.print("Configuration, environment and numbers of images are the same.")


def _settings(first: Results, second: Results, both: Sequence[str]) -> dict[str, tuple[str, str]]:
    a, b = (
        {name: str(value) for name, value in flat({
            "config": run.config, "environment": run.environment, "hardware": run.hardware,
            "images": {note.name: f"{note.num_train} + {note.num_test}" for note in run.experiences},
            "seeds": {name: [cell.seed for cell in run.of(name)] for name in both},
        })}
        for run in (first, second)
    )  # fmt: skip
    names = [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]
    return {name: (a.get(name, NOTHING), b.get(name, NOTHING)) for name in names}
