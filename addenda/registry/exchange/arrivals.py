"""What comes from another registry, beyond its form: how large its records are, and that its figures are figures.

Pages and commands show these records, so a stranger's must have the shape that our own have.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from addenda.exceptions import IntegrityError
from addenda.registry.exchange.manifest import Entry, fault
from addenda.registry.store.hashing import canonical_json

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


class _Regression(_Shaped):
    validation: _Scores = _Scores()
    test: _Scores = _Scores()


class _Epoch(_Shaped):
    train_loss: Loss
    validation_loss: Loss


class _Metrics(_Shaped):
    validation: _Scores = _Scores()
    test: _Scores = _Scores()
    regression: _Regression = _Regression()
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
