"""Listing tasks: each condition of a filter, and paging."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from addenda.exceptions import RegistryError, UnknownTaskError
from addenda.registry import Registry, TaskFilter
from addenda.registry.store.header import ArtifactHeader
from tests.support.databases import tamper
from tests.support.registries import BACKBONE, a_task, adapters, keep, probe

OTHER = "0a" * 32


@pytest.fixture(scope="module")
def shop(database):
    """Seven versions of six tasks on two backbones, with scores, tags and parents; one is retired."""
    with Registry.open(database.new()) as registry:
        registry.add_backbone(BACKBONE)
        registry.add_backbone({**BACKBONE, "fingerprint": OTHER, "name": "vit_other"})

        def register(name: str, seed: int, score: float | None = None, **options: object) -> None:
            metrics = {} if score is None else {"test": {"accuracy": score}}
            tasks[name] = keep(registry, a_task(name, seed, metrics=metrics, **options), new_version=True)

        tasks = {}
        register("digits", 1, 0.5)
        register("digits-roman", 2, 0.9, parents=(tasks["digits"],))
        register("birds", 3, 0.75, backbone=OTHER)
        register("digits", 4, 0.75)
        register("bird_songs", 5)
        register("small-birds", 6, 0.99, parents=(tasks["digits"],))
        register("old", 7, 1.0)
        registry.retire("old")
        registry.tag("digits:1", "shop")
        registry.tag("birds", "shop")
        registry.tag("birds", "night")
        yield registry


def refs(registry: Registry, *arguments: object, **options: object) -> list[str]:
    return [record.ref for record in registry.tasks(*arguments, **options)]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, ["digits:1", "digits-roman:1", "birds:1", "digits:2", "bird_songs:1", "small-birds:1"]),
        ({"name": "digits"}, ["digits:1", "digits:2"]),
        ({"name": "digits*"}, ["digits:1", "digits-roman:1", "digits:2"]),
        ({"name": "*birds*"}, ["birds:1", "small-birds:1"]),
        ({"name": "bird_*"}, ["bird_songs:1"]),
        ({"name": "bird%"}, []),
        ({"backbone": OTHER}, ["birds:1"]),
        ({"backbone": "0a0a"}, ["birds:1"]),
        ({"backbone": "vit_other"}, ["birds:1"]),
        ({"backbone": "vit"}, []),
        ({"backbone": "%"}, []),
        ({"tag": "shop"}, ["digits:1", "birds:1"]),
        ({"tag": "none"}, []),
        ({"extends": "digits:1"}, ["digits-roman:1"]),
        ({"extends": "digits:2"}, ["small-birds:1"]),
        ({"extends": "digits"}, ["small-birds:1"]),
        ({"min_score": 0.75}, ["digits-roman:1", "birds:1", "digits:2", "small-birds:1"]),
        ({"min_score": 0.0}, ["digits:1", "digits-roman:1", "birds:1", "digits:2", "small-birds:1"]),
        ({"retired": True, "min_score": 0.99}, ["small-birds:1", "old:1"]),
        ({"name": "digits*", "min_score": 0.6, "extends": "digits:1"}, ["digits-roman:1"]),
        ({"tag": "shop", "backbone": "tiny"}, ["digits:1"]),
    ],
)
def test_every_condition_must_hold(shop, conditions, expected):
    assert refs(shop, TaskFilter(**conditions)) == expected


def test_tasks_are_chosen_by_when_they_were_registered(shop):
    middle = shop.record("digits:2").created_at
    assert refs(shop, TaskFilter(since=middle)) == ["digits:2", "bird_songs:1", "small-birds:1"]
    assert refs(shop, TaskFilter(until=middle)) == ["digits:1", "digits-roman:1", "birds:1"]
    assert refs(shop, TaskFilter(since=middle[:10])) == refs(shop)
    assert refs(shop, TaskFilter(until=middle[:10])) == refs(shop, TaskFilter(since="2100-01-01")) == []


@pytest.mark.parametrize("size", [1, 2, 4, 6, 7])
def test_pages_give_each_task_once(shop, size):
    pages, before = [], None
    while page := refs(shop, limit=size, before=before):
        assert len(page) <= size
        pages, before = [*page, *pages], page[0]
        assert len(pages) <= 6, "a page began where the last one did"
    assert pages == refs(shop)


def test_pages_contain_only_matches_of_the_filter(shop):
    chosen = TaskFilter(min_score=0.75)
    assert refs(shop, chosen, limit=2) == ["digits:2", "small-birds:1"]
    assert refs(shop, chosen, limit=2, before="digits:2") == ["digits-roman:1", "birds:1"]
    assert refs(shop, chosen, limit=2, before="digits-roman:1") == []
    assert refs(shop, limit=0) == []


def test_a_listing_that_names_an_unknown_task_is_refused(shop):
    for ask in (lambda: shop.tasks(before="cats:1"), lambda: shop.tasks(TaskFilter(extends="cats:1"))):
        with pytest.raises(UnknownTaskError, match="Task 'cats:1' is not registered"):
            ask()


def test_a_number_beyond_the_databases_range_is_a_registry_error(full_book: Registry) -> None:
    with pytest.raises(RegistryError, match="The registry cannot be read: "):
        full_book.events(after=10**30)


def test_a_record_has_fields_of_the_artifacts_header(book):
    labels = tuple(f"{number:04} {'label' * 4}" for number in range(900))  # for a header of more than the usual size
    heads = {key: torch.zeros(900, 8) for key in ("head_weight", "pooled_weight")} | {"head_bias": torch.zeros(900)}
    tasks = [
        a_task("plain"),
        a_task("adapted", 1, adapters=adapters(rank=3), temperature=0.25),
        a_task("large", 2, adapters=adapters(rank=2), temperature=1.5, labels=labels, **heads),
    ]
    for task in tasks:
        book.register(task, probe(task))
    fields = {record.name: (record.adapter_rank, record.temperature) for record in book.tasks()}
    assert fields == {task.name: (task.adapter_rank, task.temperature) for task in tasks}
    assert fields == {"plain": (0, 1.0), "adapted": (3, 0.25), "large": (2, 1.5)}


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x02" + b"\x00" * 7 + b"{}", b"\x02" + b"\x00" * 7 + b"[]"])
def test_a_damaged_artifact_leaves_the_rest_of_a_record_as_it_is(full_book, data):
    before = full_book.record("digits")
    tamper(full_book, "artifact", "UPDATE artifact SET data = :data WHERE sha256 = :of", data=data, of=before.sha256)
    after = full_book.record("digits")
    known = {name: getattr(before, name) for name in ArtifactHeader._fields}
    assert {name: getattr(after, name) for name in known} == dict.fromkeys(known)
    assert after.reads == "damaged"
    assert replace(after, **known, size_bytes=before.size_bytes) == before
    assert after in full_book.tasks()


def test_a_retired_name_and_an_unknown_alias_are_named(full_book):
    with pytest.raises(
        UnknownTaskError, match=r"Task 'digits' has no alias 'staging'\. See: addenda tasks show digits"
    ):
        full_book.record("digits@staging")
    full_book.remove_alias("digits", "production")
    full_book.retire("digits", "worse")
    with pytest.raises(UnknownTaskError, match=r"'digits' has no active version: all were retired\. Name one, such as"):
        full_book.record("digits")
