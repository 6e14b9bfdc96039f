"""The validation split: seeded, and every class is in both splits wherever that is possible."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from addenda.exceptions import DataError
from addenda.learner.objectives import MultiLabel, SingleLabel, objective_of


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
    if targets.ndim == 2 and sides[:, sides.sum(0) == 1].any(1).all():
        with pytest.raises(DataError, match=f"None of the {len(targets)} images can be held out for validation"):
            split(targets, fraction, seed)
        return
    train, validation = split(targets, fraction, seed)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(targets)))
    assert (sides[train].sum(0) >= 1)[sides.sum(0) >= 1].all()
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


@pytest.mark.slow
def test_a_multi_label_split_validates_as_many_labels_as_possible() -> None:
    random, possible, impossible = np.random.default_rng(0), 0, 0
    for seed in range(500):
        num_images, num_labels = random.integers(4, 10), random.integers(2, 7)
        has = random.random((num_images, num_labels)) < random.uniform(0.1, 0.6)
        sides = np.concatenate([has, ~has], axis=1)
        if sides[:, sides.sum(0) == 1].any(1).all():
            continue
        fraction = random.choice([0.1, 0.2, 0.5])
        train, validation = (rows.numpy() for rows in split(torch.from_numpy(has), fraction, seed))
        held_out = np.array(list(product((False, True), repeat=int(num_images))))  # every division into two
        held_out = held_out[((~held_out).astype(int) @ sides > 0)[:, sides.any(0)].all(1)]
        most = (held_out.astype(int) @ has > 0)[:, has.sum(0) > 1].sum(1).max()
        assert sides[train].any(0)[sides.any(0)].all()
        assert has[validation].any(0)[has.sum(0) > 1].sum() == most
        possible += most == (has.sum(0) > 1).sum()
        impossible += most < (has.sum(0) > 1).sum()
    assert possible > 200
    assert impossible > 10


@pytest.mark.slow
def test_a_label_lacks_validation_images_only_if_training_can_spare_none() -> None:
    for seed in range(2500):
        random = np.random.default_rng(seed)
        has = random.random((random.integers(10, 60), random.integers(2, 9))) < random.uniform(0.02, 0.6)
        sides = np.concatenate([has, ~has], axis=1)
        if sides[:, sides.sum(0) == 1].any(1).all():
            continue
        train, validation = (rows.numpy() for rows in split(torch.from_numpy(has), seed=seed))
        num_training = sides[train].sum(0)
        assert num_training[sides.any(0)].all()
        for label in np.flatnonzero(~has[validation].any(0)):
            assert sides[has[:, label]][:, num_training == 1].any(1).all()


def test_a_label_on_five_of_eleven_images_is_validated() -> None:
    rows = [(0, 1, 0)] * 2 + [(1, 1, 0), (1, 1, 1), (1, 0, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0)]
    targets = torch.tensor([*rows, (1, 1, 1)], dtype=torch.bool)
    assert targets[split(targets)[1]].any(0).all()


def in_groups(sizes: list[int], classes: list[int]) -> tuple[torch.Tensor, list[str]]:
    """The targets and the groups of images, from each group's size and class."""
    targets = torch.tensor([label for size, label in zip(sizes, classes, strict=True) for _ in range(size)])
    return targets, [f"group {i}" for i, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("seed", range(3))
def test_each_class_of_three_groups_has_one_in_validation(seed: int) -> None:
    targets, groups = in_groups([10] * 30, [i // 3 for i in range(30)])
    for of_objective in (targets, torch.eye(10)[targets].bool()):
        _, validation = objective_of(of_objective).split(of_objective, 10, 0.2, seed, groups)
        assert targets[validation].bincount(minlength=10).tolist() == [10] * 10


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.4, 0.6, 0.8, 0.9])
def test_the_fraction_holds_for_groups_of_several_classes(fraction: float) -> None:
    groups = [f"group {row // 2}" for row in range(200)]
    _, validation = SingleLabel().split(torch.arange(200) % 2, 2, fraction, 0, groups)
    assert len(validation) == 200 * fraction


def test_a_large_group_does_not_move_the_fraction() -> None:
    groups = ["large" if row < 42 else f"group {row // 4}" for row in range(100)]
    for seed in range(10):
        _, validation = SingleLabel().split(torch.arange(100) % 2, 2, 0.2, seed, groups)
        assert len(validation) == 20


def test_the_seed_and_not_the_order_of_images_fixes_a_split_and_folds_of_groups() -> None:
    random = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 4, (200,), generator=random)
    groups = [f"group {row // 5}" for row in range(200)]
    order = torch.randperm(200, generator=random)
    moved = [groups[row] for row in order.tolist()]

    def held_out(seed: int) -> set[int]:
        return set(SingleLabel().split(targets, 4, 0.2, seed, groups)[1].tolist())

    _, validation = SingleLabel().split(targets[order], 4, 0.2, 1, moved)
    assert set(order[validation].tolist()) == held_out(1) != held_out(2)
    folds = SingleLabel().folds(targets, 1, groups)
    assert torch.equal(SingleLabel().folds(targets[order], 1, moved), folds[order])
    assert not torch.equal(SingleLabel().folds(targets, 2, groups), folds)


@pytest.mark.parametrize("objective", [SingleLabel(), MultiLabel()], ids=lambda objective: objective.name)
def test_every_class_of_two_groups_is_in_both_splits_and_in_two_folds(objective: SingleLabel | MultiLabel) -> None:
    cases = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        num_classes, num_groups = int(random.integers(2, 8)), int(random.integers(16, 60))
        targets, groups = in_groups(
            random.integers(1, 15, num_groups).tolist(), random.integers(0, num_classes, num_groups).tolist()
        )
        mixed = torch.from_numpy(random.random(len(targets)) < random.choice([0, 0.2]))
        targets = torch.where(mixed, torch.from_numpy(random.integers(0, num_classes, len(targets))), targets)
        labels = torch.eye(num_classes)[targets].bool() if isinstance(objective, MultiLabel) else targets
        train, validation = objective.split(labels, num_classes, float(random.choice([0.05, 0.2, 0.7])), seed, groups)
        folds = objective.folds(labels, seed, groups)
        for label in targets.unique().tolist():
            if len({groups[row] for row in (targets == label).nonzero()[:, 0].tolist()}) > 1:
                cases += 1
                assert (targets[train] == label).any()
                assert (targets[validation] == label).any()
                assert len(folds[targets == label].unique()) > 1
    assert cases > 500


def test_folds_of_groups_have_a_fifth_of_each_class() -> None:
    for seed in range(10):
        random = np.random.default_rng(seed)
        targets, groups = in_groups(random.integers(1, 30, 150).tolist(), [i % 3 for i in range(150)])
        per_fold = torch.bincount(5 * targets + SingleLabel().folds(targets, seed, groups), minlength=15).view(3, 5)
        assert ((per_fold / per_fold.sum(1, keepdim=True) - 0.2).abs() < 0.02).all()
