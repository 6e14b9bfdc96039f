"""Results of a run of `addenda bench continual`, and the file that stores them."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from avalanche.evaluation.metrics.forgetting_bwt import BWT, Forgetting
from avalanche.evaluation.metrics.forward_transfer import ForwardTransfer
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from addenda.exceptions import DataError

FILE = "results.json"
SHOWN_PROBLEMS = 5

# Logits of a baseline that diverged differ by NaN or infinity, which JSON can only store as strings.
STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Change = Annotated[float, Field(ge=-1, le=1)]
Matrix = list[list[Share | None]]
"""Accuracy after experience i (row) on experience j (column); None where it was not measured."""


@dataclass(frozen=True, config=STRICT)
class ContinualMetrics:
    """Avalanche's metrics of an accuracy matrix, as fractions; None where a metric is undefined."""

    average_accuracy: Share  # after the last experience
    average_incremental_accuracy: Share | None  # mean, over experiences, of the average accuracy on those so far
    forgetting: Change | None  # accuracy when learned minus final accuracy, averaged over old experiences
    backward_transfer: Change | None  # negative forgetting
    forward_transfer: Change | None  # accuracy on an experience before it is learned; None if not measurable


@dataclass(frozen=True, config=STRICT)
class Cell:
    """Results of one method with one seed."""

    method: str
    seed: int
    task_incremental: Matrix  # None where no class of the experience can be predicted yet
    class_incremental: Matrix
    comparisons: Annotated[int, Field(ge=0)]  # times an old experience's task-incremental logits were compared
    identical: bool | None  # always the same bytes as when the experience was learned; None without comparisons
    max_difference: float
    changed_decisions: Share | None  # share of class-incremental predictions on old test images that changed
    train_seconds: list[Amount]  # per experience
    stored_bytes: Amount  # mean per task
    relative_inference: Amount  # operations to predict one image, relative to a forward pass of the backbone
    task_incremental_metrics: ContinualMetrics
    class_incremental_metrics: ContinualMetrics
    extra: dict[str, float | dict[str, float]]  # metrics that only some methods have

    @model_validator(mode="after")
    def _consistent(self) -> Cell:
        for name in ("task_incremental", "class_incremental"):
            matrix: Matrix = getattr(self, name)
            if any(len(row) != len(self.train_seconds) for row in matrix) or len(matrix) != len(self.train_seconds):
                raise ValueError(f"{name} is not a square matrix with a row per experience in train_seconds")
            missing = [{value is None for value in row[: i + 1]} for i, row in enumerate(matrix)]
            # A method that predicts only after the last experience has no accuracy at all before.
            if {True, False} in missing or missing[-1] == {True}:
                raise ValueError(f"{name} lacks the accuracy on an experience that was learned")
        if (self.identical is None) != (self.comparisons == 0):
            raise ValueError(f"identical is {self.identical}, but there are {self.comparisons} comparisons")
        if self.identical and self.max_difference != 0:
            raise ValueError(f"identical is true, but max_difference is {self.max_difference:g}")
        return self


@dataclass(frozen=True, config=STRICT)
class MethodNote:
    """Label of a method and a note on it; cells refer to it by name, and file names contain the name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    label: str
    note: str
    verified: bool = True  # False, in results of earlier versions, for a port not checked against a published figure


@dataclass(frozen=True, config=STRICT)
class ExperienceNote:
    """An experience: its name, its classes as indices into the stream's labels, and its numbers of images."""

    name: str
    classes: list[int]
    num_train: int
    num_test: int


@dataclass(frozen=True, config=STRICT)
class Results:
    """Results of a run."""

    stream: str
    command: str  # command line of the run; empty if it was started from Python
    hardware: str
    expected: dict[str, Any]  # Addenda's metrics from the stream's file; empty if other settings were given
    experiences: Annotated[list[ExperienceNote], Field(min_length=1)]
    labels: list[str]
    config: dict[str, Any]
    environment: dict[str, Any]
    methods: Annotated[list[MethodNote], Field(min_length=1)]
    cells: list[Cell]

    @model_validator(mode="after")
    def _consistent(self) -> Results:
        names = [note.name for note in self.methods]
        if sorted(set(names)) != sorted(names) or {cell.method for cell in self.cells} != set(names):
            raise ValueError("methods must list each method of the cells once")
        if len({(cell.method, cell.seed) for cell in self.cells}) < len(self.cells):
            raise ValueError("a method has two cells with the same seed")
        if any(len(cell.task_incremental) != len(self.experiences) for cell in self.cells):
            raise ValueError("a cell has a different number of experiences")
        if any(not 0 <= number < len(self.labels) for experience in self.experiences for number in experience.classes):
            raise ValueError("an experience has a class without a label")
        return self

    def of(self, method: str) -> list[Cell]:
        """The cells of a method, sorted by seed."""
        return sorted((cell for cell in self.cells if cell.method == method), key=lambda cell: cell.seed)

    def to_json(self) -> dict[str, Any]:
        """The results as plain JSON values."""
        values: dict[str, Any] = json.loads(TypeAdapter(Results).dump_json(self))
        return values

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Results:
        """Parse the JSON of `to_json`; a DataError names its source if it is invalid."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()]
            more = len(problems) - SHOWN_PROBLEMS
            shown = "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; {more} more" if more > 0 else "")
            raise DataError(
                f"{source} does not contain valid results of `addenda bench continual`: {shown}. "
                "Give the results of another run, or repeat the run."
            ) from error


def read_results(path: Path) -> Results:
    """Read the results in a report's folder, or in a results.json."""
    file = path / FILE if path.is_dir() else path
    if not file.exists():
        folder = file.parent if file.name == FILE else path
        raise DataError(
            f"There is no report at {str(path)!r}. Create one with "
            f"`addenda bench continual STREAM --out {shlex.quote(str(folder))}`."
        )
    try:
        text = file.read_bytes()
    except OSError as error:
        raise DataError(f"Results {str(file)!r} cannot be read: {error.strerror}.") from error
    return Results.from_json(text, f"File {str(file)!r}")


def measure(matrix: Sequence[Sequence[float | None]]) -> ContinualMetrics:
    """Compute the metrics of an accuracy matrix.

    All experiences have equal weight, whatever their number of test images. Accuracy before any training counts as 0,
    so forward transfer is the accuracy on an experience just before it is learned, where that was measured.
    """
    count = len(matrix)
    forgetting, backward, forward = Forgetting(), BWT(), ForwardTransfer()
    for after, row in enumerate(matrix):
        for on, accuracy in enumerate(row[: after + 2]):
            if accuracy is not None and on <= after:
                forgetting.update(on, accuracy, initial=on == after)
                backward.update(on, accuracy, initial=on == after)
            elif accuracy is not None:
                forward.update(on, 0.0, initial=True)
                forward.update(on, accuracy)
    means = [_mean(row[: after + 1]) for after, row in enumerate(matrix)]
    return ContinualMetrics(
        average_accuracy=means[-1] or 0.0,
        average_incremental_accuracy=_mean(means),
        forgetting=_mean(map(forgetting.result_key, range(count - 1))),
        backward_transfer=_mean(map(backward.result_key, range(count - 1))),
        forward_transfer=_mean(map(forward.result_key, range(1, count))),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None if there is no value or any is None."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return fmean(known) if known and len(known) == len(listed) else None


def largest(differences: Iterable[float]) -> float:
    """The maximum; NaN, from a method that diverged, counts as the largest."""
    return max(differences, key=lambda value: (math.isnan(value), value))
