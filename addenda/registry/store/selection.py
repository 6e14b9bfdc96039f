"""Selection of tasks by name, version, alias, pattern and tag."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from addenda.exceptions import DataError, UnknownTaskError
from addenda.registry.store.records import TaskRecord

MAX_PATTERNS = 32
"""Maximum number of patterns in a selection, since each is compared with every name."""
_SELECTOR = re.compile(r"([a-z0-9_*-]+)(?::([0-9]+)|@([a-z0-9_-]+))?")


def select_tasks(
    records: Mapping[str, TaskRecord],
    selectors: Sequence[str] | None = None,
    tag: str | None = None,
    absence: Callable[[str], str] = lambda name: "is not available.",
) -> list[str]:
    """The names of the selected tasks, each once, in the order of the selectors.

    Args:
        records: the available version of each task, by name.
        selectors: names, patterns with `*`, and either followed by `:version` or `@alias`; None selects all.
        tag: only tasks whose version has this tag; None selects all.
        absence: why a name is not available, as the rest of a sentence.

    Raises:
        DataError: there are too many patterns.
        UnknownTaskError: one of the selectors, or the tag, selects nothing.
    """
    distinct = [] if selectors is None else list(dict.fromkeys(selectors))
    if (num_patterns := sum("*" in selector for selector in distinct)) > MAX_PATTERNS:
        raise DataError(f"The selection has {num_patterns} patterns; the maximum is {MAX_PATTERNS}. Name the tasks.")
    names = dict.fromkeys(name for selector in distinct for name in _matches(records, selector, absence))
    if selectors is None:
        names = dict.fromkeys(records)
    if tag is None:
        return list(names)
    tagged = [name for name in names if tag in records[name].tags]
    if not tagged:
        raise UnknownTaskError(f"No selected task has the tag {tag[:100]!r}. Choose another tag.")
    return tagged


def _matches(records: Mapping[str, TaskRecord], selector: str, absence: Callable[[str], str]) -> list[str]:
    """The names that one selector selects, at least one."""
    if selector in records:
        return [selector]
    match, shown = _SELECTOR.fullmatch(selector), repr(selector[:100])
    name, version, alias = match.groups() if match else (selector, None, None)
    if "*" not in name and name not in records:
        raise UnknownTaskError(f"Task {shown} {absence(name)}")
    found = [known for known in records if fnmatchcase(known, name)] if match and "*" in name else [name]
    matching = [
        known
        for known in found
        if known in records
        and version in (None, str(records[known].version))
        and (alias is None or alias in records[known].aliases)
    ]
    if matching:
        return matching
    if "*" in selector:
        raise UnknownTaskError(f"No available task matches {shown}. Correct the pattern, or name a task.")
    raise UnknownTaskError(f"Task {shown} is not available. Available: {records[name].ref!r}.")
