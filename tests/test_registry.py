"""The registry: what goes in comes out bit for bit, nothing registered changes, and damage is never silent."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from itertools import count
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from sqlalchemy import Engine, Pool, create_engine, event

from addenda.exceptions import IntegrityError, NameTakenError, RegistryError, UnknownTaskError
from addenda.registry import (
    ADAPTED,
    FeatureStatistics,
    Golden,
    LowRank,
    Registry,
    Task,
    canonical_json,
    check_name,
    digest,
    schema,
)
from addenda.registry.artifact import decode, encode
from addenda.registry.database import VERSION_TABLE
from addenda.registry.triggers import statements

FINGERPRINT = "b" * 64
BACKBONE = {
    "fingerprint": FINGERPRINT,
    "name": "tiny",
    "source": "hub",
    "precision": "float32",
    "preprocessing": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5]},
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "num_tokens": 17,
    "num_parameters": 1234,
}
HERE = SimpleNamespace(fingerprint=FINGERPRINT)
TENSORS = ("class_token", "memory", "head_weight", "head_bias", "pooled_weight")


def a_task(name: str = "digits", seed: int = 0, **changes: Any) -> Task:
    noise = torch.Generator().manual_seed(seed)
    content = {
        "backbone": FINGERPRINT,
        "labels": ("zero", "one", "two"),
        "class_token": torch.randn(8, generator=noise),
        "memory": torch.randn(2, 4, 8, generator=noise),
        "head_weight": torch.randn(3, 8, generator=noise),
        "head_bias": torch.randn(3, generator=noise),
        "pooled_weight": torch.randn(3, 8, generator=noise),
    }
    return Task(name=name, **{**content, **changes})


def adapters(width: int = 8, depth: int = 2, rank: int = 3, hidden: int = 12, seed: int = 5) -> dict[str, LowRank]:
    noise = torch.Generator().manual_seed(seed)
    ends = {"q": (width, width), "proj": (width, width), "fc1": (width, hidden), "fc2": (hidden, width)}
    return {
        site: LowRank(
            torch.randn(depth, rank, fan_in, generator=noise), torch.randn(depth, fan_out, rank, generator=noise)
        )
        for site, (fan_in, fan_out) in ends.items()
    }


def a_large_task(name: str = "large") -> Task:
    """A task of 2.6 MB, more than SQLite keeps in memory before it writes."""
    return a_task(name, memory=torch.full((2, 40000, 8), 0.5))


def probe(task: Task, numerics: str = "n" * 64) -> Golden:
    logits = torch.arange(4.0 * len(task.labels)).view(4, -1)
    return Golden({"torch": "any"}, numerics, logits, digest(logits.numpy().tobytes()))


def keep(registry: Registry, task: Task, new_version: bool = False) -> Task:
    return registry.register(task, probe(task), a_statistic(), new_version)


def a_statistic(num_classes: int = 3, **changes: Any) -> FeatureStatistics:
    noise = torch.Generator().manual_seed(3)
    content = {
        "counts": torch.arange(num_classes) + 4,
        "sums": torch.randn(num_classes, 5, generator=noise),
        "gram": torch.randn(15, generator=noise),
        "sample": torch.randn(6, 4, generator=noise),
        "sample_targets": torch.arange(6) % num_classes,
    }
    return FeatureStatistics(**{**content, **changes})


def spoiled(name: str, tensor: torch.Tensor | None) -> Task:
    """A task with one tensor replaced behind the back of whatever checks its constructor."""
    task = a_task()
    object.__setattr__(task, name, tensor)
    return task


def same_content(one: Task, other: Task) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else a.numpy().tobytes() == b.numpy().tobytes() and a.shape == b.shape

    def parts(task: Task) -> dict[str, torch.Tensor]:
        updates = (task.adapters or {}).items()
        return {f"{site}.{i}": part for site, update in updates for i, part in enumerate(update)}

    return (
        all(equal(getattr(one, name), getattr(other, name)) for name in TENSORS)
        and parts(one).keys() == parts(other).keys()
        and all(equal(part, parts(other)[name]) for name, part in parts(one).items())
        and (one.backbone, one.labels, one.objective) == (other.backbone, other.labels, other.objective)
        and one.temperature == other.temperature
        and [parent.sha256 for parent in one.parents] == [parent.sha256 for parent in other.parents]
    )


@contextmanager
def raw(registry: Registry | str) -> Iterator[sqlite3.Connection]:
    """A connection as any other program would open it, without a pragma."""
    location = registry if isinstance(registry, str) else registry.location
    with closing(sqlite3.connect(location)) as connection, connection:
        yield connection


def tamper(registry: Registry, table: str, sql: str, *values: object) -> None:
    """Changes a row as only someone who drops the trigger first can."""
    with raw(registry) as connection:
        connection.execute(f"DROP TRIGGER {table}_no_update")
        assert connection.execute(sql, values).rowcount == 1


def rows(registry: Registry | str) -> dict[str, list[Any]]:
    with raw(registry) as connection:
        return {t.name: connection.execute(f"SELECT * FROM {t.name}").fetchall() for t in schema.metadata.sorted_tables}


FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def another_interpreter() -> None:
    """Starts the interpreter from which this module's processes are forked, with another hash seed than ours."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", seed)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        forkserver.set_forkserver_preload([__name__])
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one registry that only knows the backbone, and one with a row in every table."""
    folder = tmp_path_factory.mktemp("shelf")
    with Registry.open(folder / "book.db") as book:
        book.add_backbone(BACKBONE)
    shutil.copy(folder / "book.db", folder / "full.db")
    with Registry.open(folder / "full.db") as book:
        parent = keep(book, a_task("strokes", 1))
        keep(book, a_task("digits", 2, parents=(parent,)))
        keep(book, a_task("old", 3))
        book.retire("old", "superseded")
        book.set_alias("production", "digits:1")
        book.add_evaluation("digits", "d" * 64, "n" * 64, {"accuracy": 0.5}, "l" * 64)
    return folder


@pytest.fixture
def book(shelf: Path, tmp_path: Path) -> Iterator[Registry]:
    """A registry of its own that knows the backbone and no task."""
    with Registry.open(shutil.copy(shelf / "book.db", tmp_path)) as opened:
        yield opened


@pytest.fixture
def full_book(shelf: Path, tmp_path: Path) -> Iterator[Registry]:
    """A registry of its own with a row in every table."""
    with Registry.open(shutil.copy(shelf / "full.db", tmp_path)) as opened:
        assert all(rows(opened).values()), "a table without a row would prove nothing"
        yield opened


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_come_back_bit_for_bit(book):
    keep(book, a_task())
    back, made = book.statistics("digits:1"), a_statistic()
    assert back.sha256 == made.sha256
    for field in fields(FeatureStatistics):
        assert getattr(back, field.name).numpy().tobytes() == getattr(made, field.name).numpy().tobytes()
    assert book.record("digits").statistics_bytes == len(made.data)


def test_a_task_without_statistics_has_none(book):
    task = a_task()
    book.register(task, probe(task))
    assert book.statistics("digits") is None
    with pytest.raises(UnknownTaskError, match="'cats'"):
        book.statistics("cats")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": torch.ones(2, dtype=torch.long)}, r"do not fit 3 classes or each other: .*'counts': \[2\]"),
        ({"gram": torch.ones(14)}, r"do not fit .*'gram': \[14\]"),
        ({"sample_targets": torch.ones(5, dtype=torch.long)}, r"do not fit .*'sample_targets': \[5\]"),
        ({"sums": torch.full((3, 5), torch.nan)}, "sums must be finite float32"),
        ({"sample_targets": torch.full((6,), 3)}, "classes that do not exist"),
        ({"counts": torch.tensor([1, 1, -1])}, "classes that do not exist"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_and_nothing_is_registered(book, changes, message):
    before, task = rows(book), a_task()
    with pytest.raises(IntegrityError, match=message):
        book.register(task, probe(task), a_statistic(**changes))
    assert rows(book) == before


def test_statistics_that_weigh_too_much_are_refused_and_nothing_is_registered(book):
    before, task = rows(book), a_task()
    large = a_statistic(sample=torch.zeros(320_000, 4), sample_targets=torch.zeros(320_000, dtype=torch.long))
    with pytest.raises(RegistryError, match=r"3 classes weigh [0-9,]+ bytes, and a task may have 5,000,000"):
        book.register(task, probe(task), large)
    assert rows(book) == before


@pytest.mark.parametrize("cut", [0, 40])
def test_statistics_whose_bytes_have_changed_are_refused(book, cut):
    keep(book, a_task())
    data = a_statistic().data
    tamper(book, "statistics", "UPDATE statistics SET data = ?", data[:-1] + b"?" if cut == 0 else data[:cut])
    with pytest.raises(IntegrityError, match="Task 'digits:1' cannot be routed to: its statistics' stored bytes have"):
        book.statistics("digits")
    assert book.get("digits").ref == "digits:1"


# -- registering and finding ------------------------------------------------------------------------------------------


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


def test_the_record_tells_what_was_registered(book):
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


def test_a_name_is_registered_once(book):
    keep(book, a_task())
    before = rows(book)
    with pytest.raises(NameTakenError, match=r"^Task 'digits' is already registered \(version 1\).*--new-version"):
        keep(book, a_task(seed=1))
    assert rows(book) == before


def test_identical_content_is_not_registered_again(book):
    keep(book, a_task())
    keep(book, a_task(seed=1), new_version=True)
    before = rows(book)
    for new_version in (False, True):
        again = keep(book, a_task(metrics={"accuracy": 1.0}), new_version)
        assert again.ref == "digits:1"
        assert again.metrics == {}
    assert rows(book) == before


def test_versions_count_up_and_the_bare_name_is_the_newest(book):
    for seed in range(3):
        assert keep(book, a_task(seed=seed), new_version=True).version == seed + 1
    assert [record.ref for record in book.tasks()] == ["digits:1", "digits:2", "digits:3"]
    assert book.get("digits").version == 3
    for version in (1, 2, 3):
        assert same_content(book.get(f"digits:{version}"), a_task(seed=version - 1))


def test_equal_content_may_have_two_names(book):
    first, second = keep(book, a_task("digits")), keep(book, a_task("numerals"))
    assert (second.ref, second.sha256) == ("numerals:1", first.sha256)
    assert len(rows(book)["artifact"]) == 1
    assert book.get("digits").name == "digits"


def test_an_alias_points_at_a_version_and_can_move(book):
    for seed in range(2):
        keep(book, a_task(seed=seed), new_version=True)
    book.set_alias("production", "digits:1")
    assert book.get("digits@production").version == 1
    assert book.record("digits:1").aliases == ("production",)
    book.set_alias("production", "digits")
    assert book.get("digits@production").version == 2
    assert [task.ref for task in book.load(HERE, alias="production")] == ["digits:2"]
    assert book.load(HERE, alias="staging") == []
    history = [row[3] for row in rows(book)["event"] if row[1] == "alias"]
    assert history == ['{"before":null,"version":1}', '{"before":1,"version":2}']


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


def test_a_task_on_an_unrecorded_backbone_is_refused(registry):
    with pytest.raises(RegistryError, match="'digits' was learned on a backbone that is not registered"):
        keep(registry, a_task())
    assert not any(rows(registry).values())


@pytest.mark.parametrize("name", ["a", "0", "digits-2", "a_b", "x" * 63])
def test_a_valid_name_is_taken(book, name):
    assert check_name(name) == name
    assert keep(book, a_task(name)).name == name


@pytest.mark.parametrize("name", ["", "Digits", "-a", "_a", "a b", "a:1", "a@b", "a/b", "é", "x" * 64, "a\n", "a\x00"])
def test_a_name_out_of_pattern_is_refused(book, name):
    keep(book, a_task("digits"))
    before = rows(book)
    for ask in (lambda: keep(book, a_task(name, 1)), lambda: book.set_alias(name, "digits")):
        with pytest.raises(RegistryError, match="is not a valid name: use lower-case letters") as refusal:
            ask()
        assert str(refusal.value).startswith(repr(name))
    assert rows(book) == before


def test_an_unknown_name_is_answered_with_names_near_it(book):
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
def test_an_unknown_reference_is_refused_everywhere(book, ref):
    keep(book, a_task())
    asks = (book.get, book.record, book.goldens, book.evaluations, book.retire, lambda ref: book.set_alias("a", ref))
    for ask in asks:
        with pytest.raises(UnknownTaskError) as refusal:
            ask(ref)
        assert str(refusal.value) == f"Task {ref!r} is not registered. Known: 'digits'. See: addenda tasks list"


def test_an_empty_registry_knows_no_names(registry):
    assert (registry.tasks(), registry.generation, registry.backbones()) == ([], 0, [])
    with pytest.raises(UnknownTaskError, match="Known: none"):
        registry.get("digits")


# -- extending --------------------------------------------------------------------------------------------------------


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


def test_a_parent_that_is_not_registered_is_refused(book):
    before = rows(book)
    with pytest.raises(RegistryError, match="Task 'child' extends 'stranger', which is not registered here"):
        keep(book, a_task("child", 1, parents=(a_task("stranger", 2),)))
    assert rows(book) == before


# -- retiring ---------------------------------------------------------------------------------------------------------


def test_a_retired_task_is_hidden_but_stays(book):
    task = keep(book, a_task())
    book.set_alias("production", "digits")
    book.retire("digits", "a better one")
    assert book.load(HERE) == []
    assert book.tasks() == []
    assert [record.retired for record in book.tasks(include_retired=True)] == ["a better one"]
    with pytest.raises(UnknownTaskError, match="Task 'digits' has no active version"):
        book.get("digits")
    for ref in ("digits:1", "digits@production"):
        assert same_content(book.get(ref), task)
    assert len(book.goldens("digits:1")) == 1


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
    before = rows(book)
    with pytest.raises(RegistryError, match="Task 'digits:1' is retired already"):
        book.retire("digits:1", "second")
    assert rows(book) == before


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


# -- events, evaluations, golden probes -------------------------------------------------------------------------------


def test_the_generation_grows_with_each_change_and_no_reading(book):
    def generations() -> Iterator[int]:
        yield book.generation
        keep(book, a_task())
        yield book.generation
        keep(book, a_task(seed=1), new_version=True)
        yield book.generation
        book.set_alias("production", "digits")
        yield book.generation
        book.add_evaluation("digits", "d", "n", {}, "l")
        yield book.generation
        book.retire("digits:1")
        yield book.generation

    assert list(generations()) == [0, 1, 2, 3, 4, 5]
    book.load(HERE), book.tasks(), book.get("digits"), book.goldens("digits"), keep(book, a_task(seed=1))
    with pytest.raises(NameTakenError):
        keep(book, a_task(seed=2))
    assert book.generation == 5
    subjects = [(row[1], row[2]) for row in rows(book)["event"]]
    assert subjects == [
        ("registered", "digits:1"),
        ("registered", "digits:2"),
        ("alias", "digits@production"),
        ("evaluated", "digits:2"),
        ("retired", "digits:1"),
    ]


def test_evaluations_come_back_oldest_first(book):
    keep(book, a_task())
    book.set_alias("production", "digits")
    given = [book.add_evaluation("digits@production", "d" * 64, "n" * 64, {"accuracy": a}, "l") for a in (0.5, 0.25)]
    found = book.evaluations("digits")
    assert found == given
    assert [(e.task, e.metrics["accuracy"], e.generation) for e in found] == [
        ("digits:1", 0.5, 3),
        ("digits:1", 0.25, 4),
    ]
    assert (found[0].data_fingerprint, found[0].numerics_fingerprint, found[0].logits_digest) == (
        "d" * 64,
        "n" * 64,
        "l",
    )


def test_a_golden_probe_comes_back_bit_for_bit(book):
    task = a_task()
    keep(book, task)
    [back] = book.goldens("digits")
    given = probe(task)
    assert torch.equal(back.logits, given.logits)
    assert (back.digest, back.numerics, back.numerics_fingerprint) == (given.digest, {"torch": "any"}, "n" * 64)


def test_a_golden_probe_of_other_labels_is_refused(book):
    before = rows(book)
    with pytest.raises(RegistryError, match="'digits' has 3 labels; its golden probe has 2 columns"):
        book.register(a_task(), replace(probe(a_task()), logits=torch.zeros(4, 2)))
    assert rows(book) == before


def test_a_golden_probe_that_could_never_be_read_is_refused(book):
    before = rows(book)
    with pytest.raises(RegistryError, match="golden probe"):
        book.register(a_task(), replace(probe(a_task()), digest="0" * 64))
    assert rows(book) == before


@pytest.mark.parametrize("field", ["config", "metrics", "data"])
@pytest.mark.parametrize("value", [float("nan"), Path("x")], ids=["nan", "path"])
def test_a_value_that_json_cannot_hold_is_refused(book, field, value):
    before = rows(book)
    with pytest.raises(RegistryError, match="Task 'digits' was not registered"):
        keep(book, a_task(**{field: {"value": value}}))
    assert rows(book) == before


# -- artifacts --------------------------------------------------------------------------------------------------------


def read_back(task: Task) -> Task:
    parents = {parent.sha256: parent for parent in task.parents}
    return decode(encode(task), task.sha256, parents.__getitem__, {"name": task.name})


@settings(max_examples=30, deadline=None, database=None)
@given(
    labels=st.lists(
        st.sampled_from(["a", "", "é", "日本", '"', "\\", "\n", "\x00", "🦆"]), min_size=1, max_size=4, unique=True
    ),
    width=st.integers(1, 5),
    depth=st.integers(0, 3),
    memory=st.integers(0, 3),
    token=st.booleans(),
    pooled=st.booleans(),
    rank=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_every_task_survives_its_artifact(labels, width, depth, memory, token, pooled, rank, seed):
    noise = torch.Generator().manual_seed(seed)
    shapes = {"head_weight": (len(labels), width), "head_bias": (len(labels),)}
    if token:
        shapes |= {"class_token": (width,), "memory": (depth, memory, width)}
        shapes |= {"pooled_weight": (len(labels), width)} if pooled else {}
    tensors = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    if token and rank:
        tensors["adapters"] = adapters(width, depth, rank, 2 * width, seed)
    task = Task(name="any", backbone=FINGERPRINT, labels=tuple(labels), parents=(a_task(seed=1),), **tensors)
    assert same_content(read_back(task), task)
    assert encode(read_back(task)) == encode(task)
    assert read_back(task).adapter_rank == task.adapter_rank == (rank if token else 0)


def ramp(*shape: int) -> torch.Tensor:
    """The same numbers on every machine."""
    return (torch.arange(torch.Size(shape).numel()) % 251).sub(125).div(128).reshape(shape)


def test_a_task_without_adapters_has_the_bytes_that_it_always_had():
    content = {"backbone": FINGERPRINT, "class_token": ramp(8)}
    parent = Task("p", labels=("x",), head_weight=ramp(1, 8), head_bias=ramp(1), memory=ramp(2, 0, 8), **content)
    heads = {"head_weight": ramp(3, 8), "head_bias": ramp(3), "pooled_weight": ramp(3, 8)}
    task = Task("t", labels=("a", "b", "c"), memory=ramp(2, 5, 8), parents=(parent,), **heads, **content)
    assert parent.sha256 == "c8c11571a24f7d2271f3fae1fcb4e16e2beb7f350fd789921ba757ce1f6180e0"
    assert task.sha256 == "6e6b36651a3c089ab70b87e6ab06cd0bf29b796e8518bd23fd8a7d313a2ae70b"


def test_an_adapted_task_comes_back_from_the_registry_as_it_went_in(book):
    task = a_task(adapters=adapters())
    kept = keep(book, task)
    found = book.get("digits")
    assert same_content(found, task)
    assert found.sha256 == kept.sha256 == task.sha256 != a_task().sha256
    assert (found.adapter_rank, tuple(found.adapters)) == (3, ADAPTED)
    assert book.record("digits").num_parameters == a_task().num_parameters + 2 * 3 * (4 * 8 + 2 * 20)
    with pytest.raises(TypeError, match="does not support item assignment"):
        found.adapters["q"] = None


def test_a_sha256_is_a_function_of_content_alone():
    task = a_task()
    others = {"name": "numerals", "version": 3, "config": {"a": 1}, "metrics": {"b": 2}, "data": {"c": 3}}
    assert {replace(task, **{field: value}).sha256 for field, value in others.items()} == {task.sha256}
    assert replace(task, memory=task.memory.transpose(0, 2).contiguous().transpose(0, 2)).sha256 == task.sha256
    assert replace(task, head_bias=task.head_bias.double()).sha256 == task.sha256
    assert task.sha256 == digest(task.artifact)


def test_a_sha256_changes_with_every_part_of_the_content():
    task = a_task()
    changed = [
        replace(task, backbone="c" * 64),
        replace(task, labels=("zero", "one", "three")),
        replace(task, labels=("one", "zero", "two")),
        replace(task, objective="multi-label"),
        replace(task, temperature=0.5),
        replace(task, temperature=2.0),
        replace(task, pooled_weight=None),
        replace(task, parents=(a_task(seed=1),)),
        replace(task, parents=(a_task(seed=2),)),
    ]
    for name in TENSORS:
        tensor = getattr(task, name).clone()
        tensor.view(torch.int32).view(-1)[-1] ^= 1
        changed.append(replace(task, **{name: tensor}))
    changed.append(replace(task, adapters=adapters()))
    for site, update in adapters().items():
        for part, tensor in update._asdict().items():
            other = tensor.clone()
            other.view(torch.int32).view(-1)[-1] ^= 1
            changed.append(replace(task, adapters={**adapters(), site: update._replace(**{part: other})}))
    assert len(changed) == 9 + len(TENSORS) + 1 + 2 * len(ADAPTED)
    assert len({task.sha256, *(other.sha256 for other in changed)}) == 1 + len(changed)


def test_an_artifact_holds_no_name_and_no_time():
    data = a_task("a-name-of-its-own", config={"lr": 0.123}, metrics={"accuracy": 0.987}).artifact
    assert b"zero" in data
    for absent in (b"a-name-of-its-own", b"0.123", b"0.987", b"20"):
        assert absent not in data[: int.from_bytes(data[:8], "little")]


def test_canonical_json_is_one_text_for_one_value():
    assert canonical_json({"b": [1, "é"], "a": None}) == canonical_json({"a": None, "b": [1, "é"]})
    assert canonical_json({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"é"]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_refused(book, name, value):
    tensor = getattr(a_task(), name).clone()
    tensor.view(-1)[-1] = value
    with pytest.raises(IntegrityError, match=f"its {name} must be finite float32"):
        encode(spoiled(name, tensor))
    with pytest.raises(RegistryError, match=f"its {name} must be finite float32"):
        book.register(spoiled(name, tensor), probe(a_task()))
    assert rows(book)["task"] == rows(book)["artifact"] == []


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("class_token", (7,)),
        ("class_token", (1, 8)),
        ("class_token", None),
        ("memory", (2, 4, 7)),
        ("memory", (4, 8)),
        ("memory", None),
        ("head_weight", (2, 8)),
        ("head_weight", (3, 7)),
        ("head_weight", (3,)),
        ("head_weight", ()),
        ("head_bias", (2,)),
        ("head_bias", (3, 1)),
        ("pooled_weight", (3, 7)),
        ("pooled_weight", (2, 8)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, shape):
    with pytest.raises(IntegrityError, match=r"do not fit 3 labels or each other: .*'head_bias'"):
        encode(spoiled(name, None if shape is None else torch.zeros(shape)))


@pytest.mark.parametrize("site", ADAPTED)
@pytest.mark.parametrize("part", LowRank._fields)
def test_adapters_that_are_not_finite_are_refused(site, part):
    whole = adapters()
    getattr(whole[site], part)[1, 0, 0] = float("nan")
    with pytest.raises(IntegrityError, match=rf"its adapters\.{site}\.{part} must be finite float32"):
        encode(a_task(adapters=whole))


@pytest.mark.parametrize(
    ("site", "down", "up"),
    [
        ("q", (2, 4, 8), (2, 8, 4)),  # another rank than the rest
        ("fc2", (2, 3, 12), (2, 8, 2)),  # two ranks
        ("proj", (3, 3, 8), (3, 8, 3)),  # another depth
        ("fc1", (2, 3, 7), (2, 12, 3)),  # another width
        ("fc1", (2, 3, 8), (2, 11, 3)),  # another hidden width than fc2's
        ("fc2", (2, 3, 12), (2, 7, 3)),
        ("q", (2, 3, 8), (2, 9, 3)),  # another width than proj's
        ("proj", (3, 8), (8, 3)),
        ("proj", (), ()),
    ],
)
def test_adapters_that_do_not_fit_are_refused(site, down, up):
    changed = {**adapters(), site: LowRank(torch.zeros(down), torch.zeros(up))}
    with pytest.raises(
        IntegrityError,
        match=r"its adapters, down and up, do not fit 2 layers of 8 dimensions, each other, or one rank .*'fc2': \[\[",
    ):
        encode(a_task(adapters=changed))


def test_adapters_of_rank_0_are_refused():
    with pytest.raises(IntegrityError, match="or one rank of 1 or more"):
        encode(a_task(adapters=adapters(rank=0)))


def test_half_of_the_adapters_are_refused():
    whole = adapters()
    del whole["proj"]
    with pytest.raises(
        IntegrityError, match=r"its adapters lack \['adapters\.proj\.down', 'adapters\.proj\.up'\]: a task"
    ):
        encode(a_task(adapters=whole))


def test_adapters_of_another_layer_are_refused():
    with pytest.raises(IntegrityError, match=r"holds the tensors \['adapters\.fc1\.down', .*'adapters\.k\.down', "):
        encode(a_task(adapters={**adapters(), "k": adapters()["q"]}))


def test_adapters_of_a_head_only_task_are_refused():
    with pytest.raises(IntegrityError, match="it has adapters and no class token, whose way through the blocks"):
        encode(a_task(class_token=None, memory=None, pooled_weight=None, adapters=adapters()))


def test_labels_that_repeat_each_other_are_refused():
    with pytest.raises(IntegrityError, match="repeat each other"):
        encode(a_task(labels=("zero", "one", "zero")))


def test_labels_that_do_not_fit_the_head_are_refused():
    with pytest.raises(IntegrityError, match="do not fit 2 labels"):
        encode(a_task(labels=("zero", "one")))


def test_a_missing_head_is_refused():
    with pytest.raises(IntegrityError, match="its artifact holds the tensors"):
        encode(spoiled("head_bias", None))


def test_an_artifact_that_is_none_is_refused():
    refused = 0
    for data in (b"", b"\x00" * 8, b"hello world", encode(a_task())[:-4], b"\x02" + b"\x00" * 7 + b"{}"):
        with pytest.raises(IntegrityError, match="its artifact is not valid"):
            decode(data, digest(data), lambda sha256: a_task(), {"name": "any"})
        refused += 1
    assert refused == 5


def test_an_artifact_of_another_format_is_refused():
    data = encode(a_task())
    other = data.replace(b'\\"format\\":1', b'\\"format\\":2')
    assert other != data
    with pytest.raises(IntegrityError, match="has format 2; this version reads 1"):
        decode(other, digest(other), lambda sha256: a_task(), {"name": "any"})


def manifest_of(task: Task) -> str:
    """The manifest as it stands in a task's bytes."""
    header = json.loads(task.artifact[8 : 8 + int.from_bytes(task.artifact[:8], "little")])
    return header["__metadata__"]["addenda"]


def with_manifest(task: Task, **changes: Any) -> bytes:
    """A task's artifact with another manifest, as only another program would write it."""
    manifest = canonical_json(json.loads(manifest_of(task)) | changes)
    return save({name: getattr(task, name) for name in TENSORS}, metadata={"addenda": manifest})


def test_a_task_without_a_temperature_keeps_the_bytes_it_always_had():
    plain = (
        f'{{"backbone":"{FINGERPRINT}","extends":[],"format":1,"labels":["zero","one","two"],'
        '"objective":"single-label"}'
    )
    assert manifest_of(a_task()) == manifest_of(a_task(temperature=1.0)) == plain
    assert manifest_of(a_task(temperature=2.0)) == plain[:-1] + ',"temperature":2.0}'


@settings(max_examples=30, deadline=None, database=None)
@given(temperature=st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_any_temperature_above_0_comes_back(temperature):
    task = a_task(temperature=temperature, objective="multi-label")
    assert read_back(task).temperature == temperature
    assert same_content(read_back(task), task)
    assert encode(read_back(task)) == encode(task)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_a_temperature_that_is_not_finite_and_above_0_is_refused(book, temperature):
    with pytest.raises(IntegrityError, match=r"its temperature is .*it must be a finite number above 0"):
        encode(a_task(temperature=temperature))
    with pytest.raises(RegistryError, match="its temperature is"):
        book.register(a_task(temperature=temperature), probe(a_task()))
    assert rows(book)["task"] == rows(book)["artifact"] == []


def test_an_objective_that_is_not_known_is_refused():
    with pytest.raises(IntegrityError, match=r"its objective is 'ranking'; .* knows 'single-label', 'multi-label'"):
        encode(a_task(objective="ranking"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "ranking"}, "its objective is 'ranking'"),
        ({"temperature": 1.0}, "stores the temperature 1.0"),
        ({"temperature": 0.0}, "its temperature is 0.0"),
        ({"temperature": "2.0"}, "its temperature is '2.0'"),
        ({"temperature": True}, "its temperature is True"),
    ],
)
def test_an_artifact_that_cannot_be_read_as_probabilities_is_refused(changes, said):
    unchanged = with_manifest(a_task())
    assert decode(unchanged, digest(unchanged), lambda sha256: a_task(), {"name": "any"}).temperature == 1.0
    data = with_manifest(a_task(), **changes)
    with pytest.raises(IntegrityError, match=said):
        decode(data, digest(data), lambda sha256: a_task(), {"name": "any"})


def test_single_label_probabilities_are_a_softmax_and_multi_label_ones_sigmoids():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    single, multi = a_task(), a_task(objective="multi-label")
    assert torch.equal(single.probabilities(logits), logits.softmax(-1))
    assert torch.equal(multi.probabilities(logits), logits.sigmoid())
    assert torch.equal(replace(single, temperature=4.0).probabilities(logits), (logits / 4).softmax(-1))
    assert torch.equal(replace(multi, temperature=4.0).probabilities(logits), (logits / 4).sigmoid())


# -- nothing registered changes ---------------------------------------------------------------------------------------


def refused(registry: Registry, sql: str, *values: object, pragma: str = "") -> None:
    """Runs a statement from a foreign connection and expects the database itself to say no."""
    with closing(sqlite3.connect(registry.location)) as connection:
        connection.execute(pragma)
        with pytest.raises(sqlite3.IntegrityError, match="are never changed or removed"):
            connection.execute(sql, values)


@pytest.mark.parametrize("pragma", ["", "PRAGMA recursive_triggers=ON"], ids=["plain", "recursive triggers"])
def test_the_database_refuses_to_change_any_row(full_book, pragma):
    before, tried = rows(full_book), 0
    assert len(schema.IMMUTABLE) == 9
    for table in schema.IMMUTABLE:
        name, values = table.name, before[table.name][0]
        marks = ", ".join("?" * len(values))
        key = next(iter(table.primary_key)).name
        for column in table.columns:
            refused(full_book, f"UPDATE {name} SET {column.name} = {column.name}", pragma=pragma)
            tried += 1
        refused(full_book, f"UPDATE OR REPLACE {name} SET {key} = {key}", pragma=pragma)
        refused(full_book, f"DELETE FROM {name}", pragma=pragma)
        for verb in ("REPLACE", "INSERT", "INSERT OR REPLACE", "INSERT OR IGNORE"):
            refused(full_book, f"{verb} INTO {name} VALUES ({marks})", *values, pragma=pragma)
        upsert = f"INSERT INTO {name} VALUES ({marks}) ON CONFLICT DO UPDATE SET {key} = {key}"
        refused(full_book, upsert, *values, pragma=pragma)
    assert tried > 50
    assert rows(full_book) == before


def test_the_database_refuses_a_second_row_of_one_name_and_version(full_book):
    before = rows(full_book)
    columns = ", ".join(column.name for column in schema.task.columns if column.name != "id")
    for new_id in ("99", "NULL"):
        refused(full_book, f"INSERT OR REPLACE INTO task (id, {columns}) SELECT {new_id}, {columns} FROM task LIMIT 1")
    assert rows(full_book) == before


def test_the_database_refuses_a_replacement_by_rowid(full_book):
    changes = {
        "backbone": {"fingerprint": "'evil'"},
        "artifact": {"sha256": "'evil'"},
        "golden": {"numerics_fingerprint": "'evil'"},
        "task_parent": {"position": "99"},
    }
    before = rows(full_book)
    for name, change in changes.items():
        columns = [column.name for column in schema.metadata.tables[name].columns]
        select = ", ".join(change.get(column, column) for column in columns)
        refused(
            full_book,
            f"INSERT OR REPLACE INTO {name} (rowid, {', '.join(columns)}) SELECT rowid, {select} FROM {name} LIMIT 1",
        )
    assert rows(full_book) == before


def test_rows_can_still_be_added_and_aliases_still_move(full_book):
    keep(full_book, a_task("birds", 8))
    full_book.set_alias("production", "digits:1")
    assert full_book.get("birds").version == 1


# -- damage is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 10, -1])
def test_a_flipped_byte_of_an_artifact_is_found(full_book, place):
    keep(full_book, a_task("birds", 8))
    data = bytearray(full_book.get("strokes").artifact)
    data[place] ^= 1
    sha256 = full_book.record("strokes").sha256
    tamper(full_book, "artifact", "UPDATE artifact SET data = ? WHERE sha256 = ?", bytes(data), sha256)
    with pytest.raises(IntegrityError, match=f"'strokes:1' cannot be trusted: .* sha256 {sha256[:16]}… .*changed"):
        full_book.get("strokes")
    with pytest.raises(IntegrityError, match="Task 'digits:1' cannot be trusted: Task 'strokes:1'"):
        full_book.get("digits")
    with pytest.raises(IntegrityError, match="'strokes:1'"):
        full_book.load(HERE)
    assert same_content(full_book.get("birds"), a_task("birds", 8))
    assert full_book.get("old:1").version == 1
    assert len(full_book.tasks()) == 3


@pytest.mark.parametrize(
    ("table", "sql"),
    [
        ("task", """UPDATE task SET labels = '["zero","one","three"]' WHERE name = 'digits'"""),
        ("task", f"UPDATE task SET backbone = '{'c' * 64}' WHERE name = 'digits'"),
        ("task", "UPDATE task SET objective = 'multi-label' WHERE name = 'digits'"),
        ("task", "UPDATE task SET artifact = 'gone' WHERE name = 'digits'"),
        ("task_parent", "UPDATE task_parent SET parent_id = 3"),
        ("task_parent", "UPDATE task_parent SET parent_id = 99"),
    ],
)
def test_a_changed_column_is_found(full_book, table, sql):
    tamper(full_book, table, sql)
    with pytest.raises(IntegrityError, match="Task 'digits:1' cannot be trusted"):
        full_book.get("digits:1")
    assert full_book.get("strokes").version == 1


@pytest.mark.parametrize("column", ["labels", "config", "metrics", "data"])
def test_a_column_that_is_no_json_is_answered_in_words(full_book, column):
    tamper(full_book, "task", f"UPDATE task SET {column} = '[' WHERE name = 'digits'")
    for ask in (lambda: full_book.get("digits"), lambda: full_book.load(HERE), full_book.tasks):
        with pytest.raises(RegistryError):
            ask()
    assert full_book.get("strokes").version == 1


def test_a_lost_artifact_is_found(full_book):
    with raw(full_book) as connection:
        connection.execute("DROP TRIGGER artifact_no_delete")
        connection.execute("DELETE FROM artifact WHERE sha256 = ?", (full_book.record("digits").sha256,))
    with pytest.raises(IntegrityError, match="Task 'digits:1' cannot be trusted: its artifact is missing"):
        full_book.get("digits")


def test_a_lost_parent_is_found(full_book):
    with raw(full_book) as connection:
        connection.execute("DROP TRIGGER task_parent_no_delete")
        connection.execute("DELETE FROM task_parent")
    with pytest.raises(IntegrityError, match=r"'digits:1' cannot be trusted: it extends a task .* that is missing"):
        full_book.get("digits")


@pytest.mark.parametrize("sql", ["SET logits = zeroblob(48)", "SET digest = 'other'", "SET logits = x'00'"])
def test_a_changed_golden_probe_is_found(full_book, sql):
    tamper(full_book, "golden", f"UPDATE golden {sql} WHERE task_id = 2")
    with pytest.raises(IntegrityError, match="Task 'digits': its golden probe's stored bytes have changed"):
        full_book.goldens("digits")
    assert len(full_book.goldens("strokes")) == 1


@pytest.mark.parametrize("table", ["sqlite_schema", "task", "artifact", "event"])
def test_a_damaged_page_is_answered_in_words(full_book, table):
    with raw(full_book) as connection:
        [page] = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone() or [1]
    full_book.close()
    size = 4096
    with open(full_book.location, "r+b") as file:
        file.seek(page * size - size // 2)
        file.write(b"\xff" * (size // 2))
        file.seek((page - 1) * size + (100 if page == 1 else 0))
        file.write(b"\xff" * 100)
    with pytest.raises(RegistryError, match="malformed"), Registry.open(full_book.location) as damaged:
        pytest.fail(f"read as {damaged.tasks()}, {damaged.generation}, {damaged.load(HERE)}")


# -- opening ----------------------------------------------------------------------------------------------------------


def test_a_registry_stays_when_it_is_closed_and_opened_again(full_book):
    full_book.close()
    before = rows(full_book)
    for location in (full_book.location, f"sqlite:///{full_book.location}"):
        with Registry.open(location, create=False) as again:
            assert again.get("digits").extends == ("strokes:1",)
            assert again.generation == 6
    assert rows(full_book) == before


@pytest.mark.parametrize("folder", ["a b", "é", "a?b", "a#b", "a%20b", "a%b", "a+b", "a=b&c", "it's"])
def test_a_path_is_a_path_whatever_its_letters(tmp_path, folder):
    (tmp_path / folder).mkdir()
    with Registry.open(tmp_path / folder / "tasks.db") as opened:
        assert opened.generation == 0
        assert (tmp_path / folder / "tasks.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_the_schema_that_migrations_make_is_the_metadata(registry):
    engine = create_engine(f"sqlite:///{registry.location}")
    options = {"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}

    def differences() -> list[Any]:
        with engine.connect() as connection:
            return compare_metadata(MigrationContext.configure(connection, opts=options), schema.metadata)

    assert differences() == []
    with raw(registry) as connection:
        connection.execute("ALTER TABLE task ADD COLUMN extra TEXT")
    assert len(differences()) == 1
    engine.dispose()


def test_every_immutable_table_has_its_triggers(registry):
    with raw(registry) as connection:
        found = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"))
    expected = {name: sql for table in schema.IMMUTABLE for name, sql in statements(table).items()}
    assert found == expected
    assert len(expected) == 27
    assert {table.name for table in schema.metadata.sorted_tables} - {t.name for t in schema.IMMUTABLE} == {"alias"}


def test_a_registry_of_the_first_version_is_upgraded_and_keeps_every_row(full_book):
    before = rows(full_book)
    with raw(full_book) as connection:
        connection.execute("DROP TABLE statistics")
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '0001'")
    with Registry.open(full_book.location) as opened:
        assert rows(opened) == before | {"statistics": []}
        assert opened.statistics("digits") is None
        assert opened.record("digits").statistics_bytes == 0
        with raw(opened) as connection:
            found = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"))
        assert found == {name: sql for table in schema.IMMUTABLE for name, sql in statements(table).items()}


def test_a_registry_of_a_newer_version_is_refused_untouched(full_book):
    with raw(full_book) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    before = rows(full_book)
    with pytest.raises(RegistryError, match=r"schema is '9999', from a newer version of Addenda\. Upgrade"):
        Registry.open(full_book.location)
    assert rows(full_book) == before


def test_a_file_that_is_no_database_is_refused_untouched(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database\n" * 500)
    with pytest.raises(RegistryError, match=r"Registry '.*notes\.txt' cannot be opened: file is not a database"):
        Registry.open(path)
    assert path.read_text() == "not a database\n" * 500


def test_another_programs_database_is_refused_untouched(tmp_path):
    location = str(tmp_path / "songs.db")
    with raw(location) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    with pytest.raises(RegistryError, match=r"songs\.db"):
        Registry.open(location)
    with raw(location) as connection:
        assert [name for (name,) in connection.execute("SELECT name FROM sqlite_master")] == ["songs"]


def test_another_programs_task_table_is_refused_untouched(tmp_path):
    location = str(tmp_path / "chores.db")
    with raw(location) as connection:
        connection.execute("CREATE TABLE task (chore TEXT)")
    with pytest.raises(RegistryError, match=r"chores\.db"):
        Registry.open(location)
    with raw(location) as connection:
        assert [name for (name,) in connection.execute("SELECT name FROM sqlite_master")] == ["task"]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{}/no/tasks.db", "The folder '{}/no' of the registry does not exist"),
        ("sqlite:///{}/no/tasks.db", "The folder '{}/no' of the registry does not exist"),
        ("{}", "Registry '{}' cannot be opened: unable to open database file"),
        ("postgresql+psycopg://me:secret@host/db", "A registry is an SQLite file: give a path or sqlite:///PATH, not"),
        ("postgresql://host/db", "A registry is an SQLite file: give a path or sqlite:///PATH, not 'postgresql://host"),
        ("sqlite://", "A registry is an SQLite file: give a path or sqlite:///PATH, not 'sqlite://'"),
        ("://", "'://' is not a database URL"),
    ],
)
def test_a_location_that_cannot_be_opened_is_refused(tmp_path, location, message):
    with pytest.raises(RegistryError) as refusal:
        Registry.open(location.format(tmp_path))
    assert str(refusal.value).startswith(message.format(tmp_path))
    assert "secret" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_registry_is_not_made_where_none_was_asked_for(tmp_path):
    with pytest.raises(RegistryError, match=r"There is no registry at '.*tasks\.db'. `addenda learn` makes one"):
        Registry.open(tmp_path / "tasks.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_locked_registry_is_refused_in_words(full_book):
    with raw(full_book) as holder:
        holder.execute("BEGIN IMMEDIATE")
        event.listen(Pool, "checkout", short_of_patience)
        try:
            with pytest.raises(
                RegistryError, match=r"Task 'birds' was not registered: database is locked. Nothing was"
            ):
                keep(full_book, a_task("birds", 8))
        finally:
            event.remove(Pool, "checkout", short_of_patience)
    assert keep(full_book, a_task("birds", 8)).ref == "birds:1"


def short_of_patience(dbapi: Any, *_: object) -> None:
    dbapi.execute("PRAGMA busy_timeout=10")


# -- other processes, full disks, killed processes, several at once ---------------------------------------------------


def exit_code(function: Any, *arguments: object) -> int:
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def send_artifact(tell: Any) -> None:
    tell.send((encode(a_task()), hash("addenda")))


def test_an_artifact_is_the_same_bytes_in_another_process():
    told, tell = FORKS.Pipe(duplex=False)
    with closing(told), closing(tell):
        assert exit_code(send_artifact, tell) == 0
        data, hashed = told.recv()
    assert data == encode(a_task())
    assert hashed != hash("addenda"), "the other process hashed alike, so equal bytes prove nothing"


@contextmanager
def database_full(registry: Registry) -> Iterator[None]:
    """SQLite may take no further page: what it sees where a disk is full."""

    def limit(dbapi: Any, *_: object) -> None:
        [used] = dbapi.execute("PRAGMA page_count").fetchone()
        dbapi.execute(f"PRAGMA max_page_count={used}")

    def lift(dbapi: Any, *_: object) -> None:
        dbapi.execute("PRAGMA max_page_count=1073741823")

    event.listen(Pool, "checkout", limit)
    try:
        yield
    finally:
        event.remove(Pool, "checkout", limit)
        event.listen(Pool, "checkout", lift)
        assert registry.generation == 0
        event.remove(Pool, "checkout", lift)


@contextmanager
def files_limited(registry: Registry) -> Iterator[None]:
    """The operating system lets no file of this process grow past 1 MB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("full", [database_full, files_limited])
def test_a_full_disk_registers_nothing_and_a_retry_works(book, full):
    before = rows(book)
    with full(book):
        with pytest.raises(RegistryError, match=r"Task 'large' was not registered: .*Nothing was changed\."):
            keep(book, a_large_task())
        assert book.tasks() == []
    assert rows(book) == before
    assert same_content(keep(book, a_large_task()), a_large_task())
    assert wholly_there(book.location) == {"large"}


def wholly_there(location: str) -> set[str]:
    """Names that are registered; each must load, with its golden probe and its event, and nothing else may be there."""
    found = rows(location)
    names = {row[1] for row in found["task"]}
    with raw(location) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    with Registry.open(location) as registry:
        assert {task.name for task in registry.load(HERE)} == names
        assert all(len(registry.goldens(name)) == 1 for name in names)
    assert {row[2] for row in found["event"]} == {f"{name}:1" for name in names}
    assert {row[0] for row in found["artifact"]} == {row[4] for row in found["task"]}
    assert len(found["golden"]) == len(names)
    return names


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(statement: int) -> None:
    """Has this process killed just before one statement from now; -1 is the commit."""
    if statement == -1:
        event.listen(Engine, "commit", die)
    numbers = count()
    event.listen(Engine, "before_cursor_execute", lambda *_: die() if next(numbers) == statement else None)


def open_and_die(location: str, statement: int) -> None:
    die_before(statement)
    Registry.open(location).close()


def register_and_die(location: str, statement: int) -> None:
    with Registry.open(location) as registry:
        die_before(statement)
        keep(registry, a_large_task())


def test_a_process_killed_while_it_makes_the_schema_leaves_none(tmp_path):
    location = str(tmp_path / "tasks.db")
    for statement in (-1, 5, 20, 40):
        assert exit_code(open_and_die, location, statement) == -signal.SIGKILL
        with raw(location) as connection:
            assert connection.execute("SELECT * FROM sqlite_schema").fetchall() == [], statement
    with Registry.open(location) as registry:
        registry.add_backbone(BACKBONE)
        assert keep(registry, a_task()).version == 1


def test_a_process_killed_at_any_statement_of_a_registration_leaves_nothing(book):
    before = rows(book)
    assert exit_code(register_and_die, book.location, -1) == -signal.SIGKILL
    assert wholly_there(book.location) == set()
    for statement in count():
        if exit_code(register_and_die, book.location, statement) == 0:
            break
        assert rows(book) == before, statement
        assert wholly_there(book.location) == set()
    assert statement >= 8
    assert wholly_there(book.location) == {"large"}
    assert same_content(book.get("large"), a_large_task())


def register_many(location: str, first: int, told: Any) -> None:
    with Registry.open(location) as registry:
        for number in count(first):
            keep(registry, a_task(f"task-{number}", number))
            told.send(number)


def test_a_process_killed_at_any_time_leaves_whole_tasks(book):
    moments, promised, kills = random.Random(0), set(), 5
    for round_ in range(kills):
        told, tell = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=register_many, args=(book.location, 1000 * round_, tell))
        process.start()
        tell.close()
        promised.add(f"task-{told.recv()}")
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        with closing(told):
            while told.poll():
                try:
                    promised.add(f"task-{told.recv()}")
                except EOFError:
                    break
        assert promised <= wholly_there(book.location)
    assert len(promised) > kills
    assert same_content(book.get("task-0"), a_task(seed=0))


def open_and_register(locations: list[str], name: str, seed: int, start: Any) -> None:
    for location in locations:
        start.wait(60)
        with Registry.open(location) as registry:
            registry.add_backbone(BACKBONE)
            try:
                keep(registry, a_task(name, seed))
            except NameTakenError:
                sys.exit(3)


def all_at_once(locations: list[str], names: list[str]) -> list[int | None]:
    """Exit codes of processes that register a task each, at the same time, in one registry after the other."""
    start = FORKS.Barrier(len(names))
    arguments = [(locations, name, seed, start) for seed, name in enumerate(names)]
    processes = [FORKS.Process(target=open_and_register, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return sorted(process.exitcode for process in processes)


def test_several_processes_can_open_a_fresh_registry_at_once(tmp_path):
    locations, names = [str(tmp_path / f"{number}.db") for number in range(10)], ["a", "b", "c", "d"]
    assert all_at_once(locations, names) == [0, 0, 0, 0]
    assert [wholly_there(location) for location in locations] == [set(names)] * len(locations)


def test_of_several_processes_one_gets_the_name(book):
    assert all_at_once([book.location], ["digits"] * 4) == [0, 3, 3, 3]
    assert wholly_there(book.location) == {"digits"}
