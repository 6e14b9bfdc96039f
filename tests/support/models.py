"""Tiny backbones with non-uniform attention, tasks of many shapes on them, and a task's logits computed alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from timm.layers import GluMlp
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined import CombinedModel
from addenda.registry import Task
from tests.support.tasks import random_task
from tests.support.tiny import EVA, STAGED, tiny_eva, tiny_staged, tiny_vit

PRECISIONS = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

QUICK = ("plain", "dinov3", *STAGED)
"""Variants on which expensive tests run in the quick stage; the slow stage runs them on the others."""


def quick_first(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrises a test by variant; those not in QUICK are slow."""
    return pytest.mark.parametrize(
        "variant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]
    )


def in_both_precisions(names: Sequence[str]) -> pytest.MarkDecorator:
    """Like `quick_first`, also by precision; in bfloat16 all variants after the first are slow."""
    quick = [(name, torch.float32) for name in QUICK] + [(names[0], torch.bfloat16)]
    cases = [(name, precision) for name in names for precision in (torch.float32, torch.bfloat16)]
    return pytest.mark.parametrize(
        ("variant", "precision"),
        [
            pytest.param(
                *case, marks=() if case in quick else pytest.mark.slow, id=f"{case[0]}-{case[1]}".replace("torch.", "")
            )
            for case in cases
        ],
    )


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "registers": {"reg_tokens": 4},
    "layer-scale": {"init_values": 0.3},
    "qk-norm": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "clip": {"pre_norm": True, "qkv_bias": False},
    "deit3": {"no_embed_class": True, "init_values": 0.3},
    "dinov2": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.3},
    "no-position": {"pos_embed": "none"},
    "gate-last": {"mlp_layer": GluMlp},
    "average": {"global_pool": "avg"},
    "average-after-norm": {"global_pool": "avg", "fc_norm": False, "reg_tokens": 2},
    "gap": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "gap-registers": {"class_token": False, "global_pool": "avg", "reg_tokens": 1, "init_values": 0.3},
    "siglip": {"class_token": False, "global_pool": "map"},
    **{kind: {} for kind in EVA if kind != "eva"},
}


def lively_vit(variant: str = "plain") -> torch.nn.Module:
    """A tiny backbone in which every parameter matters; at initialisation, attention is nearly uniform."""
    if variant in STAGED:
        model = tiny_staged(variant, 1)
    else:
        model = tiny_eva(variant, 1) if variant in EVA else tiny_vit(1, **VARIANTS[variant])
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=random))
    return model


@cache
def backbone(variant: str = "plain", precision: torch.dtype = torch.float32) -> FrozenBackbone:
    return FrozenBackbone(lively_vit(variant), variant, "hub", precision=precision)


@cache
def wide_backbone(precision: torch.dtype) -> FrozenBackbone:
    """A backbone of 192 dimensions in 3 heads, like ViT-Ti."""
    return FrozenBackbone(tiny_vit(3, embed_dim=192, depth=2), "wide", "hub", precision=precision)


def images(count: int = 9, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def head_only(task: Task) -> Task:
    return dataclasses.replace(task, class_token=None, memory=None, pooled_weight=None, adapters=None)


@cache
def family(on: FrozenBackbone) -> dict[str, Task]:
    """Tasks of nine size classes: alone, no memory, one label, head-only, a chain, a diamond, adapters, layer heads.

    On a backbone that does not support adapters the tasks have none, and there are fewer size classes.
    """

    def task(name: str, memory: int, parents: Sequence[str] = (), **options: object) -> None:
        parent_tasks = tuple(known[parent] for parent in parents)
        known[name] = random_task(on, name, memory, parents=parent_tasks, seed=len(known), **options)

    known: dict[str, Task] = {}
    task("five", 5)
    task("none", 0)
    task("nine", 9, pooled=False)
    task("one-label", 5, classes=1)
    task("many-labels", 7, classes=12, pooled=False)
    task("child", 2, ["five"])
    task("sees-two", 3, ["none", "nine"])
    task("diamond", 1, ["child", "sees-two", "five"])
    task("bare-child", 0, ["none"], pooled=False)
    task("adapted", 5, rank=8)
    task("adapted-child", 0, ["adapted"], rank=3)
    task("sees-adapted", 4, ["adapted"], pooled=False)
    task("layers", 5, layers=0)
    task("low-rank-layers", 0, ["five"], layers=5, classes=12, pooled=False)
    known["layers-only"] = head_only(random_task(on, "layers-only", seed=98, layers=0))
    known["head-only"] = head_only(random_task(on, "head-only", seed=99))
    return known


def bits(logits: Tensor) -> list[bytes]:
    """The bytes of each image's logits; -0.0 and 0.0 differ."""
    return [row.numpy().tobytes() for row in logits]


def alone(on: FrozenBackbone, task: Task, pictures: Tensor) -> list[bytes]:
    """The bytes of a task's logits, computed without other tasks, one image at a time."""
    model = CombinedModel(on, [task])
    return [bits(model(picture.unsqueeze(0))[task.name])[0] for picture in pictures]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_registry(on: FrozenBackbone, count: int, seed: int) -> list[Task]:
    """Tasks of 0 to 40 memory tokens and 2 to 1,000 classes; a third extend up to three others, some are head-only.

    Three in ten have adapters of rank 1, 4 or 8, three in ten a layer head, some of low rank.
    """
    choose = random.Random(seed)
    tasks: list[Task] = []
    for number in range(count):
        possible = [task for task in tasks if task.class_token is not None and len(task.closure) < 12]
        parents = choose.sample(possible, min(len(possible), choose.choice((0, 0, 0, 0, 1, 2, 3))))
        memory = choose.choice((0, 5, 5, choose.randint(0, 40)))
        classes = round(2 * 500 ** choose.random())
        rank = choose.choice((0, 0, 0, 0, 0, 0, 0, 1, 4, 8))
        layers = choose.choice((None, None, None, None, None, None, None, 0, 0, 3))
        seed = choose.getrandbits(30)
        task = random_task(on, f"task-{number}", memory, classes, tuple(parents), seed, rank=rank, layers=layers)
        if choose.random() < 0.3:
            task = dataclasses.replace(task, pooled_weight=None)
        tasks.append(head_only(task) if choose.random() < 0.05 else task)
    return tasks


def assert_company_moves_no_bit(on: FrozenBackbone, task: Task, company: Sequence[Task]) -> None:
    """Asserts that a task's bits do not depend on the other tasks; the sabotage tests check that this can fail."""
    pictures = images(3)
    expected = alone(on, task, pictures)
    assert bits(CombinedModel(on, [task, *company])(pictures)[task.name]) == expected
    assert bits(CombinedModel(on, [*company, task])(pictures)[task.name]) == expected


def fresh_backbone() -> FrozenBackbone:
    """A backbone on which no self-test has run."""
    return FrozenBackbone(lively_vit(), "fresh", "hub")
