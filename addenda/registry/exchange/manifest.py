"""Validated data model of tasks and their associated rows in transit between registries.

Binary data (artifacts, golden logits, statistics) is referred to by sha256.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model

from addenda.exceptions import IntegrityError
from addenda.registry.store.digests import canonical_json
from addenda.registry.store.names import MAX_TEXT, check_name, check_tag, check_text
from addenda.registry.store.records import ROWS, default_of

Name = Annotated[str, AfterValidator(check_name)]
_Storable = AfterValidator(lambda text: check_text(text, "A text"))
Text = Annotated[str, Field(max_length=MAX_TEXT), _Storable]
PathText = Annotated[str, Field(max_length=4_096), _Storable]
Version = Annotated[int, Field(ge=1, le=99_999_999)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_TIME = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]{1,6})?[+]00:00$"


def _time(text: str) -> str:
    datetime.fromisoformat(text)  # raises ValueError for dates that do not exist
    return text


Time = Annotated[str, StringConstraints(pattern=_TIME), AfterValidator(_time)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_CHECKS: dict[Any, Any] = {str: Text, int: Count, tuple[str, ...]: list[Text], dict[str, str]: dict[Text, Text]}
_CHECKS_BY_NAME = {"name": Name, "version": Version, "artifact": Sha256, "digest": Sha256, "created_at": Time}


def _validated(rows: type, **by_name: Any) -> Any:
    """A validating model of a row; columns are checked by name if given, or else by type."""
    hints = get_type_hints(rows)
    columns: dict[str, Any] = {
        column.name: (
            by_name.get(column.name, _CHECKS.get(hints[column.name], hints[column.name])),
            ... if (default := default_of(column)) is MISSING else default,
        )
        for column in fields(rows)
    }
    return create_model(rows.__name__, __base__=_Strict, **columns)


if TYPE_CHECKING:
    from addenda.registry.store.records import BackboneRow, EvaluationRow, GoldenRow, RetirementRow, TaskRow
else:
    num_parameters = Annotated[int, Field(ge=0, lt=2**63)]
    BackboneRow = _validated(ROWS["backbone"], created_at=Time, source=PathText, num_parameters=num_parameters)
    TaskRow, GoldenRow, EvaluationRow, RetirementRow = (
        _validated(ROWS[table], **_CHECKS_BY_NAME) for table in ("task", "golden", "evaluation", "retirement")
    )


class Parent(_Strict):
    """A parent of a task."""

    name: Name
    version: Version
    sha256: Sha256


class Entry(_Strict):
    """A task and its associated rows."""

    task: TaskRow
    parents: list[Parent]  # in order
    goldens: Annotated[list[GoldenRow], Field(min_length=1)]
    statistics: Sha256 | None
    evaluations: list[EvaluationRow]  # oldest first
    retirement: RetirementRow | None
    tags: list[Annotated[str, AfterValidator(check_tag)]]

    @property
    def ref(self) -> str:
        """`name:version` in the source."""
        return f"{self.task.name}:{self.task.version}"

    @property
    def blobs(self) -> Iterator[str]:
        """The sha256 of each of the task's blobs."""
        yield self.task.artifact
        yield from (golden.digest for golden in self.goldens)
        if self.statistics is not None:
            yield self.statistics


class BundledAlias(_Strict):
    """An alias `name@alias` and the version it points at."""

    name: Name
    alias: Name
    version: Version


class Contents(_Strict):
    """Backbones and tasks in transit; a task comes after all its ancestors."""

    backbones: list[BackboneRow]
    tasks: list[Entry]


def first_error(error: ValidationError) -> str:
    """The first validation error, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    location = ".".join(map(str, first["loc"]))
    return f"{location or 'its manifest'}: {first['msg'][:200]}"


MAX_JSON, MAX_METRICS, MAX_ROWS, MAX_EVALUATIONS = 1_000_000, 32_000_000, 1_000, 100_000
"""Maximum bytes of a configuration; bytes of metrics and data, where confusion matrices are largest; number of tags and
golden probes of a task; number of its evaluations, one a night for centuries."""
MAX_PROBE_IMAGES = 64

Share = Annotated[float, Field(ge=0, le=1)] | None
Loss = list[float | None]


class _Shaped(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Scores(_Shaped):
    num_images: Annotated[int, Field(ge=0)] = 0
    accuracy: Share = None
    balanced_accuracy: Share = None
    calibration_error: Share = None
    mean_average_precision: Share = None
    f1_micro: Share = None
    f1_macro: Share = None
    exact_match: Share = None
    per_class: dict[str, Share] = {}
    confusion: list[list[int]] = []


class _Measured(_Shaped):
    validation: _Scores = _Scores()
    test: _Scores = _Scores()


class _Epoch(_Shaped):
    train_loss: Loss
    validation_loss: Loss


class _Metrics(_Measured):
    linear_probe: _Measured = _Measured()
    layer_probe: _Measured = _Measured()
    regression: _Measured = _Measured()
    candidates: list[dict[str, Any]] = []
    chosen: dict[str, Any] | None = None
    curves: list[_Epoch] = []


class _GrownFrom(_Shaped):
    version: Version
    sha256: Sha256


class _Data(_Shaped):
    grown_from: _GrownFrom | None = None
    datasets: list[str] = []
    run: dict[str, Any] = {}


def check_arrival(entry: Entry) -> None:
    """Raises IntegrityError if a task's records are too large, too many or malformed."""
    row = entry.task
    for what, count, maximum in (
        ("tags", len(entry.tags), MAX_ROWS),
        ("golden probes", len(entry.goldens), MAX_ROWS),
        ("evaluations", len(entry.evaluations), MAX_EVALUATIONS),
    ):
        if count > maximum:
            raise IntegrityError(f"it has {count:,} {what}; the maximum is {maximum:,}")
    values = {"config": (row.config, MAX_JSON), "data": (row.data, MAX_METRICS), "metrics": (row.metrics, MAX_METRICS)}
    values["packages"] = (dict(row.packages), MAX_JSON)
    values |= {f"golden probe {i}": (golden.numerics, MAX_JSON) for i, golden in enumerate(entry.goldens)}
    values |= {f"evaluation {i}": (record.metrics, MAX_METRICS) for i, record in enumerate(entry.evaluations)}
    for what, (value, maximum) in values.items():
        if (size := len(canonical_json(value))) > maximum:
            raise IntegrityError(f"its {what} has {size:,} bytes; the maximum is {maximum:,}")
    try:
        _Metrics.model_validate(row.metrics)
        for evaluation in entry.evaluations:
            _Scores.model_validate(evaluation.metrics)
    except ValidationError as error:
        raise IntegrityError(f"its metrics are not valid: {first_error(error)}") from error
    try:
        _Data.model_validate(row.data)
    except ValidationError as error:
        raise IntegrityError(f"its data are not valid: {first_error(error)}") from error
    num_classes = len(row.labels)
    metrics = [row.metrics.get(split) or {} for split in ("validation", "test")]
    metrics += [evaluation.metrics for evaluation in entry.evaluations]
    for scores in metrics:
        matrix = scores.get("confusion") or []
        if matrix and [len(line) for line in matrix] != [num_classes] * num_classes:
            raise IntegrityError(f"its metrics are not valid: a confusion matrix is not {num_classes} x {num_classes}")
