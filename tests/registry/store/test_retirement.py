"""Retiring hides a version and deletes nothing; its active descendants must be retired with it."""

from __future__ import annotations

from itertools import permutations

import pytest

from addenda.exceptions import NameTakenError, RegistryError, UnknownTaskError
from addenda.registry import Registry, TaskFilter
from tests.support.databases import address, refused
from tests.support.registries import HERE, a_task, keep, same_content, verify_ledger


def test_a_retired_task_is_hidden_but_stays(book):
    task = keep(book, a_task())
    book.retire("digits", "a better one")
    assert book.load(HERE) == []
    assert book.tasks() == []
    assert [record.retired for record in book.tasks(TaskFilter(retired=True))] == ["a better one"]
    with pytest.raises(UnknownTaskError, match="Task 'digits' has no active version"):
        book.get("digits")
    assert same_content(book.get("digits:1"), task)
    assert len(book.goldens("digits:1")) == 1


def test_a_version_with_an_alias_is_not_retired_and_a_retired_version_gets_no_alias(book):
    for seed in range(2):
        keep(book, a_task(seed=seed), new_version=True)
    keep(book, a_task("child", parents=(book.get("digits:2"),)))
    book.set_alias("digits", "production", 2)
    book.set_alias("child", "next", 1)
    for ref, along in (("digits:2", ["child"]), ("child", [])):
        name = ref.partition(":")[0]
        with refused(book, RegistryError, f"'{name}:.' cannot be retired: '.*@.*' points at '.*', which would be"):
            book.retire(ref, along=along)
    book.retire("digits:1")
    with pytest.raises(RegistryError, match="Task 'digits:1' is retired; an alias cannot point at it"):
        book.set_alias("digits", "production", 1)
    assert book.get("digits@production").version == 2
    book.remove_alias("child", "next")
    book.remove_alias("digits", "production")
    book.retire("digits:2", along=["child"])
    assert book.load(HERE) == []


def test_the_name_of_a_retired_task_stays_taken(book):
    keep(book, a_task())
    book.retire("digits")
    with pytest.raises(NameTakenError, match=r"already registered \(version 1\)"):
        keep(book, a_task(seed=1))
    assert keep(book, a_task(seed=1), new_version=True).ref == "digits:2"


def test_the_bare_name_falls_back_to_the_newest_active_version(book):
    for seed in range(3):
        keep(book, a_task(seed=seed), new_version=True)
    book.retire("digits:3")
    assert book.get("digits").version == 2
    assert [task.ref for task in book.load(HERE)] == ["digits:2"]


def test_a_task_is_retired_once(book):
    keep(book, a_task())
    book.retire("digits", "first")
    with refused(book, RegistryError, match="Task 'digits:1' is already retired"):
        book.retire("digits:1", "second")


def test_a_task_with_active_children_is_not_retired(book):
    root = keep(book, a_task("root", 1))
    keep(book, a_task("one", 2, parents=(root,)))
    keep(book, a_task("two", 3, parents=(root,)))
    with pytest.raises(RegistryError, match=r"'root:1' cannot be retired: active tasks extend it \(one:1, two:1\)"):
        book.retire("root")
    book.retire("one")
    with pytest.raises(RegistryError, match=r"extend it \(two:1\)"):
        book.retire("root")
    book.retire("two")
    book.retire("root")
    assert book.tasks() == []
    assert book.get("two:1").extends == ("root:1",)


@pytest.fixture
def family(book: Registry) -> Registry:
    """A root with two children and a common grandchild, and an unrelated task."""
    root = keep(book, a_task("root", 1))
    left, right = (keep(book, a_task(name, seed, parents=(root,))) for seed, name in enumerate(("left", "right"), 2))
    keep(book, a_task("tip", 4, parents=(left, right)))
    keep(book, a_task("stranger", 5))
    return book


@pytest.mark.parametrize("missing", ["left", "right", "tip"])
def test_a_parent_is_retired_only_when_every_active_descendant_is_named(family, missing):
    along = [name for name in ("left", "right", "tip") if name != missing]
    with refused(
        family, RegistryError, rf"cannot be retired: active tasks extend it \(.*{missing}:1.*\)\. Retire them"
    ):
        family.retire("root", along=along)


@pytest.mark.parametrize("order", list(permutations(("left", "right", "tip"))))
def test_descendants_are_retired_before_their_parents_in_whatever_order_they_are_named(family, order):
    family.retire("root", "all of them", along=order)
    assert [record.ref for record in family.tasks()] == ["stranger:1"]
    retired = [event for event in family.events() if event.kind == "retired"]
    assert [event.subject for event in retired] == ["tip:1", "right:1", "left:1", "root:1"]
    assert {event.details["reason"] for event in retired} == {"all of them"}
    assert verify_ledger(address(family)) == family.generation


def test_a_descendant_that_was_retired_before_need_not_be_named(family):
    family.retire("tip")
    family.retire("root", along=("left", "right"))
    assert [record.ref for record in family.tasks()] == ["stranger:1"]


def test_a_task_that_does_not_extend_it_is_not_retired_along(family):
    with refused(family, RegistryError, match="Task 'stranger:1' does not extend 'root:1'"):
        family.retire("root", along=("left", "right", "tip", "stranger"))
    with refused(family, RegistryError, match="Task 'root:1' does not extend 'left:1'"):
        family.retire("left", along=("tip", "root"))
