"""Counting live tensors: views, what is there already and what is freed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from addenda.benchmarks.training.dense import peak_bytes

WEIGHT = torch.ones(1000, requires_grad=True)


def freed_in_between() -> None:
    for _ in range(5):
        torch.zeros(1000)


def views() -> torch.Tensor:
    return torch.zeros(1000).view(10, 100)[2:].t()


def in_place() -> torch.Tensor:
    return torch.zeros(1000).add_(1)


def of_what_is_there() -> torch.Tensor:
    return WEIGHT.detach()[500:]


def kept_for_the_backward_pass() -> None:
    out = WEIGHT.exp().exp().exp().sum()
    assert out.requires_grad


def backward() -> None:
    torch.autograd.grad(WEIGHT.exp().sum(), WEIGHT)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (freed_in_between, 4000), (views, 4000), (in_place, 4000), (of_what_is_there, 0),
        (kept_for_the_backward_pass, 12_004), (backward, 8004),
    ],
)  # fmt: skip
def test_the_peak_is_of_storage_that_lives_at_once(run: Callable[[], object], expected: int) -> None:
    assert abs(peak_bytes(run, [WEIGHT], torch.device("cpu")) - expected) <= 8
