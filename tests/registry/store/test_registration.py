"""Registered tasks are loaded bit for bit, under their name and version."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import pytest

import addenda
from addenda.exceptions import NameTakenError, RegistryError, UnknownTaskError
from addenda.registry import Registry, check_name
from addenda.registry.store import registration
from tests.support.databases import refused, rows, unchanged
from tests.support.registries import BACKBONE, EVALUATION, FINGERPRINT, HERE, a_task, keep, probe, same_content


def test_a_registered_task_comes_back_bit_for_bit(book):
    task = a_task(config={"epochs": 20}, metrics={"accuracy": 0.875}, data={"fingerprint": "d", "count": 12})
    for back in (keep(book, task), book.get("digits"), book.load(HERE)[0]):
        assert same_content(back, task)
        assert (back.name, back.version, back.ref, back.sha256) == ("digits", 1, "digits:1", task.sha256)
        assert (back.config, back.metrics, back.data) == (task.config, task.metrics, task.data)


def test_a_head_only_task_comes_back(book):
    back = keep(book, a_task(class_token=None, memory=None, pooled_weight=None))
    assert (back.class_token, back.memory, back.pooled_weight) == (None, None, None)
    assert back.num_memory_tokens == 0


def test_the_record_describes_the_registered_task(book):
    task = a_task(config={"epochs": 20}, metrics={"accuracy": 0.875}, data={"count": 12})
    keep(book, task)
    record = book.record("digits")
    assert (record.ref, record.backbone, record.sha256) == ("digits:1", FINGERPRINT, task.sha256)
    assert (record.labels, record.num_memory_tokens, record.objective) == (task.labels, 4, "single-label")
    assert (record.config, record.metrics, record.data) == ({"epochs": 20}, {"accuracy": 0.875}, {"count": 12})
    assert record.size_bytes == len(task.artifact)
    assert record.num_parameters == 8 + 2 * 4 * 8 + 2 * 3 * 8 + 3
    assert (record.extends, record.aliases, record.retired) == ((), (), None)
    assert record.created_at.endswith("+00:00")
    assert book.tasks() == [record]


def test_the_record_has_the_versions_of_the_code(book):
    keep(book, a_task())
    record = book.record("digits")
    assert record.code_version == addenda.__version__
    assert record.packages == registration.packages()
    assert record.packages["python"] == platform.python_version()
    assert (record.packages["torch"], record.packages["timm"]) == (version("torch"), version("timm"))


@pytest.mark.parametrize(
    ("objective", "metrics", "score"),
    [
        ("single-label", {"test": {"accuracy": 0.5}, "validation": {"accuracy": 0.75}}, 0.5),
        ("single-label", {"validation": {"accuracy": 0.75}}, 0.75),
        ("multi-label", {"test": {"mean_average_precision": 0.25}}, 0.25),
        ("single-label", {}, None),
    ],
)
def test_the_score_is_the_headline_metric_of_the_test_split_else_of_the_validation_split(
    book, objective, metrics, score
):
    keep(book, a_task(objective=objective, metrics=metrics))
    assert book.record("digits").score == score


def test_evaluations_of_the_training_run_are_registered_with_the_task(book):
    task, other = a_task(), replace(EVALUATION, metrics={"accuracy": 0.25})
    book.register(task, probe(task), evaluations=[EVALUATION, other])
    stored = book.evaluations("digits")
    assert [(e.task, e.metrics, e.generation, e.event_id) for e in stored] == [
        ("digits:1", {"accuracy": 0.75}, 2, 2),
        ("digits:1", {"accuracy": 0.25}, 2, 2),
    ]
    assert (stored[0].data_fingerprint, stored[0].numerics_fingerprint, stored[0].logits_digest) == (
        EVALUATION.data_fingerprint,
        EVALUATION.numerics_fingerprint,
        EVALUATION.logits_digest,
    )
    assert book.generation == 2


def test_a_name_is_registered_once(book):
    keep(book, a_task())
    with refused(book, NameTakenError, match=r"^Task 'digits' is already registered \(version 1\).*--new-version"):
        keep(book, a_task(seed=1))


def test_identical_content_is_not_registered_again(book):
    keep(book, a_task())
    keep(book, a_task(seed=1), new_version=True)
    for new_version in (False, True):
        with unchanged(book):
            again = keep(book, a_task(metrics={"accuracy": 1.0}), new_version)
        assert (again.ref, again.metrics) == ("digits:1", {})


def test_versions_count_up_and_the_bare_name_is_the_newest(book):
    for seed in range(3):
        assert keep(book, a_task(seed=seed), new_version=True).version == seed + 1
    assert [record.ref for record in book.tasks()] == ["digits:1", "digits:2", "digits:3"]
    assert book.get("digits").version == 3
    for number in (1, 2, 3):
        assert same_content(book.get(f"digits:{number}"), a_task(seed=number - 1))


def test_equal_content_may_have_two_names(book):
    first, second = keep(book, a_task("digits")), keep(book, a_task("numerals"))
    assert (second.ref, second.sha256) == ("numerals:1", first.sha256)
    assert len(rows(book)["artifact"]) == 1
    assert book.get("digits").name == "digits"


def test_an_alias_points_at_a_version_and_can_move(book):
    for seed in range(2):
        keep(book, a_task(seed=seed), new_version=True)
    book.set_alias("digits", "production", 1)
    assert book.get("digits@production").version == 1
    assert book.record("digits:1").aliases == ("production",)
    book.set_alias("digits", "production", 2)
    assert book.get("digits@production").version == 2
    assert [task.ref for task in book.load(HERE, alias="production")] == ["digits:2"]
    assert book.load(HERE, alias="staging") == []
    history = [event.details for event in book.events() if event.kind == "alias"]
    assert history == [{"before": None, "version": 1}, {"before": 1, "version": 2}]


def test_load_gives_the_newest_active_version_of_each_name_on_a_backbone(book):
    book.add_backbone({**BACKBONE, "fingerprint": "c" * 64})
    keep(book, a_task("digits"))
    keep(book, a_task("birds", 1))
    keep(book, a_task("digits", 2), new_version=True)
    keep(book, a_task("elsewhere", 3, backbone="c" * 64))
    assert sorted(task.ref for task in book.load(HERE)) == ["birds:1", "digits:2"]
    assert [task.ref for task in book.load(SimpleNamespace(fingerprint="c" * 64))] == ["elsewhere:1"]
    assert book.load(SimpleNamespace(fingerprint="d" * 64)) == []


def test_a_backbone_is_recorded_once_and_comes_back(book):
    book.add_backbone({**BACKBONE, "name": "renamed"})
    assert book.backbones() == [BACKBONE]


def test_a_task_on_an_unrecorded_backbone_is_refused(shared_book):
    with refused(shared_book, RegistryError, match="The backbone of task 'digits' is not registered"):
        keep(shared_book, a_task(backbone="c" * 64))


@pytest.mark.parametrize("name", ["a", "0", "digits-2", "a_b", "x" * 63])
def test_a_valid_name_is_taken(book, name):
    assert check_name(name) == name
    assert keep(book, a_task(name)).name == name


@pytest.mark.parametrize(
    "name", ["", "DigitImages", "-a", "_a", "a b", "a:1", "a@b", "a/b", "é", "x" * 64, "a\n", "a\x00"]
)
def test_an_invalid_name_is_refused(shared_book, name):
    keep(shared_book, a_task("digits"))
    for ask in (lambda: keep(shared_book, a_task(name, 1)), lambda: shared_book.set_alias("digits", name, 1)):
        with refused(shared_book, RegistryError, "is not a valid name: use at most 63 lower-case letters") as refusal:
            ask()
        assert str(refusal.value).startswith(repr(name))


def test_an_unknown_name_is_answered_with_similar_names(book):
    for number, name in enumerate(("digits", "digits-2", "birds", "cars", "planes", "ships", "trees")):
        keep(book, a_task(name, number))
    with pytest.raises(UnknownTaskError) as refusal:
        book.get("digitz")
    assert str(refusal.value) == (
        "Task 'digitz' is not registered. Known: 'digits', 'digits-2', …. See: addenda tasks list"
    )
    with pytest.raises(UnknownTaskError, match="Known: 'birds', 'cars', 'digits', 'digits-2', 'planes', …"):
        book.get("0000")


@pytest.mark.parametrize(
    "ref",
    ["digits:2", "digits:0", "digits:-1", "digits:x", "digits:", "digits@", "digits@no", "", "digits:" + "9" * 30],
)
def test_an_unknown_reference_is_refused_everywhere(shared_book, ref):
    keep(shared_book, a_task())
    asks = [shared_book.get, shared_book.record, shared_book.goldens, shared_book.evaluations, shared_book.retire]
    if ":" in ref:
        asks.append(lambda ref: shared_book.set_alias(ref.partition(":")[0], "a", ref.partition(":")[2]))
    for ask in asks:
        with pytest.raises(UnknownTaskError) as refusal:
            ask(ref)
        expected = f"Task {ref!r} is not registered. Known: 'digits'. See: addenda tasks list"
        if "@" in ref:
            expected = f"Task 'digits' has no alias {ref.partition('@')[2]!r}. See: addenda tasks show digits"
        assert str(refusal.value) == expected


def test_an_empty_registry_knows_no_names(database):
    with Registry.open(database.new()) as registry:
        assert (registry.tasks(), registry.generation, registry.backbones()) == ([], 0, [])
        with pytest.raises(UnknownTaskError, match="Known: none"):
            registry.get("digits")


def test_parents_keep_their_order(book):
    parents = [keep(book, a_task(name, seed)) for seed, name in enumerate(("b", "c", "a"))]
    child = keep(book, a_task("child", 9, parents=(parents[2], parents[0], parents[1])))
    assert child.extends == ("a:1", "b:1", "c:1")
    assert book.record("child").extends == ("a:1", "b:1", "c:1")
    other = keep(book, a_task("other", 9, parents=tuple(parents)))
    assert other.extends == ("b:1", "c:1", "a:1")
    assert other.sha256 != child.sha256


def test_an_extended_task_loads_its_ancestors_each_once(book):
    root = keep(book, a_task("root", 1))
    left = keep(book, a_task("left", 2, parents=(root,)))
    right = keep(book, a_task("right", 3, parents=(root,)))
    keep(book, a_task("tip", 4, parents=(left, right)))
    tip = book.get("tip")
    assert [task.ref for task in tip.closure] == ["root:1", "left:1", "right:1"]
    assert tip.parents[0].parents[0] is tip.parents[1].parents[0]
    assert all(same_content(a, b) for a, b in zip(tip.closure, (root, left, right), strict=True))
    loaded = {task.name: task for task in book.load(HERE)}
    assert loaded["tip"].parents[0] is loaded["left"]


def test_a_child_keeps_the_version_that_it_extends(book):
    first = keep(book, a_task("root", 1))
    keep(book, a_task("child", 2, parents=(first,)))
    keep(book, a_task("root", 3), new_version=True)
    assert book.get("child").extends == ("root:1",)
    assert same_content(book.get("child").parents[0], first)


def test_a_parent_that_is_not_registered_is_refused(shared_book):
    with refused(shared_book, RegistryError, match="Task 'child' extends 'stranger', which is not registered here"):
        keep(shared_book, a_task("child", 1, parents=(a_task("stranger", 2),)))
