"""The losses, compared with those of torch, and balanced class weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from addenda.learner.objectives import OBJECTIVES, objective_of
from addenda.registry import probabilities

RANDOM = torch.Generator().manual_seed(0)
LOGITS = torch.randn(3, 20, 5, generator=RANDOM)  # three candidates, twenty images, five classes
CLASSES = torch.arange(20) % 5
TAGS = torch.rand(20, 5, generator=RANDOM) < 0.3
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1])


def loss(logits: torch.Tensor, targets: torch.Tensor, objective: str, *more: object, **options: object) -> torch.Tensor:
    return OBJECTIVES[objective].loss(logits, targets, *more, **options)


def balanced_weights(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    return objective_of(targets).balanced_weights(targets, num_classes)


@pytest.mark.parametrize("targets", [CLASSES.float(), TAGS.float(), TAGS.unsqueeze(0)], ids=["N", "N C", "1 N C"])
def test_targets_of_another_form_match_no_objective(targets: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not enough values to unpack"):
        objective_of(targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    expected = [F.cross_entropy(logits, CLASSES, label_smoothing=smoothing) for logits in LOGITS]
    assert torch.allclose(loss(LOGITS, CLASSES, "single-label", smoothing), torch.stack(expected))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_do_not_change_the_divisor_of_the_mean(smoothing: float) -> None:
    each = [F.cross_entropy(x, CLASSES, WEIGHTS, reduction="sum", label_smoothing=smoothing) / 20 for x in LOGITS]
    assert torch.allclose(loss(LOGITS, CLASSES, "single-label", smoothing, WEIGHTS), torch.stack(each))


def test_binary_cross_entropy_is_torchs_summed_over_labels() -> None:
    expected = [F.binary_cross_entropy_with_logits(x, TAGS.float(), reduction="sum") / 20 for x in LOGITS]
    assert torch.allclose(loss(LOGITS, TAGS, "multi-label"), torch.stack(expected))
    smooth = torch.where(TAGS, 0.95, 0.05)
    expected = [F.binary_cross_entropy_with_logits(x, smooth, reduction="sum") / 20 for x in LOGITS]
    assert torch.allclose(loss(LOGITS, TAGS, "multi-label", 0.1), torch.stack(expected))


def test_presence_and_absence_of_a_label_have_separate_weights() -> None:
    weights = torch.stack([torch.full((5,), 2.0), 2 * WEIGHTS])
    expected = [
        F.binary_cross_entropy_with_logits(x, TAGS.float(), pos_weight=WEIGHTS, reduction="sum") / 10 for x in LOGITS
    ]
    assert torch.allclose(loss(LOGITS, TAGS, "multi-label", class_weights=weights), torch.stack(expected))


@pytest.mark.parametrize(("targets", "objective"), [(CLASSES, "single-label"), (TAGS, "multi-label")])
def test_stacked_candidates_have_the_same_loss_and_gradient_as_alone(targets: torch.Tensor, objective: str) -> None:
    together = LOGITS.clone().requires_grad_()
    loss(together, targets, objective, 0.1).sum().backward()
    for i in range(3):
        alone = LOGITS[i].clone().requires_grad_()
        value = loss(alone, targets, objective, 0.1)
        assert value.shape == ()
        value.backward()
        assert torch.allclose(together.grad[i], alone.grad)


def test_a_very_wrong_prediction_has_a_finite_loss() -> None:
    logits = torch.tensor([[200.0, -200.0]])
    assert loss(logits, torch.tensor([[False, True]]), "multi-label") == 400
    assert loss(logits, torch.tensor([1]), "single-label") == 400


def test_the_gradient_of_a_head_row_does_not_shrink_with_the_number_of_labels() -> None:
    sizes = []
    for count in (2, 50):
        logits = torch.zeros(4, count, requires_grad=True)
        loss(logits, torch.ones(4, count).bool(), "multi-label").backward()
        sizes.append(logits.grad[:, 0].abs().sum().item())
    assert sizes[0] == pytest.approx(sizes[1])


def test_balanced_weights_give_each_class_the_same_sum_and_are_1_on_average() -> None:
    targets = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = balanced_weights(targets, 3)
    sums = [weights[targets[targets == c]].sum().item() for c in range(3)]
    assert sums == pytest.approx([10 / 3] * 3)
    assert weights[targets].mean().item() == pytest.approx(1)


def test_balanced_weights_of_labels_weigh_presence_against_absence() -> None:
    absent, present = balanced_weights(TAGS, 5)
    assert torch.allclose((TAGS * present).sum(0), torch.full((5,), 10.0))
    assert torch.allclose((~TAGS * absent).sum(0), torch.full((5,), 10.0))


def test_a_class_without_images_gets_a_finite_weight() -> None:
    assert balanced_weights(torch.tensor([0, 0, 2]), 4).tolist() == pytest.approx([3 / 8, 3 / 4, 3 / 4, 3 / 4])
    assert balanced_weights(torch.zeros(4, 1).bool(), 1).tolist() == [[0.5], [2.0]]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 17, 100])
def test_an_images_probabilities_have_the_same_bits_in_any_batch(objective: str, classes: int) -> None:
    logits = 5 * torch.randn(67, classes, generator=RANDOM)
    together = probabilities(logits, objective, 1.3)
    for size in (1, 2, 5, 8, 33):
        batches = [probabilities(batch, objective, 1.3) for batch in logits.split(size)]
        assert torch.equal(torch.cat(batches), together)


def test_a_multi_label_probability_is_the_sigmoid() -> None:
    logits = torch.tensor([[0.0, -200.0, 200.0, 1.5, -3.25]])
    computed = probabilities(logits, "multi-label")
    assert torch.allclose(computed, logits.sigmoid(), rtol=1e-6)
    assert computed[0, :3].tolist() == [0.5, 0.0, 1.0]
