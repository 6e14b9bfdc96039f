"""Selection of tasks by name, version, alias, pattern and tag."""

from __future__ import annotations

import pytest

from addenda import Registry
from addenda.exceptions import DataError, UnknownTaskError
from addenda.registry import TaskRecord, select_tasks
from tests.support.registries import BACKBONE


class Book:
    """The fingerprint of the backbone of `full_book`'s tasks."""

    fingerprint = BACKBONE["fingerprint"]


@pytest.fixture
def records(full_book: Registry) -> dict[str, TaskRecord]:
    found = {record.name: record for record in full_book.current(Book())[1]}
    assert found
    return found


def test_every_record_is_selected_by_its_name_version_aliases_and_tags(records: dict[str, TaskRecord]) -> None:
    assert select_tasks(records) == select_tasks(records, ["*"]) == list(records)
    for name, record in records.items():
        for selector in (name, record.ref, f"{name[:1]}*", *(f"{name}@{alias}" for alias in record.aliases)):
            assert name in select_tasks(records, [selector])
        for tag in record.tags:
            assert name in select_tasks(records, tag=tag)
        with pytest.raises(UnknownTaskError, match=r"is not available\. Available: "):
            select_tasks(records, [f"{name}:{record.version + 1}"])
    assert any(record.aliases for record in records.values())
    assert any(record.tags for record in records.values())


def test_names_that_match_twice_are_selected_once_in_the_order_of_the_selectors(records: dict[str, TaskRecord]) -> None:
    last = list(records)[-1]
    assert select_tasks(records, [last, "*", last]) == [last, *[name for name in records if name != last]]


@pytest.mark.parametrize("selector", ["", "other", "a b", "../x", "*@", "*:x", "[a-z]*", "*.*", "x\n*", "\0"])
def test_a_selector_that_matches_nothing_is_refused(records: dict[str, TaskRecord], selector: str) -> None:
    with pytest.raises(UnknownTaskError):
        select_tasks(records, [selector])


def test_hostile_patterns_are_matched_without_backtracking_and_their_number_is_limited(
    records: dict[str, TaskRecord],
) -> None:
    (record,) = list(records.values())[:1]
    named = {f"{'a' * 60}{number:03}": record for number in range(1000)}
    with pytest.raises(UnknownTaskError):
        select_tasks(named, ["*a" * 30 + "b"])
    with pytest.raises(DataError, match="33 patterns; the maximum is 32"):
        select_tasks(named, [f"{number}*" for number in range(33)])
