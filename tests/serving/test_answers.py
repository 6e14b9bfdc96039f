"""Answers of many tasks: their bytes, and which tasks and labels they have."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from addenda import FrozenBackbone, Registry, Task
from addenda.combined import Choice, golden, predictions_of
from addenda.exceptions import UnknownTaskError
from addenda.serving.answers import INLINE, AnswerPlan
from addenda.serving.outputs import Outputs, Wanted
from tests.serving.test_api import picture, problem
from tests.support.servers import AppClient, client_of
from tests.support.tasks import random_task

PREDICT = "/api/v1/predict"


def many(tiny: FrozenBackbone, count: int) -> list[Task]:
    """Tasks of several sizes and both objectives, each with its own temperature."""
    bases = [random_task(tiny, "base", classes=classes, memory=0) for classes in (2, 3, 10)]
    tasks = []
    for number in range(count):
        objective = "multi-label" if number % 4 == 3 else "single-label"
        tasks.append(
            replace(
                bases[number % 3], name=f"task-{number}", objective=objective, temperature=1 + number / 10, version=1
            )
        )
    return tasks


def logits_of(tasks: list[Task]) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return {task.name: 4 * torch.randn(1, len(task.labels), generator=random) for task in tasks}


@pytest.mark.parametrize("limits", [{}, {"top": 1}, {"min_probability": 0.1}, {"top": 2, "min_probability": 0.0}])
def test_an_answer_has_the_labels_and_the_bits_of_predictions(tiny: FrozenBackbone, limits: dict[str, float]) -> None:
    tasks = many(tiny, 50)
    logits = logits_of(tasks)
    plan, outputs = AnswerPlan(tasks), Outputs.of(1, logits, exact=True)
    answer = json.loads(plan.answer(7, outputs.exact, outputs.matrix, **limits))
    expected = predictions_of(tasks, logits, **limits)
    assert (answer["generation"], answer["exact"]) == (7, True)
    assert list(answer["tasks"]) == [task.name for task in tasks], "in the order of the request"
    compared = 0
    for task in tasks:
        entry = answer["tasks"][task.name]
        assert (entry["ref"], entry["sha256"], entry["objective"]) == (task.ref, task.sha256, task.objective)
        assert [label["label"] for label in entry["labels"]] == [label for label, _ in expected[task.name][0]]
        for label, (_, value) in zip(entry["labels"], expected[task.name][0], strict=True):
            assert struct.pack("<d", label["probability"]) == struct.pack("<d", value)
            compared += 1
    assert compared >= 45


def test_labels_of_any_text_are_read_back(tiny: FrozenBackbone) -> None:
    labels = ('quote " and \\', "Zürich 雪 🙂", "line\nbreak \x1f")
    task = replace(random_task(tiny, "odd"), labels=labels)
    answer = json.loads(AnswerPlan([task]).answer(1, True, torch.zeros(1, 3), choice=Choice("odd", 0.25, False)))
    assert tuple(label["label"] for label in answer["tasks"]["odd"]["labels"]) == labels
    assert answer["chosen"] == {"task": "odd", "probability": 0.25, "familiar": False}


def test_outputs_are_split_joined_and_selected_with_their_bits() -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(5, 1), "c": torch.randn(5, 4)}
    whole = Outputs.of(5, tensors, True, torch.randn(5, 2))
    parts = whole.split([2, 3])
    for part, rows in zip(parts, (slice(0, 2), slice(2, 5)), strict=True):
        chosen = part.select(Wanted(("c", "a")))
        assert [*chosen] == ["c", "a"]
        assert chosen.features is None
        assert all(torch.equal(chosen[name], tensors[name][rows]) for name in chosen)
        assert torch.equal(chosen.matrix, torch.cat([tensors["c"][rows], tensors["a"][rows]], 1)), "no other columns"
    assert Outputs.of(2, {}, True).matrix.shape == (2, 0)


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Iterator[AppClient]:
    for number, name in enumerate(("bird-colour", "bird-size", "car")):
        registered(name, seed=number)
    registry.tag("bird-size:1", "beta")
    registered("car", new_version=True, seed=9)
    registry.set_alias("car", "production", 2)
    with client_of(tiny, registry) as opened:
        yield opened


def test_tasks_are_selected_by_name_version_alias_pattern_and_tag(client: AppClient) -> None:
    def selected(query: str) -> list[str]:
        response = client.post(f"{PREDICT}?{query}", content=picture())
        assert response.status_code == 200, response.text
        return list(response.json()["tasks"])

    assert selected("") == ["bird-colour", "bird-size", "car"]
    assert selected("tasks=bird-*") == ["bird-colour", "bird-size"]
    assert selected("tasks=car,bird-*,bird-size") == ["car", "bird-colour", "bird-size"]
    assert selected("tasks=car:2") == selected("tasks=car@production") == selected("tasks=*@production") == ["car"]
    assert selected("tag=beta") == selected("tasks=bird-*&tag=beta") == ["bird-size"]


def test_a_selector_that_selects_nothing_is_refused_by_name(client: AppClient) -> None:
    def refused(query: str, status: int, detail: str) -> None:
        problem(client.post(f"{PREDICT}?{query}", content=picture()), status, detail)

    refused("tasks=car,other", 404, "Task 'other' is not served. Served: 'bird-colour'")
    refused("tasks=car,fish-*", 404, "No available task matches 'fish-*'")
    refused("tasks=car:1", 404, "Task 'car:1' is not available. Available: 'car:2'")
    refused("tasks=car@canary", 404, "Task 'car@canary' is not available. Available: 'car:2'")
    refused("tag=gamma", 404, "No selected task has the tag 'gamma'")
    refused("tasks=car&tag=beta", 404, "No selected task has the tag 'beta'")
    refused("tasks=", 404, "Task '' is not served")
    refused("tasks=c?r", 404, "Task 'c?r' is not served")
    refused("tasks=" + ",".join(f"{number}*" for number in range(33)), 400, "33 patterns; the maximum is 32")
    refused("task=auto&tag=beta", 400, "cannot be combined with 'tasks' or 'tag'")
    refused("min_probability=1.5", 422, "query.min_probability")


@pytest.mark.parametrize("task", ["bird-*", "car:2", "car@production", "other"])
def test_the_attention_of_a_task_is_requested_by_its_name_only(client: AppClient, task: str) -> None:
    service = client.app.state.service
    with pytest.raises(UnknownTaskError, match=r"is not served\. Served: 'bird-colour'"):
        client.portal.call(service.attention, picture(), task)


def test_labels_are_limited_by_probability(client: AppClient) -> None:
    image = picture()

    def labels(query: str) -> list[dict[str, float]]:
        answer = client.post(f"{PREDICT}?tasks=car&{query}", content=image).json()
        return answer["tasks"]["car"]["labels"]

    every = labels("min_probability=0")
    assert len(every) == 3
    least = every[1]["probability"]
    assert labels(f"min_probability={least!r}") == every[:2]
    assert labels(f"min_probability={least!r}&top=1") == every[:1]
    assert labels("min_probability=1") == []


def test_a_long_answer_equals_those_of_single_tasks(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]
) -> None:
    described, image = golden(tiny, task := random_task(tiny, "wide", classes=INLINE + 1)), picture()
    registered("digits")
    registry.register(task, described)
    with client_of(tiny, registry) as client:
        assert sum(len(task.labels) for task in client.app.state.service.snapshot.model.tasks.values()) > INLINE
        together = client.post(f"{PREDICT}?min_probability=0", content=image).json()
        for name in ("digits", "wide"):
            alone = client.post(f"{PREDICT}?min_probability=0&tasks={name}", content=image).json()
            assert alone["tasks"][name] == together["tasks"][name]
        assert len(together["tasks"]["wide"]["labels"]) == INLINE + 1
