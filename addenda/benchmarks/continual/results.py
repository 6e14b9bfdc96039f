"""What a run of `addenda bench continual` measured, and the file that keeps it."""

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

# A logit of a rival that diverged differs by NaN or infinity, which JSON knows only as texts.
STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Change = Annotated[float, Field(ge=-1, le=1)]
Matrix = list[list[Share | None]]
"""Accuracy after experience i (row) on experience j (column); None where it was not measured."""


@dataclass(frozen=True, config=STRICT)
class ContinualMetrics:
    """Avalanche's figures of one accuracy matrix, as fractions; None where there is nothing to measure them by."""

    average_accuracy: Share  # after the last experience
    average_incremental_accuracy: Share | None  # the mean, over all experiences, of that on everything met until then
    forgetting: Change | None  # accuracy when learned less accuracy at the end, in the mean over old experiences
    backward_transfer: Change | None  # its negative
    forward_transfer: Change | None  # accuracy on an experience before it is learned; None where none is offered then


@dataclass(frozen=True, config=STRICT)
class Cell:
    """One method with one seed."""

    method: str
    seed: int
    task_incremental: Matrix  # the task being known; None where no class of the experience is offered
    class_incremental: Matrix
    comparisons: Annotated[int, Field(ge=0)]  # of an old experience's told logits with those when it was learned
    identical: bool | None  # whether they were the same, byte for byte, each time; None where nothing was compared
    max_difference: float
    changed_decisions: Share | None  # of the untold answers on old experiences' test images
    train_seconds: list[Amount]  # of each experience
    stored_bytes: Amount  # for one task, in the mean
    relative_inference: Amount  # arithmetic of one image's answer, over one pass of the backbone
    task_incremental_metrics: ContinualMetrics
    class_incremental_metrics: ContinualMetrics
    extra: dict[str, float | dict[str, float]]  # what only some methods have: a figure, or several by name

    @model_validator(mode="after")
    def _consistent(self) -> Cell:
        for name, matrix in (
            ("task_incremental", self.task_incremental),
            ("class_incremental", self.class_incremental),
        ):
            if any(len(row) != len(self.train_seconds) for row in matrix) or len(matrix) != len(self.train_seconds):
                raise ValueError(f"{name} is not a square of as many experiences as train_seconds has")
            met = [{value is None for value in row[: i + 1]} for i, row in enumerate(matrix)]
            if {True, False} in met or met[-1] == {True}:  # a method that answers late has none at all until then
                raise ValueError(f"{name} has no accuracy on an experience that was learned")
        if (self.identical is None) != (self.comparisons == 0):
            raise ValueError(f"{self.comparisons} comparisons, and identical is {self.identical}")
        if self.identical and self.max_difference != 0:
            raise ValueError(f"identical, yet max_difference is {self.max_difference:g}")
        return self


@dataclass(frozen=True, config=STRICT)
class MethodNote:
    """What people should know of a method, in a sentence; its name is that of the cells, and names files too."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    label: str
    note: str
    verified: bool = True  # False, in results of earlier versions, for a port not checked against a published figure


@dataclass(frozen=True, config=STRICT)
class ExperienceNote:
    """One experience: its name, its classes as numbers among the stream's labels, and how many images it has."""

    name: str
    classes: list[int]
    num_train: int
    num_test: int


@dataclass(frozen=True, config=STRICT)
class Results:
    """A whole run."""

    stream: str
    command: str  # that made it; empty where it was made in Python
    hardware: str
    expected: dict[str, Any]  # of Addenda, by the stream's file; empty where the stream was run otherwise
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
            raise ValueError("methods are not those of the cells, each once")
        if len({(cell.method, cell.seed) for cell in self.cells}) < len(self.cells):
            raise ValueError("a method has two cells of one seed")
        if any(len(cell.task_incremental) != len(self.experiences) for cell in self.cells):
            raise ValueError("a cell has another number of experiences")
        if any(not 0 <= number < len(self.labels) for one in self.experiences for number in one.classes):
            raise ValueError("an experience has a class without a label")
        return self

    def of(self, method: str) -> list[Cell]:
        """The cells of a method, in the order of their seeds."""
        return sorted((cell for cell in self.cells if cell.method == method), key=lambda cell: cell.seed)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the file holds them."""
        values: dict[str, Any] = json.loads(TypeAdapter(Results).dump_json(self))
        return values

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Results:
        """Reads what `to_json` gave; DataError names its source where it is damaged, or describes something else."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()]
            more = len(problems) - SHOWN_PROBLEMS
            said = "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; {more} more" if more > 0 else "")
            raise DataError(
                f"{source} holds no whole results of `addenda bench continual`: {said}. "
                "Give those of another run, or run it again."
            ) from error


def read_results(place: Path) -> Results:
    """The results in a report's folder, or in a file."""
    file = place / FILE if place.is_dir() else place
    if not file.exists():
        folder = file.parent if file.name == FILE else place
        raise DataError(
            f"There is no report at {str(place)!r}. `addenda bench continual STREAM --out {shlex.quote(str(folder))}` "
            "makes one."
        )
    try:
        text = file.read_bytes()
    except OSError as error:
        raise DataError(f"The results {str(file)!r} cannot be read: {error.strerror}.") from error
    return Results.from_json(text, f"The file {str(file)!r}")


def measure(matrix: Sequence[Sequence[float | None]]) -> ContinualMetrics:
    """The figures of one matrix.

    Every experience weighs the same, however many test images it has. Before anything is learned nothing is answered,
    so forward transfer is the accuracy on an experience before it is learned, where it was measured.
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
    """The mean; None where one is missing, or all."""
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None


def largest(differences: Iterable[float]) -> float:
    """The largest; NaN, of a method that diverged, is larger than any."""
    return max(differences, key=lambda value: (math.isnan(value), value))
