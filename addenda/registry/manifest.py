"""What travels from one registry to another: tasks with all that belongs to them, as plain data that is checked.

Bytes do not stand in it but their sha256: artifacts, logits of golden probes, statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from addenda.registry.bounds import check_text
from addenda.registry.task import check_name, check_tag

Name = Annotated[str, AfterValidator(check_name)]
Text = Annotated[str, AfterValidator(lambda text: check_text(text, "A text"))]
Version = Annotated[int, Field(ge=1, le=99_999_999)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Time = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]{1,6})?[+]00:00$"


def _time(text: str) -> str:
    datetime.fromisoformat(text)  # a ValueError where the calendar has no such day
    return text


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Stamped(_Part):
    """What somebody made at some time, at home: both stay as they are."""

    created_by: Text
    created_at: Annotated[str, StringConstraints(pattern=_Time), AfterValidator(_time)]


class Backbone(_Stamped):
    """A row of the table of this name, and so are the next four; without the numbers that one database gave."""

    fingerprint: Text
    name: Text
    source: Text
    precision: Text
    preprocessing: dict[str, Any]
    embed_dim: Count
    depth: Count
    num_heads: Count
    num_tokens: Count
    num_parameters: Count


class TaskRow(_Stamped):
    """A task's own row; `artifact` is a sha256."""

    name: Name
    version: Version
    backbone: Text
    artifact: Sha256
    labels: list[Text]
    num_memory_tokens: Count
    num_parameters: Count
    objective: Text
    config: dict[str, Any]
    metrics: dict[str, Any]
    score: float | None
    data: dict[str, Any]
    code_version: Text
    packages: dict[Text, Text]


class Golden(_Stamped):
    """A golden probe; `digest` is its logits' sha256."""

    numerics_fingerprint: Text
    numerics: dict[str, Any]
    digest: Sha256


class Evaluation(_Stamped):
    """A scoring, at a generation of the registry where it was made."""

    data_fingerprint: Text
    generation: Count
    numerics_fingerprint: Text
    metrics: dict[str, Any]
    logits_digest: Text


class Retirement(_Stamped):
    """Why a task was retired."""

    reason: Text


class Parent(_Part):
    """A task that another extends."""

    name: Name
    version: Version
    sha256: Sha256


class Entry(_Part):
    """A task and all that belongs to it.

    Attributes:
        task: its row.
        parents: what it extends, in order.
        goldens: its golden probes, at least one.
        statistics: sha256 of what a router knows of its images.
        evaluations: its scorings, oldest first.
        retirement: its tombstone, if it is retired.
        tags: its tags.
    """

    task: TaskRow
    parents: list[Parent]
    goldens: Annotated[list[Golden], Field(min_length=1)]
    statistics: Sha256 | None
    evaluations: list[Evaluation]
    retirement: Retirement | None
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


class Alias(_Part):
    """`name@alias` points at a version."""

    name: Name
    alias: Name
    version: Version


class Contents(_Part):
    """All that travels together: every ancestor of a task stands before it."""

    backbones: list[Backbone]
    tasks: list[Entry]


def fault(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place or 'its manifest'}: {first['msg'][:200]}"
