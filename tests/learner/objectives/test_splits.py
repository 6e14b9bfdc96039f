"""The validation split: seeded, and no class is lost from training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from addenda.learner.objectives import objective_of


def tags(count: int, chances: list[float], seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(count, len(chances), generator=random) < torch.tensor(chances)


def split(targets: torch.Tensor, fraction: float = 0.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    num_classes = int(targets.max()) + 1 if targets.ndim == 1 else targets.shape[1]
    return objective_of(targets).split(targets, num_classes, fraction, seed)


def test_a_single_label_split_is_scikit_learns() -> None:
    targets = torch.arange(50) % 3
    expected = train_test_split(range(50), test_size=10, stratify=targets.tolist(), random_state=4)
    assert [rows.tolist() for rows in split(targets, seed=4)] == expected


@settings(deadline=None, max_examples=60, database=None)
@given(st.data())
def test_each_image_is_in_one_split_and_every_class_of_two_is_in_both(data: st.DataObject) -> None:
    fraction, seed = data.draw(st.floats(0.05, 0.95)), data.draw(st.integers(0, 9))
    if data.draw(st.booleans()):
        counts = [2, *data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))]
        targets = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
        sides = torch.nn.functional.one_hot(targets).bool()
    else:
        chances = data.draw(st.lists(st.floats(0.02, 0.98), min_size=1, max_size=8))
        targets = tags(data.draw(st.integers(2, 60)), chances, seed)
        sides = torch.cat([targets, ~targets], dim=1)
    train, validation = split(targets, fraction, seed)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(targets)))
    assert (sides[train].sum(0) >= 1)[sides.sum(0) >= 2].all()
    if targets.ndim == 1:
        assert (sides[validation].sum(0) >= 1)[sides.sum(0) >= 2].all()
        assert not sides[validation].sum(0)[sides.sum(0) == 1].any()


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_stratified_by_the_fraction(seed: int) -> None:
    targets = tags(500, [0.5, 0.2, 0.1, 0.03, 0.95], seed)
    _, validation = split(targets, 0.2, seed)
    assert abs(len(validation) - 100) <= 3
    wanted = 0.2 * targets.sum(0)
    assert ((targets[validation].sum(0) - wanted).abs() <= 2).all()


def test_a_label_on_two_images_is_in_training_and_validation() -> None:
    targets = torch.zeros(100, 3).bool()
    targets[[3, 50], 0] = True
    targets[::2, 1] = True
    targets[[7, 8], 2] = True
    for seed in range(5):
        train, validation = split(targets, 0.2, seed)
        assert targets[train].sum(0)[[0, 2]].tolist() == [1, 1]
        assert targets[validation].sum(0)[[0, 2]].tolist() == [1, 1]


@pytest.mark.parametrize("targets", [torch.arange(80) % 4, tags(80, [0.3, 0.5, 0.1], 0)], ids=["single", "multi"])
def test_the_seed_fixes_the_split(targets: torch.Tensor) -> None:
    first, again, other = (split(targets, seed=seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_class_too_small_for_the_fraction_is_in_validation_too() -> None:
    targets = torch.tensor([0] * 200 + [1, 1, 2, 2, 3, 3, 3])
    for seed in range(20):
        _, validation = split(targets, seed=seed)
        assert set(targets[validation].tolist()) == {0, 1, 2, 3}


def test_a_small_class_drawn_for_validation_stays_in_training_too() -> None:
    targets = torch.tensor([0] * 40 + [1, 1])
    for fraction in (0.8, 0.9):
        train, validation = split(targets, fraction)
        assert 1 in targets[train]
        assert len(train) + len(validation) == 42
