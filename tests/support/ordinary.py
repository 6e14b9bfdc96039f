"""Tasks of every kind on one backbone, and the bits of their logits under plain settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from addenda import CombinedModel, FrozenBackbone
from addenda.registry import Task
from tests.support.models import bits, family, images

PLAIN_AND_ROTARY = pytest.mark.parametrize("variant", ["plain", pytest.param("dinov3", marks=pytest.mark.slow)])


@contextmanager
def changed(read: Callable[[], object], write: Callable[[object], object], value: object) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def tasks_of(on: FrozenBackbone) -> list[Task]:
    """One task of each kind: alone, with memory, extending, adapted, head-only."""
    known = family(on)
    return [known[name] for name in ("five", "child", "adapted", "sees-two", "none", "nine", "head-only")]


def plain_bits(on: FrozenBackbone) -> dict[str, list[bytes]]:
    return {name: bits(logits) for name, logits in CombinedModel(on, tasks_of(on))(images(3)).items()}


def same_bits(outputs: dict[str, Tensor], expected: dict[str, list[bytes]]) -> bool:
    assert outputs
    return all(bits(logits) == expected[name] for name, logits in outputs.items())
