"""Peak memory counts live tensors once, without views, existing tensors and freed ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from addenda.benchmarks.training.peak_memory import peak_bytes

WEIGHT = torch.ones(1000, requires_grad=True)


def freed_in_between() -> None:
    for _ in range(5):
        torch.zeros(1000)


def views() -> torch.Tensor:
    return torch.zeros(1000).view(10, 100)[2:].t()


def in_place() -> torch.Tensor:
    return torch.zeros(1000).add_(1)


def of_an_existing_tensor() -> torch.Tensor:
    return WEIGHT.detach()[500:]


def saved_for_backward() -> None:
    out = WEIGHT.exp().exp().exp().sum()
    assert out.requires_grad


def backward() -> None:
    torch.autograd.grad(WEIGHT.exp().sum(), WEIGHT)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (freed_in_between, 4000), (views, 4000), (in_place, 4000), (of_an_existing_tensor, 0),
        (saved_for_backward, 12_004), (backward, 8004),
    ],
)  # fmt: skip
def test_the_peak_counts_storage_that_is_live_at_the_same_time(run: Callable[[], object], expected: int) -> None:
    assert abs(peak_bytes(run, [WEIGHT], torch.device("cpu")) - expected) <= 8
