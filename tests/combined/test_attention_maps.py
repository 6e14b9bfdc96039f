"""Attention maps, compared with an independent implementation of the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from addenda import FrozenBackbone, Task
from addenda.combined import attention_map
from addenda.exceptions import RegistryError
from tests.support.tasks import random_task
from tests.support.tiny import tiny_eva, tiny_vit


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def by_the_formula(backbone: FrozenBackbone, task: Task, pixels: torch.Tensor) -> torch.Tensor:
    """Attention maps computed for one image at a time, with all keys of a task concatenated."""
    maps = []
    for image in pixels.split(1):
        hidden = {kin.sha256: backbone.first_tokens(kin.class_token[None])[None] for kin in (*task.closure, task)}
        for layer, frozen in enumerate(backbone.stream(image)):
            block = backbone.blocks[layer]
            own = {sha: backbone.family.project(block, tokens) for sha, tokens in hidden.items()}
            next_hidden = {}
            for member in (*task.closure, task):
                family = (member, *member.closure)
                rows = [
                    backbone.family.project(block, kin.memory[None, layer]) for kin in family if kin.num_memory_tokens
                ]
                keys = torch.cat([frozen.keys, *(own[kin.sha256][1] for kin in family), *(r[1] for r in rows)], dim=2)
                values = torch.cat(
                    [frozen.values, *(own[kin.sha256][2] for kin in family), *(r[2] for r in rows)], dim=2
                )
                query = own[member.sha256][0]
                scores = (query @ keys.transpose(-1, -2))[0, :, 0] / query.shape[-1] ** 0.5  # [H, K]
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                read = (weights[:, None] @ values[0]).reshape(1, 1, -1)
                next_hidden[member.sha256] = backbone.family.finish(block, hidden[member.sha256], read)
            hidden = next_hidden
        patches = backbone.model.patch_embed.num_patches
        first = frozen.keys.shape[2] - patches
        maps.append(weights.mean(0)[first : first + patches].reshape(4, 4))
    return torch.stack(maps)


@pytest.mark.parametrize("made", [tiny_vit, lambda: tiny_vit(reg_tokens=2), lambda: tiny_eva("dinov3")])
def test_the_map_is_the_softmax_over_all_visible_keys(made: Callable[[], torch.nn.Module]) -> None:
    backbone = FrozenBackbone(made(), "tiny", "hub")
    grandparent = random_task(backbone, "grandparent", memory=3, seed=1)
    parent = random_task(backbone, "parent", memory=0, parents=(grandparent,), seed=2)
    child = random_task(backbone, "child", parents=(parent,), seed=3)
    for task in (grandparent, parent, child):
        maps, expected = attention_map(backbone, task, images()), by_the_formula(backbone, task, images())
        assert maps.shape == (3, 4, 4)
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)
        assert (maps.sum((1, 2)) < 1).all()


def test_a_map_depends_on_the_image(tiny: FrozenBackbone) -> None:
    maps = attention_map(tiny, random_task(tiny, "digits"), images())
    assert (maps[0] - maps[1]).abs().max() > 1e-3


def test_a_head_only_task_has_no_attention_map(tiny: FrozenBackbone) -> None:
    head_only = Task("plain", tiny.fingerprint, ("a", "b"), torch.zeros(2, 48), torch.zeros(2))
    with pytest.raises(RegistryError, match="Task 'plain' is head-only: without class token there is no attention map"):
        attention_map(tiny, head_only, images())
