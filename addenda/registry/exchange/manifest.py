"""What travels from one registry to another: tasks with all that belongs to them, as plain data that is checked.

Bytes do not stand in it but their sha256: artifacts, logits of golden probes, statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model

from addenda.exceptions import IntegrityError
from addenda.registry.store.digests import canonical_json
from addenda.registry.store.names import check_name, check_tag, check_text
from addenda.registry.store.records import ROWS, default_of

Name = Annotated[str, AfterValidator(check_name)]
Text = Annotated[str, AfterValidator(lambda text: check_text(text, "A text"))]
Version = Annotated[int, Field(ge=1, le=99_999_999)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_TIME = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]{1,6})?[+]00:00$"


def _time(text: str) -> str:
    datetime.fromisoformat(text)  # a ValueError where the calendar has no such day
    return text


Time = Annotated[str, StringConstraints(pattern=_TIME), AfterValidator(_time)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_CHECKS: dict[Any, Any] = {str: Text, int: Count, tuple[str, ...]: list[Text], dict[str, str]: dict[Text, Text]}
_NAMED = {"name": Name, "version": Version, "artifact": Sha256, "digest": Sha256, "created_at": Time}


def _checked(rows: type, **named: Any) -> Any:
    """A row as data that is checked: by its columns' types, or by their names."""
    hints = get_type_hints(rows)
    columns: dict[str, Any] = {
        column.name: (
            named.get(column.name, _CHECKS.get(hints[column.name], hints[column.name])),
            ... if (default := default_of(column)) is MISSING else default,
        )
        for column in fields(rows)
    }
    return create_model(rows.__name__, __base__=_Part, **columns)


if TYPE_CHECKING:
    from addenda.registry.store.records import BackboneRow, EvaluationRow, GoldenRow, RetirementRow, TaskRow
else:
    BackboneRow = _checked(ROWS["backbone"], created_at=Time)
    others = (_checked(ROWS[table], **_NAMED) for table in ("task", "golden", "evaluation", "retirement"))
    TaskRow, GoldenRow, EvaluationRow, RetirementRow = others


class Parent(_Part):
    """A task that another extends."""

    name: Name
    version: Version
    sha256: Sha256


class Entry(_Part):
    """A task and all that belongs to it."""

    task: TaskRow
    parents: list[Parent]  # in order
    goldens: Annotated[list[GoldenRow], Field(min_length=1)]
    statistics: Sha256 | None
    evaluations: list[EvaluationRow]  # oldest first
    retirement: RetirementRow | None
    tags: list[Annotated[str, AfterValidator(check_tag)]]

    @property
    def ref(self) -> str:
        """`name:version`, at home."""
        return f"{self.task.name}:{self.task.version}"

    @property
    def blobs(self) -> Iterator[str]:
        """The sha256 of everything that belongs to it as bytes."""
        yield self.task.artifact
        yield from (golden.digest for golden in self.goldens)
        if self.statistics is not None:
            yield self.statistics


class BundledAlias(_Part):
    """`name@alias` points at a version."""

    name: Name
    alias: Name
    version: Version


class Contents(_Part):
    """All that travels together: every ancestor of a task stands before it."""

    backbones: list[BackboneRow]
    tasks: list[Entry]


def fault(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place or 'its manifest'}: {first['msg'][:200]}"


TEXT, JSON, FIGURES, MANY = 1_000, 1_000_000, 32_000_000, 1_000
"""Characters of a text; bytes of a configuration; of figures, of which a confusion matrix is the largest; tags, golden
probes and evaluations of one task."""
PROBES = 64
"""Images of a golden probe."""

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


def check_arrival(entry: Entry) -> None:
    """Raises IntegrityError where records are too large, too many, or have another shape than those of a task."""
    row = entry.task
    for what, listed in (("tags", entry.tags), ("golden probes", entry.goldens), ("evaluations", entry.evaluations)):
        if len(listed) > MANY:
            raise IntegrityError(f"it has {len(listed):,} {what}; {MANY:,} is the most")
    texts = [row.code_version, row.created_by, *([entry.retirement.reason] if entry.retirement else [])]
    texts += [one.created_by for one in (*entry.goldens, *entry.evaluations)]
    if (longest := max(map(len, texts))) > TEXT:
        raise IntegrityError(f"one of its texts has {longest:,} characters; {TEXT:,} is the most")
    sizes = {"config": (row.config, JSON), "data": (row.data, FIGURES), "metrics": (row.metrics, FIGURES)}
    sizes["packages"] = (dict(row.packages), JSON)
    sizes |= {f"golden probe {i}": (one.numerics, JSON) for i, one in enumerate(entry.goldens)}
    sizes |= {f"evaluation {i}": (one.metrics, FIGURES) for i, one in enumerate(entry.evaluations)}
    for what, (value, most) in sizes.items():
        if (found := len(canonical_json(value))) > most:
            raise IntegrityError(f"its {what} has {found:,} bytes; {most:,} is the most")
    try:
        _Metrics.model_validate(row.metrics)
        for one in entry.evaluations:
            _Scores.model_validate(one.metrics)
    except ValidationError as error:
        raise IntegrityError(f"its metrics are not valid: {fault(error)}") from error
    count = len(row.labels)
    parts = [row.metrics.get(part) or {} for part in ("validation", "test")] + [
        one.metrics for one in entry.evaluations
    ]
    for part in parts:
        matrix = part.get("confusion") or []
        if matrix and [len(line) for line in matrix] != [count] * count:
            raise IntegrityError(f"its metrics are not valid: a confusion matrix is not of {count} classes")
