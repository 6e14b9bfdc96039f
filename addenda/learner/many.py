"""Learns many tasks from one file, in order; a task that fails does not stop the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from addenda.exceptions import AddendaError, DataError, RegistryError
from addenda.files import expanded
from addenda.learner.context import Report
from addenda.learner.data import Data, open_parts
from addenda.learner.learn_config import LearnConfig, merged, read_mapping
from addenda.learner.learner import Learner
from addenda.registry import Registry, Task, TaskFilter, check_new_name
from addenda.text import NOTABLE_S, duration

State = Literal["learned", "learned before", "failed", "skipped"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnRow:
    """One task to learn, as arguments of `Learner.learn`.

    Attributes:
        name: the task's name.
        data: the training data.
        test: the test data. Default: the test split of `data`, if it has one.
        config: the settings; they may extend tasks of earlier rows by name.
    """

    name: str
    data: Data
    test: Data | None = None
    config: LearnConfig = field(default_factory=LearnConfig)


@dataclass(frozen=True)
class Outcome:
    """Result of one row.

    Attributes:
        name: the task's name.
        state: `"learned"`; `"learned before"`, from the same images with the same settings; `"failed"`; or `"skipped"`,
            because it extends a row that failed or was skipped.
        seconds: time taken.
        ref: reference of the registered task; None if it was not learned.
        reason: why the task was not learned.
        metrics: the task's metrics, with those on the row's test data.
        data: the task's record of its images.
    """

    name: str
    state: State
    seconds: float
    ref: str | None = None
    reason: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


class LearnResult(NamedTuple):
    """Result of an attempt to learn a task: its reference, metrics and data, or the reason for the failure."""

    ref: str | None = None
    reason: str = ""
    metrics: Mapping[str, Any] = {}
    data: Mapping[str, Any] = {}


_Config = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tasks: Annotated[list[Any], Field(min_length=1)]
    config: _Config = {}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    data: str
    test: str | None = None
    config: _Config = {}
    extends: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []


def read_rows(file: Path, registry: Registry | None, skip_bad: bool = False) -> list[LearnRow]:
    """Reads and checks a YAML file of tasks to learn, without reading images.

    The file holds `tasks`, a list whose entries have `name` and `data`, and optionally `test`, `extends` and `config`.
    It may also hold a `config` for all tasks, which a task's own settings override. Paths are relative to the file's
    folder. A task that a later entry extends always keeps its token (`fall_back=False`).

    Args:
        file: the YAML file.
        registry: registry of other tasks that the entries may extend; None if there is none yet.
        skip_bad: skip missing images.

    Raises:
        DataError: the file is invalid; the message lists all errors.
    """
    values = read_mapping(file)
    problems = _schema_errors(_File, values)
    entries = values["tasks"] if isinstance(values.get("tasks"), list) else []
    shared = values["config"] if isinstance(values.get("config"), dict) else {}
    with _collecting(problems, "config: "):
        LearnConfig.parse(shared)
    if problems:
        shared = {}  # report its errors once, not for each task
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    checked = []
    for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
        row_problems, row = _row(entry, shared, names[:index], file.parent.absolute(), registry, skip_bad)
        quoted_name = f" ({name!r})" if isinstance(name, str) else ""
        problems += [f"task {index + 1}{quoted_name}: {problem}" for problem in row_problems]
        checked.append(row)
    rows = [row for row in checked if row is not None]
    extended = {name for row in rows for name in extended_refs(row.config)}
    problems += [f"{row.name!r} is extended by a later task, but head_only trains no token"
                 for row in rows if row.name in extended and row.config.head_only]  # fmt: skip
    if problems:
        raise DataError(f"Nothing was learned. Errors in {str(file)!r}:\n  " + "\n  ".join(problems))
    return [replace(row, config=replace(row.config, fall_back=False)) if row.name in extended else row for row in rows]


def learn_many(
    learner: Learner,
    rows: Sequence[LearnRow],
    new_version: bool = False,
    skip_bad: bool = False,
    report: Report | None = None,
) -> Iterator[Outcome]:
    """Learns tasks in order and yields the outcome of each.

    To resume an interrupted run, call this again with the same rows: registered tasks are not learned again.

    Args:
        learner: the learner.
        rows: the tasks, each after those that it extends.
        new_version: register a new version if a name is already taken.
        skip_bad: skip missing and unreadable images.
        report: progress callback.
    """
    results = LearnManyResults(learner.registry, rows)
    announced = False
    for number, row in enumerate(rows, start=1):
        started, label = time.perf_counter(), results.label(row)

        def step(what: str, done: int, total: int, label: str = label) -> None:
            if report is not None:
                report(f"{what}, {label}", done, total)

        learn = partial(learner.learn, row.name, row.data, row.test, row.config, new_version, skip_bad, report=step)
        obstacle = results.obstacle(row)
        result = LearnResult(reason=obstacle) if obstacle else attempt(row.name, learn)
        outcome = results.add(row, time.perf_counter() - started, result)
        if outcome.state == "learned" and not announced:
            announced, left = True, sum(not results.was_there(row.name) for row in rows[number:])
            if (seconds := left * outcome.seconds) >= NOTABLE_S:
                log.info("Tasks left: %d, about %s if each takes as long.", left, duration(seconds))
        yield outcome


class LearnManyResults:
    """Outcomes of the rows so far; tasks that were in the registry at the start count as learned before."""

    def __init__(self, registry: Registry, rows: Sequence[LearnRow]) -> None:
        self._before = {record.ref for record in registry.tasks(TaskFilter(retired=True))}
        self._labels = {row.name: f"{row.name}, {number} of {len(rows)}" for number, row in enumerate(rows, start=1)}
        self._not_learned: dict[str, str] = {}

    def was_there(self, name: str) -> bool:
        """Whether a version of a task was in the registry at the start."""
        return any(ref.startswith(f"{name}:") for ref in self._before)

    def label(self, row: LearnRow) -> str:
        """Returns a row's name and position, for progress messages."""
        return self._labels[row.name]

    def obstacle(self, row: LearnRow) -> str:
        """Explains why a row must be skipped: it extends a row that was not learned; empty if it can be learned."""
        parent = next((ref for ref in extended_refs(row.config) if ref in self._not_learned), None)
        return "" if parent is None else f"it extends {parent!r}, which {self._not_learned[parent]}"

    def add(self, row: LearnRow, seconds: float, result: LearnResult) -> Outcome:
        """Records and logs the result of a row."""
        state: State
        if result.ref is not None:
            state = "learned before" if result.ref in self._before else "learned"
        else:
            state = "skipped" if self.obstacle(row) else "failed"
            self._not_learned[row.name] = "failed" if state == "failed" else "was skipped"
        level = logging.WARNING if result.reason else logging.INFO
        log.log(level, "%s: %s", self.label(row), ": ".join(filter(None, (state, result.reason))))
        return Outcome(row.name, state, seconds, result.ref, result.reason, result.metrics, result.data)


def attempt(name: str, learn: Callable[[], Task]) -> LearnResult:
    """Calls `learn` and returns its task, or its error as the reason."""
    try:
        task = learn()
    except AddendaError as error:
        return LearnResult(reason=str(error))
    except Exception as error:  # such as out of memory; the other tasks can still be learned
        log.exception("Unexpected error while learning task %r:", name)
        return LearnResult(reason=f"{type(error).__name__}: {error}")
    return LearnResult(task.ref, metrics=dict(task.metrics), data=dict(task.data))


def extended_refs(config: LearnConfig) -> Sequence[str]:
    """Returns the references of tasks that a configuration extends by name."""
    return () if config.extends == "auto" else config.extends


def _row(
    entry: Any, shared: dict[str, Any], earlier: Sequence[Any], folder: Path, registry: Registry | None, skip_bad: bool
) -> tuple[list[str], LearnRow | None]:
    """Checks one entry; returns its errors, and its row if its schema is valid."""
    problems = _schema_errors(_Entry, entry)
    if problems:
        return problems, None
    parsed = _Entry(**entry)
    extends = "auto" if parsed.extends == ["auto"] else parsed.extends
    settings = merged(shared, parsed.config) | ({"extends": extends} if "extends" in entry else {})
    config, data = LearnConfig(), folder / expanded(parsed.data)
    test = None if parsed.test is None else folder / expanded(parsed.test)
    with _collecting(problems):
        check_new_name(parsed.name)
    if parsed.name in earlier:
        problems.append(f"task {earlier.index(parsed.name) + 1} has the same name")
    with _collecting(problems):
        config = LearnConfig.parse(settings)
    with _collecting(problems):
        open_parts(data, test, skip_bad)
    for ref in extended_refs(config):
        with _collecting(problems, "it extends neither an earlier task nor a registered one: "):
            if ref not in earlier and registry is None:
                raise RegistryError(f"there is no registry yet that could have {ref!r}.")
            if ref not in earlier and registry is not None:
                registry.record(ref)
    return problems, LearnRow(parsed.name, data, test, config)


@contextmanager
def _collecting(problems: list[str], prefix: str = "") -> Iterator[None]:
    """Appends an error to a list instead of raising it."""
    try:
        yield
    except (AddendaError, OSError) as error:
        problems.append(f"{prefix}{error}")


def _schema_errors(model: type[BaseModel], values: Any) -> list[str]:
    """Lists what does not match a pydantic model."""
    messages = {
        "extra_forbidden": f"unknown key, expected one of {', '.join(model.model_fields)}",
        "missing": "is missing",
        "dict_type": "must be a mapping, such as `epochs: 20`",
        "list_type": "must be a list, whose entries start with `-`",
        "string_type": "must be text; in YAML, quote numbers, dates, yes and no",
    }
    try:
        model.model_validate(values)
    except ValidationError as error:
        errors = [(".".join(map(str, e["loc"])), messages.get(e["type"], e["msg"])) for e in error.errors()]
        return [f"{key}: {message}" if key else message for key, message in errors]
    return []
