"""Exactness on a CUDA device; skipped elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from addenda.backbones import FrozenBackbone, untrained_backbone
from addenda.combined import CombinedModel, golden, numerics, verify
from addenda.exceptions import ExactnessError
from tests.support.models import PRECISIONS, random_registry
from tests.support.tasks import random_task

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@cache
def vit_small(precision: torch.dtype) -> FrozenBackbone:
    return untrained_backbone("vit_small_patch16_224", str(precision).removeprefix("torch."), "cuda")


def in_bytes(logits: torch.Tensor) -> list[bytes]:
    return [row.cpu().numpy().tobytes() for row in logits]


@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 2**20), num_tasks=st.integers(1, 24), num_images=st.integers(1, 70), data=st.data())
def test_a_task_keeps_its_bits_in_any_registry(seed: int, num_tasks: int, num_images: int, data: st.DataObject) -> None:
    on = vit_small(torch.float32)
    tasks = random_registry(on, num_tasks, seed)
    pictures = torch.randn(num_images, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
    together = CombinedModel(on, data.draw(st.permutations(tasks)))(pictures)
    i = data.draw(st.integers(0, num_images - 1))
    for task in data.draw(st.lists(st.sampled_from(tasks), min_size=1, max_size=2, unique=True)):
        alone = CombinedModel(on, [task])(pictures[i : i + 1])[task.name]
        assert in_bytes(together[task.name])[i] == in_bytes(alone)[0]


@PRECISIONS
def test_the_backbones_own_logits_are_stock_timms(precision: torch.dtype) -> None:
    on = vit_small(precision)
    model = CombinedModel(on, [random_task(on, "task")], exact=False)
    pictures = torch.randn(model.micro_batch, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.backbone_logits(pictures), on.model(pictures.to("cuda", precision)))


def test_golden_probes_verify() -> None:
    on = vit_small(torch.float32)
    tasks = random_registry(on, 12, seed=1)
    verdicts = verify(on, [(task, [golden(on, task)]) for task in tasks])
    assert all(verdict.identical for verdict in verdicts)
    assert "CUDA" in numerics(on)["device"]


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_tf32_is_refused(tf32: None) -> None:
    on = vit_small(torch.float32)
    with pytest.raises(ExactnessError, match="float32_matmul_precision high"):
        CombinedModel(on, [random_task(on, "task")])


def test_bfloat16_is_refused() -> None:
    on = vit_small(torch.bfloat16)
    with pytest.raises(ExactnessError, match="use float32"):
        CombinedModel(on, [random_task(on, "task")])
