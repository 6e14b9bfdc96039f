"""Many tasks from one file, one after another: one that fails does not keep the others from being learned."""

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

from addenda.exceptions import AddendaError, DataError
from addenda.learner.context import Report
from addenda.learner.data import Data, open_parts
from addenda.learner.learn_config import LearnConfig, read_mapping
from addenda.learner.learner import Learner
from addenda.registry import Registry, Task, TaskFilter, check_new_name

State = Literal["learned", "learned before", "failed", "skipped"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnRow:
    """One task to learn: the arguments of `Learner.learn`.

    Attributes:
        name: the task's name.
        data: what to learn from.
        test: what to score it on; None takes the test part of `data` where there is one.
        config: the settings; they may extend tasks of earlier rows by their names.
    """

    name: str
    data: Data
    test: Data | None = None
    config: LearnConfig = field(default_factory=LearnConfig)


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Attributes:
        name: the row's.
        state: `"learned"`; `"learned before"`, from the same images with the same settings; `"failed"`; or `"skipped"`,
            because it extends a row that failed or was skipped.
        seconds: how long it took.
        ref: the registered task; None where there is none.
        reason: why there is none.
        metrics: what was measured, on the test set of the row.
        data: what was found out about its images.
    """

    name: str
    state: State
    seconds: float
    ref: str | None = None
    reason: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


class Became(NamedTuple):
    """What became of an attempt: a registered task and what was measured of it, or why there is none."""

    ref: str | None = None
    reason: str = ""
    metrics: Mapping[str, Any] = {}
    data: Mapping[str, Any] = {}


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tasks: Annotated[list[Any], Field(min_length=1)]
    config: dict[str, Any] = {}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    data: str
    test: str | None = None
    config: dict[str, Any] = {}
    extends: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []


def read_rows(file: Path, registry: Registry, skip_bad: bool = False) -> list[LearnRow]:
    """Reads and checks a YAML file of tasks to learn; images are not read yet.

    It holds `tasks`, a list whose entries have `name` and `data` and may have `test`, `extends` and `config`; and may
    hold `config` for all of them, of which a task's own settings win. Paths are relative to the file's folder. A task
    that a later one extends keeps its token, whether or not it pays: there must be one to see.

    Args:
        file: the YAML file.
        registry: where tasks to extend may be, beside those of earlier entries.
        skip_bad: whether images that cannot be had are to be left out.

    Raises:
        DataError: the file is not right; all that is wrong is named.
    """
    values = read_mapping(file)
    problems = _problems(_File, values)
    entries = values["tasks"] if isinstance(values.get("tasks"), list) else []
    shared = values["config"] if isinstance(values.get("config"), dict) else {}
    with _noting(problems, "config: "):
        LearnConfig.parse(shared)
    if problems:
        shared = {}  # what is wrong with it is said once, not for each task
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    rows = []
    for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
        found, row = _row(entry, shared, names[:index], file.parent.absolute(), registry, skip_bad)
        called = f" ({name!r})" if isinstance(name, str) else ""
        problems += [f"task {index + 1}{called}: {problem}" for problem in found]
        rows.append(row)
    if problems:
        raise DataError(f"Nothing was learned. {str(file)!r} has mistakes:\n  " + "\n  ".join(problems))
    kept = [row for row in rows if row is not None]
    seen = {name for row in kept for name in named(row.config)}
    return [replace(row, config=replace(row.config, fall_back=False)) if row.name in seen else row for row in kept]


def learn_many(
    learner: Learner,
    rows: Sequence[LearnRow],
    new_version: bool = False,
    skip_bad: bool = False,
    report: Report | None = None,
) -> Iterator[Outcome]:
    """Learns tasks in order and says what became of each when it is done.

    A run that was interrupted is taken up by another with the same rows: what was learned is found, not learned again.

    Args:
        learner: learns them.
        rows: the tasks, each after those that it extends.
        new_version: whether names already taken get a further version.
        skip_bad: leave out images that cannot be read.
        report: told of the progress.
    """
    results = LearnManyResults(learner.registry, rows)
    for row in rows:
        started, place = time.perf_counter(), results.place(row)

        def step(what: str, done: int, total: int, place: str = place) -> None:
            if report is not None:
                report(f"{what}, {place}", done, total)

        learn = partial(learner.learn, row.name, row.data, row.test, row.config, new_version, skip_bad, report=step)
        obstacle = results.obstacle(row)
        became = Became(reason=obstacle) if obstacle else attempt(row.name, learn)
        yield results.add(row, time.perf_counter() - started, became)


class LearnManyResults:
    """What became of rows so far; a task that the registry has already was learned before."""

    def __init__(self, registry: Registry, rows: Sequence[LearnRow]) -> None:
        self._before = {record.ref for record in registry.tasks(TaskFilter(retired=True))}
        self._places = {row.name: f"{row.name}, {number} of {len(rows)}" for number, row in enumerate(rows, start=1)}
        self._lost: dict[str, str] = {}

    def place(self, row: LearnRow) -> str:
        """A row's name, and which one it is."""
        return self._places[row.name]

    def obstacle(self, row: LearnRow) -> str:
        """Why a row cannot be learned, of those that it extends by name; empty where nothing is known against it."""
        parent = next((ref for ref in named(row.config) if ref in self._lost), None)
        return "" if parent is None else f"it extends {parent!r}, which {self._lost[parent]}"

    def add(self, row: LearnRow, seconds: float, became: Became) -> Outcome:
        """Keeps and logs what became of a row."""
        state: State
        if became.ref is not None:
            state = "learned before" if became.ref in self._before else "learned"
        else:
            state = "skipped" if self.obstacle(row) else "failed"
            self._lost[row.name] = "failed" if state == "failed" else "was skipped"
        level = logging.WARNING if became.reason else logging.INFO
        log.log(level, "%s: %s", self.place(row), ": ".join(filter(None, (state, became.reason))))
        return Outcome(row.name, state, seconds, became.ref, became.reason, became.metrics, became.data)


def attempt(name: str, learn: Callable[[], Task]) -> Became:
    """Learns a task, or says why there is none."""
    try:
        task = learn()
    except AddendaError as error:
        return Became(reason=str(error))
    except Exception as error:  # out of memory, a disk that went: the other tasks are still to be learned
        log.exception("Task %r met an error that is not one of its images or settings:", name)
        return Became(reason=f"{type(error).__name__}: {error}")
    return Became(task.ref, metrics=dict(task.metrics), data=dict(task.data))


def named(config: LearnConfig) -> Sequence[str]:
    """The tasks that a row extends by name."""
    return () if config.extends == "auto" else config.extends


def _row(
    entry: Any, shared: dict[str, Any], earlier: Sequence[Any], folder: Path, registry: Registry, skip_bad: bool
) -> tuple[list[str], LearnRow | None]:
    """What is wrong with an entry, and its row where nothing is."""
    problems = _problems(_Entry, entry)
    if problems:
        return problems, None
    given = _Entry(**entry)
    extends = "auto" if given.extends == ["auto"] else given.extends
    settings = shared | given.config | ({"extends": extends} if "extends" in entry else {})
    config, data = LearnConfig(), folder / given.data
    test = None if given.test is None else folder / given.test
    with _noting(problems):
        check_new_name(given.name)
    if given.name in earlier:
        problems.append(f"the name is that of task {earlier.index(given.name) + 1} already")
    with _noting(problems):
        config = LearnConfig.parse(settings)
    with _noting(problems):
        open_parts(data, test, skip_bad)
    for ref in named(config):
        with _noting(problems, "it extends no task above it, nor one in the registry: "):
            if ref not in earlier:
                registry.record(ref)
    return problems, LearnRow(given.name, data, test, config)


@contextmanager
def _noting(problems: list[str], where: str = "") -> Iterator[None]:
    """Notes what is wrong rather than stopping at it."""
    try:
        yield
    except (AddendaError, OSError) as error:
        problems.append(f"{where}{error}")


def _problems(model: type[BaseModel], values: Any) -> list[str]:
    """What is wrong with the form of what a file says."""
    own = {
        "extra_forbidden": f"is not one of {', '.join(model.model_fields)}",
        "missing": "is missing",
        "string_type": "must be text: YAML reads numbers, dates, yes and no as such unless they stand in quotes",
    }
    try:
        model.model_validate(values)
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), own.get(e["type"], e["msg"])) for e in error.errors()]
        return [f"{place}: {said}" if place else said for place, said in found]
    return []
