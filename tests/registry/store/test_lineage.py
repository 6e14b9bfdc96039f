"""Lineage is a pair of bounded trees; two versions are compared by their differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from addenda.exceptions import UnknownTaskError
from addenda.registry import Kin, Registry, Task
from addenda.registry.audit.history import compare
from addenda.registry.store import lineage
from tests.support.databases import Database
from tests.support.registries import BACKBONE, a_task, keep, probe


@pytest.fixture
def book(database: Database) -> Iterator[Registry]:
    with Registry.open(database.new()) as opened:
        opened.add_backbone(BACKBONE)
        yield opened


def family(book: Registry, **parents: str) -> dict[str, Task]:
    """Registers tasks, each with the names of its parents as letters."""
    tasks: dict[str, Task] = {}
    for seed, (name, extends) in enumerate(parents.items()):
        tasks[name] = keep(book, a_task(name, seed, parents=tuple(tasks[parent] for parent in extends)))
    return tasks


def drawn(kin: Kin) -> str:
    """A tree in one line: `!` retired, `=` expanded elsewhere, `+n` omitted."""
    inside = " ".join(map(drawn, kin.kin)) + (f" +{kin.left_out}" if kin.left_out else "")
    name = kin.ref.removesuffix(":1") + "!" * kin.retired + "=" * kin.repeated
    return f"{name}({inside.strip()})" if inside else name


def test_a_lineage_has_both_directions_and_retired_tasks(book):
    family(book, a="", b="", c="ba", d="c", e="c", f="")
    book.retire("e")
    family_of_c = book.lineage("c")
    assert (drawn(family_of_c.extends), drawn(family_of_c.extended_by)) == ("c(b a)", "c(d e!)")
    assert (drawn(book.lineage("a").extends), drawn(book.lineage("a").extended_by)) == ("a", "a(c(d e!))")
    assert (drawn(book.lineage("f").extends), drawn(book.lineage("f").extended_by)) == ("f", "f")
    assert drawn(book.lineage("e:1").extends) == "e!(c(b a))"


def test_a_task_reached_by_several_paths_is_expanded_once_nearest_to_the_root(book):
    family(book, a="", b="a", c="a", d="bc", e="dba")
    assert drawn(book.lineage("e").extends) == "e(d(b= c(a=)) b(a=) a)"
    assert drawn(book.lineage("a").extended_by) == "a(b(d(e=) e=) c(d=) e)"


def test_a_ladder_of_diamonds_takes_no_longer_than_it_has_tasks(book):
    """The ladder has 2 ** 24 paths from top to bottom."""
    layers, tasks = 24, family(book, a="", b="")
    pair = (tasks["a"], tasks["b"])
    for layer in range(layers):
        pair = tuple(keep(book, a_task(f"{side}-{layer}", 10 + layer, parents=pair)) for side in "xy")  # type: ignore[assignment]
    assert drawn(book.lineage(f"x-{layers - 1}").extends).count("(") == 2 * layers - 1


def test_wide_and_deep_trees_count_the_tasks_that_they_omit(book, monkeypatch):
    monkeypatch.setattr(lineage, "MAX_EDGES", 4)
    monkeypatch.setattr(lineage, "MAX_DEPTH", 2)
    family(book, a="", **dict.fromkeys("bcdefg", "a"), h="b", i="h", j="i")
    assert drawn(book.lineage("a").extended_by) == "a(b(+1) c d e +2)"
    assert drawn(book.lineage("j").extends) == "j(i(h(+1)))"


def test_an_unknown_task_has_no_family(book):
    with pytest.raises(UnknownTaskError, match="'a' is not registered"):
        book.lineage("a")


def test_two_versions_are_compared_by_what_differs(book):
    first = keep(book, a_task(
        "digits", 1, config={"epochs": 20, "recipe": {"lr": 0.1, "seed": 0}},
        metrics={"test": {"accuracy": 0.5, "per_class": {"zero": 1.0, "one": 0.25, "two": 0.5}}},
        data={"num_images": 30, "counts": {"zero": 10}, "run": {"train": "f" * 64}},
    ))  # fmt: skip
    second = a_task(
        "digits", 2, labels=("zero", "one", "three"), memory=torch.zeros(2, 5, 8), parents=(first,),
        config={"epochs": 20, "recipe": {"lr": 0.2, "seed": 0}},
        metrics={"test": {"accuracy": 0.75, "per_class": {"zero": 1.0, "one": 0.5, "three": 0.5}}, "seconds": 3},
        data={"num_images": 40, "counts": {"zero": 20}, "run": {"train": "g" * 64}},
    )  # fmt: skip
    book.register(second, probe(second), new_version=True)
    one, other = book.record("digits:1"), book.record("digits:2")
    assert book.compare("digits:1", "digits") == [
        ("config", "recipe.lr", 0.1, 0.2),
        ("data", "labels", ["zero", "one", "two"], ["zero", "one", "three"]),
        ("data", "counts.zero", 10, 20),
        ("data", "num_images", 30, 40),
        ("data", "run.train", "f" * 64, "g" * 64),
        ("metrics", "test.accuracy", 0.5, 0.75),
        ("metrics", "seconds", None, 3),
        ("per class", "test.one", 0.25, 0.5),
        ("per class", "test.two", 0.5, None),
        ("per class", "test.three", None, 0.5),
        ("parents", "extends", [], ["digits:1"]),
        ("sizes", "num_parameters", one.num_parameters, other.num_parameters),
        ("sizes", "num_memory_tokens", 4, 5),
        ("sizes", "size_bytes", one.size_bytes, other.size_bytes),
        ("sizes", "statistics_bytes", one.statistics_bytes, 0),
    ]
    assert book.compare("digits:1", "digits:1") == []


def test_versions_made_by_other_packages_and_a_retired_one_differ_in_that(book):
    keep(book, a_task("digits", 1))
    record = book.record("digits")
    older = dataclasses.replace(
        record, code_version="0.0.1", packages=record.packages | {"torch": "2.6.0"}, retired="old"
    )
    assert compare(older, record) == [
        ("task", "retired", "old", None),
        ("packages", "addenda", "0.0.1", record.code_version),
        ("packages", "torch", "2.6.0", record.packages["torch"]),
    ]
