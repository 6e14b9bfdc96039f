"""The router: chooses a task for each image from the tasks' feature statistics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from addenda import CombinedModel, FrozenBackbone
from addenda.combined import Router, feature_statistics
from addenda.combined.routing.classifiers import best_temperature
from addenda.combined.routing.router import REJECTED, _Distance
from addenda.combined.routing.statistics import HASHED, SAMPLE, Moments, hash_layers, joined_statistics
from addenda.exceptions import RegistryError, UnknownTaskError
from addenda.registry import FeatureStatistics
from addenda.registry.store.task_reader import MAX_BYTES
from tests.support.tasks import random_task

WIDTH = 16
CLASSIFIERS = ("nearest-mean", "mahalanobis", "ridge", "layers", "combined")


def cloud(task: int, count: int, seed: int, classes: int = 2, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features of a task's images: a Gaussian blob for each class."""
    centres = 3 * torch.randn(10 * classes, WIDTH, generator=torch.Generator().manual_seed(7))
    noise = torch.Generator().manual_seed(100 * task + seed)
    targets = torch.arange(count) % classes
    return centres[task * classes + targets] + spread * torch.randn(count, WIDTH, generator=noise), targets


def with_layers(pooled: Tensor) -> Tensor:
    """Pooled features and layer features of six vectors, which are rotations of the pooled feature."""
    rotations = torch.linalg.qr(torch.randn(6, WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))).Q
    return torch.cat([pooled, *(pooled @ rotation for rotation in rotations)], dim=1)


def task_statistics(tasks: int = 3, count: int = 60) -> dict[str, FeatureStatistics]:
    return {f"task-{i}": feature_statistics(*cloud(i, count, seed=0), num_classes=2) for i in range(tasks)}


def layer_statistics(tasks: int = 3, count: int = 60) -> dict[str, FeatureStatistics]:
    clouds = {f"task-{i}": cloud(i, count, seed=0) for i in range(tasks)}
    return {
        name: feature_statistics(pooled, targets, 2, with_layers(pooled)[:, WIDTH:])
        for name, (pooled, targets) in clouds.items()
    }


def without_layers(statistics: FeatureStatistics) -> FeatureStatistics:
    pooled = {name: tensor for name, tensor in statistics.tensors.items() if not name.startswith("layer_")}
    return FeatureStatistics(**pooled)


@pytest.mark.parametrize("layers", [True, False])
def test_joined_statistics_are_those_of_all_images_whatever_the_order_of_the_tasks(layers: bool) -> None:
    clouds = [cloud(i, 60, seed=i) for i in range(3)]
    classes = [(0, 1), (2, 0), (3, 2)]
    parts = [
        (feature_statistics(pooled, targets, 2, with_layers(pooled)[:, WIDTH:] if layers else None), becomes)
        for (pooled, targets), becomes in zip(clouds, classes, strict=True)
    ]
    joined = joined_statistics(parts, 4)
    joined.check(4)
    assert {joined_statistics(order, 4).sha256 for order in itertools.permutations(parts)} == {joined.sha256}
    pooled = torch.cat([pooled for pooled, _ in clouds])
    targets = torch.cat([torch.tensor(becomes)[rows] for (_, rows), becomes in zip(clouds, classes, strict=True)])
    expected = feature_statistics(pooled, targets, 4, with_layers(pooled)[:, WIDTH:] if layers else None)
    for name in ("counts", "sums", "gram", *(("layer_sums", "layer_gram") if layers else ())):
        torch.testing.assert_close(getattr(joined, name), getattr(expected, name), rtol=1e-5, atol=1e-3)
    sampled = {
        (row.numpy().tobytes(), becomes[target])
        for part, becomes in parts
        for row, target in zip(part.sample, part.sample_targets.tolist(), strict=True)
    }
    rows = (row.numpy().tobytes() for row in joined.sample)
    assert set(zip(rows, joined.sample_targets.tolist(), strict=True)) == sampled
    assert len(sampled) == 3 * 12
    mixed = joined_statistics([*parts[:2], (without_layers(parts[2][0]), parts[2][1])], 4)
    assert mixed.layers is None


def test_images_are_routed_to_the_task_with_similar_images() -> None:
    router = Router(task_statistics())
    for i in range(3):
        features, _ = cloud(i, 100, seed=1)
        chosen = router.choose(features)
        assert sum(choice.task == f"task-{i}" for choice in chosen) >= 95
        assert all(1 / 3 <= choice.probability <= 1 for choice in chosen)


def test_every_classifier_separates_the_classes() -> None:
    router, tested = Router(layer_statistics()), set()
    for i in range(3):
        features, targets = cloud(i, 100, seed=1)
        for classifier, scores in router.class_scores(with_layers(features)).items():
            assert list(scores) == ["task-0", "task-1", "task-2"]
            predicted = torch.cat(list(scores.values()), dim=1).argmax(1)
            assert (predicted == 2 * i + targets).float().mean() > 0.9
            tested.add(classifier)
    assert tested == set(CLASSIFIERS)


def test_probabilities_add_up_to_one() -> None:
    router = Router(task_statistics())
    features = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))  # between all classes
    of_tasks = torch.stack(list(router.log_probabilities(features).values())).exp()
    torch.testing.assert_close(of_tasks.sum(0), torch.ones(10, dtype=torch.float64))
    within = {name: torch.randn(10, 2).log_softmax(1) for name in router.tasks}
    routed = router.routed(within, features)
    torch.testing.assert_close(
        torch.cat(list(routed.values()), dim=1).exp().sum(1), torch.ones(10, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_the_same_tasks_in_any_order_give_the_same_bits() -> None:
    statistics = layer_statistics()
    features = with_layers(cloud(1, 20, seed=1)[0])
    results = []
    for order in itertools.permutations(statistics):
        router = Router({name: statistics[name] for name in order})
        assert router.tasks == order
        scores = router.class_scores(features)
        bits = [scores[kind][name].numpy().tobytes() for kind in CLASSIFIERS for name in sorted(statistics)]
        results.append((bits, router.familiarity(features).numpy().tobytes()))
    assert len(results) == 6
    assert all(result == results[0] for result in results)


def test_choices_name_the_same_task_in_any_order() -> None:
    statistics = task_statistics()
    features, _ = cloud(2, 50, seed=1)
    for order in itertools.permutations(statistics):
        chosen = Router({name: statistics[name] for name in order}).choose(features)
        assert sum(choice.task == "task-2" for choice in chosen) >= 45


def test_a_router_of_one_task_with_one_class_chooses_it() -> None:
    features, _ = cloud(0, 40, seed=0)
    choices = Router({"only": feature_statistics(features, torch.zeros(40, dtype=torch.long), 1)}).choose(features[:5])
    assert [(choice.task, choice.probability) for choice in choices] == [("only", 1.0)] * 5


def test_certainty_is_limited_where_all_held_out_images_are_right() -> None:
    scores = 100.0 * torch.eye(4, dtype=torch.float64)
    loss, temperature = best_temperature(scores, torch.arange(4))
    probabilities = (scores / temperature).softmax(1).diagonal()
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 0.8), rtol=1e-3, atol=0)
    assert 0 < loss < 1


@pytest.mark.parametrize("layers", [False, True])
def test_images_of_no_task_are_unfamiliar(layers: bool) -> None:
    router = Router((layer_statistics if layers else task_statistics)(count=400))
    own, other = (torch.cat([cloud(i, 200, seed=1)[0] for i in tasks]) for tasks in ((0, 1, 2), (5, 6, 7)))
    if layers:
        own, other = with_layers(own), with_layers(other)
    rejected = [not choice.familiar for choice in router.choose(own)]
    assert sum(rejected) < 3 * REJECTED * len(rejected)
    assert sum(not choice.familiar for choice in router.choose(other)) > 0.7 * len(other)


@pytest.mark.parametrize("per_class", [3, 5, 10, 30])
def test_a_task_rejects_one_in_twenty_unseen_images_or_one_more_than_its_sample(per_class: int) -> None:
    rejected, foreign, num_classes = [], [], 6
    for seed in range(6):
        pooled, targets = cloud(0, per_class * num_classes, seed, num_classes)
        statistics = feature_statistics(pooled, targets, num_classes, with_layers(pooled)[:, WIDTH:])
        router = Router({"own": statistics})
        expected = max(REJECTED, 1 / (len(statistics.sample) + 1))
        for images, task in ((rejected, 0), (foreign, 1)):
            choices = router.choose(with_layers(cloud(task, 300, 50 + seed, num_classes)[0]))
            images.append(sum(not choice.familiar for choice in choices) / len(choices))
    assert 0.4 * expected < np.mean(rejected) < 2 * expected
    assert np.mean(foreign) > 0.8


def test_the_threshold_of_a_varied_task_does_not_depend_on_other_tasks_with_less_spread() -> None:
    rejected = torch.zeros(2)
    for seed in (0, 1, 2):
        varied, plain = cloud(0, 60, seed, 6), cloud(1, 360, seed, 6, spread=0.3)
        router = Router({"varied": feature_statistics(*varied, 6), "plain": feature_statistics(*plain, 6)})
        for task, spread in enumerate((1.0, 0.3)):
            choices = router.choose(cloud(task, 300, 50, 6, spread)[0])
            rejected[task] += sum(not choice.familiar for choice in choices) / len(choices) / 3
    assert ((rejected > 0.01) & (rejected < 0.15)).all()


def test_a_task_without_sampled_images_is_familiar_with_every_image_that_it_is_chosen_for() -> None:
    few, many = feature_statistics(*cloud(0, 4, 0, spread=1.5), 2), feature_statistics(*cloud(1, 200, 0, spread=0.3), 2)
    choices = Router({"few": few, "many": many}).choose(cloud(0, 50, 1, spread=1.5)[0])
    assert sum(choice.task == "few" for choice in choices) > 40
    assert all(choice.familiar for choice in choices if choice.task == "few")


@pytest.mark.parametrize("num_classes", [1, 4])
def test_an_image_that_is_left_out_has_its_distance_to_a_fit_without_it(num_classes: int) -> None:
    pooled, targets = cloud(0, 5 * num_classes, 0, 4)[0].double(), torch.arange(5 * num_classes) % num_classes
    one_hot = torch.nn.functional.one_hot(targets).double()
    moments = Moments(one_hot.sum(0), one_hot.T @ pooled, pooled.T @ pooled)
    left_out = _Distance(moments).left_out(pooled, targets)
    refits = [_Distance(moments.without(pooled[[i]], targets[[i]]))(pooled[[i]]) for i in range(len(pooled))]
    torch.testing.assert_close(left_out, torch.cat(refits), rtol=1e-8, atol=1e-8)


def test_the_distance_is_the_formulas() -> None:
    pooled, targets = cloud(0, 30, 0, 3)
    statistics = feature_statistics(pooled, targets, 3)
    moments = Moments.sum([statistics.counts], [statistics.sums], [statistics.gram]).first(WIDTH)
    means = torch.stack([pooled[targets == label].double().mean(0) for label in range(3)])
    deviation = pooled.double() - means[targets]
    covariance = deviation.T @ deviation / 30
    inverse = torch.linalg.inv(covariance + covariance.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64))
    between = pooled.double()[:, None] - means
    expected = torch.einsum("bcf,fg,bcg->bc", between, inverse, between).amin(1)
    torch.testing.assert_close(_Distance(moments)(pooled.double()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_class", [1, 2, 3])
def test_images_without_any_spread_are_routed(per_class: int) -> None:
    targets = torch.arange(4 * per_class) % 4
    statistics = feature_statistics(torch.eye(4, WIDTH)[targets], targets, 4)
    choices = Router({"points": statistics, "other": task_statistics(1)["task-0"]}).choose(torch.eye(4, WIDTH))
    assert [choice.task for choice in choices] == ["points"] * 4
    assert Router({"points": statistics}).familiarity(torch.eye(4, WIDTH)).isfinite().all()


def test_sums_are_those_of_the_features() -> None:
    features, targets = cloud(0, 40, seed=0)
    statistics = feature_statistics(features, targets, num_classes=3)
    assert statistics.counts.tolist() == [20, 20, 0]
    expected = torch.stack([features[targets == label].double().sum(0) for label in range(3)])
    torch.testing.assert_close(statistics.sums[:, :WIDTH].double(), expected, rtol=1e-6, atol=1e-6)
    width = statistics.sums.shape[1]
    gram = torch.zeros(width, width)
    rows, columns = torch.triu_indices(width, width)
    gram[rows, columns] = statistics.gram
    torch.testing.assert_close(gram[:WIDTH, :WIDTH].triu(), (features.T @ features).triu(), rtol=1e-5, atol=1e-4)


def test_layer_features_are_scaled_signed_and_added_in_groups() -> None:
    layers = torch.randn(5, 10 * WIDTH * 8, generator=torch.Generator().manual_seed(0))
    hashed = hash_layers(layers, WIDTH)
    assert hashed.shape == (5, HASHED)
    vectors = layers.double().unflatten(1, (-1, WIDTH))
    unit = (vectors / vectors.norm(dim=2, keepdim=True)).flatten(1)
    random, matrix = np.random.RandomState(0), np.zeros((unit.shape[1], HASHED))
    order, signs = random.permutation(unit.shape[1]), random.choice([-1.0, 1.0], unit.shape[1])
    matrix[order, np.arange(unit.shape[1]) % HASHED] = signs[order]
    torch.testing.assert_close(hashed, unit @ torch.from_numpy(matrix), rtol=1e-12, atol=1e-12)


def test_layer_features_separate_what_the_pooled_feature_cannot() -> None:
    random = torch.Generator().manual_seed(1)
    statistics, tests = {}, {}
    for i, name in enumerate(("left", "right")):
        pooled, targets = torch.randn(160, WIDTH, generator=random), torch.arange(160) % 2
        layers = torch.randn(160, 8 * WIDTH, generator=random) + (4 * i - 2)
        statistics[name] = feature_statistics(pooled[:80], targets[:80], 2, layers[:80])
        tests[name] = torch.cat([pooled, layers], dim=1)[80:]
    router = Router(statistics)
    assert all(sum(choice.task == name for choice in router.choose(images)) >= 78 for name, images in tests.items())
    # One task has the statistics of an earlier version: no classifier reads the layers.
    mixed = Router({"left": statistics["left"], "right": without_layers(statistics["right"])})
    assert "layers" not in mixed.class_scores(tests["left"])
    assert any(sum(choice.task == name for choice in mixed.choose(images)) < 78 for name, images in tests.items())


def test_layer_statistics_leave_the_others_as_they_were_and_are_left_out_where_they_do_not_fit() -> None:
    pooled, targets = torch.randn(40, 768), torch.arange(40) % 4
    layers = torch.randn(40, 33 * 768)
    both, plain = (feature_statistics(pooled, targets, 4, given) for given in (layers, None))
    assert both.layers is not None
    assert without_layers(both).data == plain.data
    assert len(both.data) < MAX_BYTES
    many = torch.arange(400)
    assert feature_statistics(torch.randn(400, 768), many, 400, torch.randn(400, 33 * 768)).layers is None


def test_the_sample_is_small_and_leaves_an_image_of_each_class() -> None:
    many, targets = cloud(0, 1000, seed=0)
    assert len(feature_statistics(many, targets, num_classes=2).sample) == SAMPLE
    few = torch.randn(10, WIDTH)
    statistics = feature_statistics(few, torch.tensor([0, 1, 2, 3, 4, 4, 4, 4, 4, 4]), num_classes=5)
    assert statistics.sample_targets.tolist() == [4]
    assert all(any(torch.equal(row, image) for image in few) for row in statistics.sample)


def test_a_router_of_tasks_too_small_for_a_sample_works() -> None:
    statistics = {f"task-{i}": feature_statistics(*cloud(i, 4, seed=0), num_classes=2) for i in range(2)}
    assert all(len(task.sample) == 0 for task in statistics.values())
    features, _ = cloud(1, 20, seed=1)
    assert sum(choice.task == "task-1" for choice in Router(statistics).choose(features)) >= 18


@pytest.mark.parametrize("width", [64, 192, 384, 768, 1024])
def test_statistics_of_ten_classes_are_below_the_size_limit(width: int) -> None:
    features = torch.randn(400, width, generator=torch.Generator().manual_seed(0))
    statistics = feature_statistics(features, torch.arange(400) % 10, num_classes=10)
    assert statistics.excess is None
    assert len(statistics.data) < MAX_BYTES


def test_a_router_without_tasks_or_of_different_features_is_refused() -> None:
    with pytest.raises(RegistryError, match=r"requires routing statistics of one \(pooled, expanded\) width, not \{\}"):
        Router({})
    other = feature_statistics(torch.randn(20, 8), torch.arange(20) % 2, num_classes=2)
    with pytest.raises(RegistryError, match=r"'task-0': \(16, 64\), 'other': \(8, 32\)"):
        Router({**task_statistics(1), "other": other})


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(UnknownTaskError, match=r"Task 'cats' is not in this router\. Known: task-0, task-1, task-2"):
        Router(task_statistics()).routed({"cats": torch.zeros(1, 2)}, torch.zeros(1, WIDTH))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_model_returns_the_features_without_changing_logits(tiny: FrozenBackbone, pooled: bool) -> None:
    tasks = [random_task(tiny, f"task-{i}", seed=i, pooled=pooled) for i in range(3)]
    model = CombinedModel(tiny, tasks)
    images = torch.randn(11, 3, 32, 32)
    plain, with_features = model(images), model(images, features=True)
    assert plain.features is None
    assert with_features.features is not None
    assert with_features.features.shape == (11, tiny.embed_dim + tiny.num_layer_features)
    assert all(plain[name].numpy().tobytes() == with_features[name].numpy().tobytes() for name in plain)
    alone = CombinedModel(tiny, [])(images, features=True)
    assert with_features.features.numpy().tobytes() == alone.features.numpy().tobytes()
