"""The dense mask: its gradients match those of the cached token stream, and without the mask tasks interfere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from addenda import FrozenBackbone
from addenda.benchmarks.baselines.dense_mask import DenseMask
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.activations import Activations
from addenda.learner.data import open_images
from addenda.learner.token_stream import stream_features
from tests.learner.test_learner import noise
from tests.support.tasks import random_task
from tests.support.tiny import tiny_eva, tiny_vit


@pytest.mark.parametrize("make", [tiny_vit, lambda: tiny_eva("dinov3"), lambda: tiny_eva("eva02")])
def test_gradients_of_the_dense_mask_match_those_of_the_cached_token_stream(
    make: Callable[[], torch.nn.Module],
) -> None:
    tiny = FrozenBackbone(make(), "tiny", "hub")
    images, targets = noise(12)
    task = random_task(tiny, "task")
    assert task.class_token is not None
    assert task.memory is not None
    dense = DenseMask(tiny, [task])
    loss = F.cross_entropy(dense(images)["task"], targets)
    expected = torch.autograd.grad(loss, [dense.class_tokens[0], dense.memory[0]])
    data = open_images(torch.utils.data.TensorDataset(images, targets))
    batch = Activations(tiny, data, Augmentation(), ActivationCache()).batch(torch.arange(12))
    token, memory = task.class_token[None].requires_grad_(), task.memory[None].requires_grad_()
    logits = stream_features(tiny, batch, token, memory)[0] @ task.head_weight.T + task.head_bias
    assert task.pooled_weight is not None
    loss = F.cross_entropy(logits + batch.pooled @ task.pooled_weight.T, targets)
    gradients = torch.autograd.grad(loss, [token, memory])
    for gradient, dense_gradient in zip(gradients, expected, strict=True):
        # Cached activations are in half precision.
        assert (gradient[0] - dense_gradient).abs().max() < 0.02 * dense_gradient.abs().max()


def test_a_second_task_changes_the_first_only_without_the_mask(tiny: FrozenBackbone) -> None:
    images, _ = noise(3)
    first, second = random_task(tiny, "first", seed=1), random_task(tiny, "second", seed=2)
    for masked in (True, False):
        alone = DenseMask(tiny, [first], masked=masked)(images)["first"]
        together = DenseMask(tiny, [first, second], masked=masked)(images)["first"]
        assert torch.allclose(alone, together, rtol=1e-4, atol=1e-4) == masked
        changed = (alone - together).abs().max()
        assert masked or changed > 0.05


@pytest.mark.parametrize("make", [tiny_vit, lambda: tiny_eva("dinov3"), lambda: tiny_eva("eva02")])
def test_a_trainable_copy_starts_as_the_backbone_and_leaves_it_unchanged(make: Callable[[], torch.nn.Module]) -> None:
    tiny = FrozenBackbone(make(), "tiny", "hub")
    images, targets = noise(6)
    before = tiny.backbone_logits(images)
    model = tiny.trainable_copy(3)
    assert torch.equal(model.forward_features(images), tiny.model.forward_features(images))
    assert not model(images).any()
    F.cross_entropy(model(images), targets).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert model(images).any()
    assert torch.equal(tiny.backbone_logits(images), before)
    tiny.check_unchanged()
