"""The yardstick as something to train: its gradients are the cached stream's, and without its mask all is moved."""

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


@pytest.mark.parametrize("made", [tiny_vit, lambda: tiny_eva("dinov3"), lambda: tiny_eva("eva02")])
def test_training_by_the_dense_mask_follows_the_gradients_of_the_cached_stream(
    made: Callable[[], torch.nn.Module],
) -> None:
    tiny = FrozenBackbone(made(), "tiny", "hub")
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
    found = torch.autograd.grad(F.cross_entropy(logits + batch.pooled @ task.pooled_weight.T, targets), [token, memory])
    for one, other in zip(found, expected, strict=True):
        assert (one[0] - other).abs().max() < 0.02 * other.abs().max()  # activations are kept in half precision


def test_without_the_mask_a_task_is_moved_by_its_neighbour_and_with_it_is_not(tiny: FrozenBackbone) -> None:
    images, _ = noise(3)
    one, other = random_task(tiny, "one", seed=1), random_task(tiny, "other", seed=2)
    for masked in (True, False):
        alone = DenseMask(tiny, [one], masked=masked)(images)["one"]
        together = DenseMask(tiny, [one, other], masked=masked)(images)["one"]
        assert torch.allclose(alone, together, rtol=1e-4, atol=1e-4) == masked
        changed = (alone - together).abs().max()
        assert masked or changed > 0.05


@pytest.mark.parametrize("made", [tiny_vit, lambda: tiny_eva("dinov3"), lambda: tiny_eva("eva02")])
def test_a_trainable_copy_starts_as_the_backbone_and_leaves_it_as_it_is(made: Callable[[], torch.nn.Module]) -> None:
    tiny = FrozenBackbone(made(), "tiny", "hub")
    images, targets = noise(6)
    before = tiny.backbone_logits(images)
    copied = tiny.trainable_copy(3)
    assert torch.equal(copied.forward_features(images), tiny.model.forward_features(images))
    assert not copied(images).any()
    F.cross_entropy(copied(images), targets).backward()
    torch.optim.SGD(copied.parameters(), lr=1.0).step()
    assert copied(images).any()
    assert torch.equal(tiny.backbone_logits(images), before)
    tiny.check_unchanged()
