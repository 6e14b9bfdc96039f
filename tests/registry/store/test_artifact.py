"""Artifacts: equal content has equal bytes, and invalid bytes are rejected."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from addenda.exceptions import IntegrityError, RegistryError
from addenda.registry import ADAPTED, Task, canonical_json, digest
from addenda.registry.store.task import decode, encode
from tests.support.databases import rows
from tests.support.processes import FORKS, exit_code
from tests.support.registries import FINGERPRINT, TENSORS, a_task, adapters, probe, same_content


def spoiled(name: str, tensor: torch.Tensor | None) -> Task:
    """A task with one tensor replaced without any checks."""
    task = a_task()
    object.__setattr__(task, name, tensor)
    return task


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
    tensors: dict[str, Any] = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    if token and rank:
        tensors["adapters"] = adapters(width, depth, rank, 2 * width, seed)
    task = Task(name="any", backbone=FINGERPRINT, labels=tuple(labels), parents=(a_task(seed=1),), **tensors)
    assert same_content(read_back(task), task)
    assert encode(read_back(task)) == encode(task)
    assert read_back(task).adapter_rank == task.adapter_rank == (rank if token else 0)


def ramp(*shape: int) -> torch.Tensor:
    """The same numbers on every machine."""
    return (torch.arange(torch.Size(shape).numel()) % 251).sub(125).div(128).reshape(shape)


def test_the_bytes_of_a_task_without_adapters_have_not_changed():
    content = {"backbone": FINGERPRINT, "class_token": ramp(8)}
    parent = Task("p", labels=("x",), head_weight=ramp(1, 8), head_bias=ramp(1), memory=ramp(2, 0, 8), **content)
    heads = {"head_weight": ramp(3, 8), "head_bias": ramp(3), "pooled_weight": ramp(3, 8)}
    task = Task("t", labels=("a", "b", "c"), memory=ramp(2, 5, 8), parents=(parent,), **heads, **content)
    assert parent.sha256 == "c8c11571a24f7d2271f3fae1fcb4e16e2beb7f350fd789921ba757ce1f6180e0"
    assert task.sha256 == "6e6b36651a3c089ab70b87e6ab06cd0bf29b796e8518bd23fd8a7d313a2ae70b"


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
def test_a_tensor_that_is_not_finite_is_refused(shared_book, name, value):
    tensor = getattr(a_task(), name).clone()
    tensor.view(-1)[-1] = value
    with pytest.raises(IntegrityError, match=f"its {name} must be finite float32"):
        encode(spoiled(name, tensor))
    with pytest.raises(RegistryError, match=f"its {name} must be finite float32"):
        shared_book.register(spoiled(name, tensor), probe(a_task()))
    assert rows(shared_book)["task"] == rows(shared_book)["artifact"] == []


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


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (a_task(labels=("zero", "one", "zero")), "contain duplicates"),
        (a_task(labels=("zero", "one")), "do not fit 2 labels"),
        (spoiled("head_bias", None), "its artifact has the tensors"),
        (a_task(objective="ranking"), r"its objective is 'ranking'; .* supports 'single-label', 'multi-label'"),
    ],
    ids=["duplicate labels", "labels that do not fit the head", "no head", "an unknown objective"],
)
def test_an_invalid_task_is_refused(task, message):
    with pytest.raises(IntegrityError, match=message):
        encode(task)


def test_bytes_that_are_not_an_artifact_are_refused():
    refused = 0
    for data in (b"", b"\x00" * 8, b"hello world", encode(a_task())[:-4], b"\x02" + b"\x00" * 7 + b"{}"):
        with pytest.raises(IntegrityError, match="its artifact is not valid"):
            decode(data, digest(data), lambda sha256: a_task(), {"name": "any"})
        refused += 1
    assert refused == 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'\\"format\\":1', b'\\"format\\":3', "has format 3; this version reads 1 and 2"),
        (b'\\"backbone\\"', b'\\"backbon_\\"', "its artifact is not valid: 'backbone'"),
    ],
)
def test_an_artifact_of_another_format_or_without_a_backbone_is_refused(old, new, message):
    data = encode(a_task())
    other = data.replace(old, new)
    assert other != data
    with pytest.raises(IntegrityError, match=message):
        decode(other, digest(other), lambda sha256: a_task(), {"name": "any"})


def manifest_of(task: Task) -> str:
    """The manifest text in a task's artifact."""
    header = json.loads(task.artifact[8 : 8 + int.from_bytes(task.artifact[:8], "little")])
    return header["__metadata__"]["addenda"]


def with_manifest(task: Task, **changes: Any) -> bytes:
    """A task's artifact with a changed manifest, which Addenda itself would not write."""
    manifest = canonical_json(json.loads(manifest_of(task)) | changes)
    return save({name: getattr(task, name) for name in TENSORS}, metadata={"addenda": manifest})


def test_the_bytes_of_a_task_without_a_temperature_have_not_changed():
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
def test_a_temperature_that_is_not_finite_and_above_0_is_refused(shared_book, temperature):
    with pytest.raises(IntegrityError, match=r"its temperature is .*it must be a finite number above 0"):
        encode(a_task(temperature=temperature))
    with pytest.raises(RegistryError, match="its temperature is"):
        shared_book.register(a_task(temperature=temperature), probe(a_task()))
    assert rows(shared_book)["task"] == rows(shared_book)["artifact"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "ranking"}, "its objective is 'ranking'"),
        ({"temperature": 1.0}, "stores the default temperature 1.0"),
        ({"temperature": 0.0}, "its temperature is 0.0"),
        ({"temperature": "2.0"}, "its temperature is '2.0'"),
        ({"temperature": True}, "its temperature is True"),
    ],
)
def test_an_artifact_with_an_invalid_objective_or_temperature_is_refused(changes, message):
    unchanged = with_manifest(a_task())
    assert decode(unchanged, digest(unchanged), lambda sha256: a_task(), {"name": "any"}).temperature == 1.0
    data = with_manifest(a_task(), **changes)
    with pytest.raises(IntegrityError, match=message):
        decode(data, digest(data), lambda sha256: a_task(), {"name": "any"})


def test_single_label_probabilities_are_a_softmax_and_multi_label_ones_sigmoids():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    single, multi = a_task(), a_task(objective="multi-label")
    assert torch.equal(single.probabilities(logits), logits.softmax(-1))
    torch.testing.assert_close(multi.probabilities(logits), logits.sigmoid())
    assert torch.equal(replace(single, temperature=4.0).probabilities(logits), (logits / 4).softmax(-1))
    torch.testing.assert_close(replace(multi, temperature=4.0).probabilities(logits), (logits / 4).sigmoid())


def send_artifact(sender: Any) -> None:
    sender.send((encode(a_task()), hash("addenda")))


def test_an_artifact_is_the_same_bytes_in_another_process():
    receiver, sender = FORKS.Pipe(duplex=False)
    with closing(receiver), closing(sender):
        assert exit_code(send_artifact, sender) == 0
        data, other_hash = receiver.recv()
    assert data == encode(a_task())
    assert other_hash != hash("addenda"), "the other process has the same hash seed, so equal bytes prove nothing"
