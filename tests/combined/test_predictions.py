"""Predictions of many tasks at once have the bits of each task's alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from addenda import FrozenBackbone, Task
from addenda.combined import predictions, predictions_of
from addenda.registry import probabilities
from tests.support.tasks import random_task

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1000)


def of_sizes(tiny: FrozenBackbone, num_tasks: int) -> list[Task]:
    """Tasks of several numbers of labels and both objectives, each with a temperature of its own."""
    made: list[Task] = []
    base = {size: random_task(tiny, "base", classes=size, memory=0) for size in SIZES}
    for number in range(num_tasks):
        size, objective = SIZES[number % len(SIZES)], ("single-label", "multi-label")[number % 2]
        task = replace(base[size], name=f"task-{number}", objective=objective, temperature=0.5 + number / 7)
        made.append(task)
    return made


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("num_images", [1, 3, 8])
def test_probabilities_of_many_tasks_have_the_bits_of_each_alone(
    tiny: FrozenBackbone, num_images: int, threads: int
) -> None:
    tasks = of_sizes(tiny, 90)
    random = torch.Generator().manual_seed(1)
    logits = {task.name: 6 * torch.randn(num_images, len(task.labels), generator=random) for task in tasks}
    torch.set_num_threads(threads)
    try:
        together = predictions_of(tasks, logits, min_probability=0)
        for task in tasks:
            for image in range(num_images):
                row = logits[task.name][image : image + 1].clone()
                alone = probabilities(row, task.objective, task.temperature)[0]
                labels, values = zip(*together[task.name][image], strict=True)
                assert sorted(labels) == sorted(task.labels)
                expected = torch.stack([alone[task.labels.index(label)] for label in labels])
                assert torch.tensor(values).numpy().tobytes() == expected.numpy().tobytes()
                assert list(values) == sorted(values, reverse=True)
    finally:
        torch.set_num_threads(1)


def test_the_best_labels_are_limited_by_number_and_by_probability(tiny: FrozenBackbone) -> None:
    task = random_task(tiny, "digits", classes=5)
    tags = replace(task, name="tags", objective="multi-label")
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, -9.0]])
    both = {"digits": logits, "tags": logits}

    def counts(**limits: float) -> list[int]:
        return [len(images[0]) for images in predictions_of([task, tags], both, **limits).values()]

    assert counts() == [3, 4]
    assert counts(top=1) == [1, 1]
    assert counts(top=5) == [5, 4], "a multi-label prediction has probable labels only"
    assert counts(min_probability=0) == [5, 5]
    assert counts(min_probability=0.05) == [3, 4]
    assert counts(min_probability=0.2, top=1) == [1, 1]
    assert counts(min_probability=1) == [0, 0]
    assert predictions(task, logits, 2) == predictions_of([task, tags], both, 2)["digits"]


def test_equal_probabilities_are_in_the_order_of_the_labels(tiny: FrozenBackbone) -> None:
    task = random_task(tiny, "digits", classes=40)
    labels = predictions_of([task], {"digits": torch.zeros(1, 40)}, top=40)["digits"][0]
    assert [label for label, _ in labels] == list(task.labels)
