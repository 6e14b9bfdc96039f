"""A task grows by classes and images without its earlier images, and its earlier version stays as it is."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from addenda import CombinedModel, FrozenBackbone, LearnConfig, Learner, Registry, Task
from addenda.combined import Router, feature_statistics, golden, verify
from addenda.combined.routing.statistics import SAMPLE, added, hash_layers, known_classes, unsampled_classes
from addenda.exceptions import BackboneError, DataError, RegistryError
from addenda.learner.closed_form import _on_layers, closed_form
from addenda.learner.objectives import accuracy
from addenda.registry import FeatureStatistics
from tests.support.images import colour_folder
from tests.support.tiny import tiny_vit

PROBE = LearnConfig(head_only=True)
WIDTH, VECTORS = 16, 60


@pytest.fixture
def learner(tiny: FrozenBackbone, registry: Registry) -> Learner:
    return Learner(tiny, registry)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Folders of all three colours, of the first two and of the third alone, and test images of all."""
    everything = colour_folder(tmp_path / "all", per_class=12)
    for part, classes in {"first": ("blue", "green"), "more": ("red",)}.items():
        for name in classes:
            shutil.copytree(everything / name, tmp_path / part / name)
    colour_folder(tmp_path / "test", per_class=10, seed=1)
    return tmp_path


@pytest.fixture
def grown(learner: Learner, colours: Path) -> Task:
    learner.learn("colours", colours / "first", config=PROBE)
    return learner.grow("colours", colours / "more", colours / "test")


def images_of(classes: int, seed: int, count: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled features, layer features whose vectors have different lengths, and targets."""
    means = torch.randn(classes, (VECTORS + 1) * WIDTH, generator=torch.Generator().manual_seed(1))
    random, targets = torch.Generator().manual_seed(seed), torch.arange(classes * count) % classes
    features = 1.5 + means[targets] + 1.5 * torch.randn(len(targets), means.shape[1], generator=random)
    lengths = 1 + 0.2 * torch.randn(len(targets), VECTORS, 1, generator=random)
    return features[:, :WIDTH], (features[:, WIDTH:].unflatten(1, (VECTORS, WIDTH)) * lengths).flatten(1), targets


def statistics_of(
    pooled: Tensor, layers: Tensor, targets: Tensor, num_classes: int, earlier: FeatureStatistics | None = None
) -> FeatureStatistics:
    digests = [f"{hash(tuple(row)) % 2**64:016x}" for row in pooled.tolist()]
    return feature_statistics(pooled, targets, num_classes, layers, digests, earlier)


def in_steps(*, steps: list[list[int]], classes: int = 6, seed: int = 0) -> FeatureStatistics:
    """Statistics that grow by the given classes at each step, which take the next positions."""
    pooled, layers, targets = images_of(classes, seed, count=70)
    grown, position = None, torch.zeros(classes, dtype=torch.long)
    for start, step in zip(range(len(steps)), steps, strict=True):
        first = sum(map(len, steps[:start]))
        position[step] = torch.arange(first, first + len(step))
        rows = torch.isin(targets, torch.tensor(step))
        grown = statistics_of(pooled[rows], layers[rows], position[targets[rows]], first + len(step), grown)
    assert grown is not None
    return grown


def test_the_next_version_knows_all_classes_and_the_earlier_one_keeps_its_bytes(
    learner: Learner, registry: Registry, tiny: FrozenBackbone, colours: Path
) -> None:
    first = learner.learn("colours", colours / "first", config=PROBE)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = CombinedModel(tiny, [first])(images)["colours"].numpy().tobytes()
    statistics = registry.statistics("colours:1")
    assert statistics is not None
    before = statistics.data
    grown = learner.grow("colours", colours / "more", colours / "test")
    assert (grown.ref, grown.labels) == ("colours:2", ("blue", "green", "red"))
    again, after = registry.get("colours:1"), registry.statistics("colours:1")
    assert after is not None
    assert (again.sha256, after.data) == (first.sha256, before)
    assert CombinedModel(tiny, [again])(images)["colours"].numpy().tobytes() == logits
    assert grown.metrics["test"]["accuracy"] > 0.9
    assert min(grown.metrics["test"]["per_class"].values()) > 0.7
    assert grown.metrics["validation"]["num_images"] == 6
    assert grown.metrics["validation"]["accuracy"] > 0.6
    verdicts = verify(tiny, [(task, registry.goldens(task.ref)) for task in (again, grown)])
    assert all(verdict.identical for verdict in verdicts)


def test_the_next_version_says_what_it_was_grown_from(grown: Task, registry: Registry) -> None:
    first = registry.get("colours:1")
    assert grown.data["grown_from"] == {"version": 1, "sha256": first.sha256, "added": 12, "known": 0}
    assert (grown.data["num_images"], grown.data["counts"]) == (36, [12, 12, 12])
    assert registry.record("colours").grown_from == "colours:1"
    assert registry.record("colours:1").grown_from is None


def test_labels_keep_their_positions_and_new_ones_follow_in_sorted_order(learner: Learner, colours: Path) -> None:
    learner.learn("colours", colours / "more", config=PROBE)
    assert learner.grow("colours", colours / "first").labels == ("red", "blue", "green")


def test_learning_in_steps_gives_the_head_of_learning_at_once(tiny: FrozenBackbone) -> None:
    at_once, steps = in_steps(steps=[[0, 1, 2, 3, 4, 5]]), in_steps(steps=[[0, 1], [2, 3], [4, 5]])
    for name in ("counts", "sample", "sample_targets", "layer_sample", "digests"):
        assert torch.equal(at_once.tensors[name], steps.tensors[name]), name
    assert sorted(at_once.sample_targets.bincount().tolist()) == [10, 10, 11, 11, 11, 11]  # 64 of 84
    for name in ("sums", "gram", "layer_sums", "layer_gram", "layer_lengths", "layer_directions"):
        torch.testing.assert_close(at_once.tensors[name], steps.tensors[name], rtol=1e-5, atol=1e-4)
    pooled, layers, targets = images_of(6, seed=5)
    logits = [closed_form(each).head(pooled, layers) for each in (at_once, steps)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert accuracy(logits[1], targets) > 0.9


def test_the_order_of_growth_decides_only_the_positions_of_classes() -> None:
    one, other = in_steps(steps=[[0, 1], [2, 3], [4, 5]]), in_steps(steps=[[0, 1], [4, 5], [2, 3]])
    order = [0, 1, 4, 5, 2, 3]
    assert torch.equal(one.sample, other.sample)
    assert torch.equal(one.sample_targets, torch.tensor(order)[other.sample_targets])
    pooled, layers, _ = images_of(6, seed=5)
    logits = [closed_form(each).head(pooled, layers) for each in (one, other)]
    torch.testing.assert_close(logits[0][:, order], logits[1], rtol=1e-4, atol=1e-4)


def test_images_of_known_classes_are_added_to_them() -> None:
    pooled, layers, targets = images_of(4, seed=0)
    half = torch.arange(len(targets)) < 60
    parts = [statistics_of(pooled[rows], layers[rows], targets[rows], 4) for rows in (half, ~half)]
    joined, at_once = added(*parts), statistics_of(pooled, layers, targets, 4)
    assert torch.equal(joined.counts, at_once.counts)
    assert joined.digests is not None
    assert at_once.digests is not None
    assert torch.equal(joined.digests, at_once.digests)
    torch.testing.assert_close(joined.layer_gram, at_once.layer_gram, rtol=1e-5, atol=1e-4)
    assert len(joined.sample) == sum(len(part.sample) for part in parts) <= SAMPLE


def by_position(step: int, count: int, classes: int = 4) -> FeatureStatistics:
    """Statistics of `count` images of each class, given in steps of `step` of each."""
    pooled, layers, targets = images_of(classes, seed=0, count=count)
    grown = None
    for first in range(0, count, step):
        rows = slice(first * classes, (first + step) * classes)
        grown = statistics_of(pooled[rows], layers[rows], targets[rows], classes, grown)
    assert grown is not None
    return grown


@pytest.mark.parametrize("step", [1, 2, 3, 10])
def test_the_sample_follows_the_number_of_images_however_few_each_step_gives(step: int) -> None:
    grown, at_once = by_position(step, 30), by_position(30, 30)
    assert grown.sample_targets.bincount().tolist() == at_once.sample_targets.bincount().tolist() == [6] * 4
    images = {row.numpy().tobytes(): label for row, label in zip(*images_of(4, seed=0)[::2], strict=True)}
    assert [images[row.numpy().tobytes()] for row in grown.sample] == grown.sample_targets.tolist()
    grown.check(4)
    fit, pooled_and_layers, targets = closed_form(grown), images_of(4, seed=5)[:2], images_of(4, seed=5)[2]
    assert len(fit.sample_targets) == 24
    assert accuracy(fit.head(*pooled_and_layers), targets) > 0.9


def test_a_sample_that_lacked_a_class_is_filled_from_its_further_images() -> None:
    pooled, layers, targets = images_of(4, seed=0, count=10)
    few = torch.cat([(targets == label).nonzero()[: 2 if label else 10, 0] for label in range(4)])
    rest = torch.ones(len(targets), dtype=torch.bool)
    rest[few] = False
    first = statistics_of(pooled[few], layers[few], targets[few], 4)
    assert first.sample_targets.tolist() == [0, 0]
    decoded = FeatureStatistics.decode(first.data, first.sha256, 4)
    grown = statistics_of(pooled[rest], layers[rest], targets[rest], 4, decoded)
    assert grown.sample_targets.bincount().tolist() == [2] * 4


def test_nothing_is_tuned_on_a_sample_that_lacks_a_class() -> None:
    pooled, layers, targets = images_of(4, seed=0)
    rows = torch.cat([(targets == label).nonzero()[: 30 if label == 3 else 2, 0] for label in range(4)])
    statistics = statistics_of(pooled[rows], layers[rows], targets[rows], 4)
    assert statistics.sample_targets.tolist() == [3] * 6
    assert unsampled_classes(statistics) == [0, 1, 2]
    fit = closed_form(statistics)
    assert len(fit.sample_logits) == len(fit.sample_targets) == 0
    emptied = {name: statistics.tensors[name][:0] for name in ("sample", "sample_targets", "layer_sample")}
    logits = [head(pooled, layers) for head in (fit.head, closed_form(replace(statistics, **emptied)).head)]
    assert torch.equal(*logits)


def test_a_head_that_nothing_is_tuned_for_is_not_certain() -> None:
    pooled, layers, targets = images_of(4, seed=0, count=2)
    logits = closed_form(statistics_of(pooled, layers, targets, 4)).head(*images_of(4, seed=5)[:2])
    assert 0.5 < logits.softmax(1).amax(1).mean() < 0.9
    assert accuracy(logits, images_of(4, seed=5)[2]) > 0.8


def test_a_full_sample_stands_for_further_classes_if_they_are_not_too_small() -> None:
    pooled, layers, targets = images_of(70, seed=0, count=4)
    assert unsampled_classes(statistics_of(pooled, layers, targets, 70)) == []
    small = (targets > 1) | (torch.arange(len(targets)) < 140)
    statistics = statistics_of(pooled[small], layers[small], targets[small], 70)
    assert statistics.counts.tolist() == [2, 2] + [4] * 68
    assert unsampled_classes(statistics) == [0, 1]


def test_the_layer_head_reads_layer_features_as_the_discriminant_reads_their_hashes() -> None:
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(VECTORS, WIDTH, generator=random) + 0.2 * torch.randn(99, VECTORS, WIDTH, generator=random)
    layers = (vectors * (1 + 0.2 * torch.rand(99, VECTORS, 1, generator=random))).double()
    weight = torch.randn(4, 768, generator=random, dtype=torch.float64)
    bias, hashed = torch.randn(4, generator=random, dtype=torch.float64), hash_layers(layers.flatten(1), WIDTH)
    directions = F.normalize(layers, dim=2).mean(0).flatten()
    head = _on_layers(weight, bias, layers.norm(dim=2).mean(0), directions)
    expected, logits = hashed @ weight.T + bias, head(torch.empty(99, 0), layers.flatten(1))
    assert (logits - expected).square().mean().sqrt() < 0.15 * expected.std(0).mean()
    assert (logits - expected).mean(0).abs().max() < 0.1 * expected.std(0).mean()


def test_classes_without_any_spread_get_a_nearest_mean_classifier() -> None:
    pooled, targets = torch.eye(4, WIDTH).repeat(5, 1), torch.arange(4).repeat(5)
    head = closed_form(feature_statistics(pooled, targets, 4)).head
    assert accuracy(head(pooled, pooled), targets) == 1


def test_the_rank_of_a_head_of_many_classes_is_limited(tiny: FrozenBackbone) -> None:
    pooled, layers, targets = images_of(70, seed=0, count=4)
    head = closed_form(statistics_of(pooled, layers, targets, 70)).head
    assert head.layer_weight is not None
    assert torch.linalg.matrix_rank(head.layer_weight) == 64
    assert accuracy(head(pooled, layers), targets) > 0.9


def test_known_images_are_left_out_and_counted_once(learner: Learner, registry: Registry, colours: Path) -> None:
    learner.learn("colours", colours / "first", config=PROBE)
    grown = learner.grow("colours", colours / "all")
    assert grown.data["grown_from"]["known"] == 24
    assert grown.data["counts"] == [12, 12, 12]
    learner.learn("other", colours / "first", config=replace(PROBE, seed=1))
    assert learner.grow("other", colours / "more").sha256 == grown.sha256


def test_a_task_that_learned_all_images_does_not_grow(learner: Learner, grown: Task, colours: Path) -> None:
    with pytest.raises(DataError, match=r"all' has nothing new: task 'colours:2' was learned from all its images"):
        learner.grow("colours", colours / "all")
    with pytest.raises(DataError, match=r"more' has nothing new: task 'colours:2' was learned from it"):
        learner.grow("colours", colours / "more")


def test_the_same_growth_of_the_same_version_is_not_repeated(
    learner: Learner, registry: Registry, grown: Task, colours: Path
) -> None:
    generation = registry.generation
    assert learner.grow("colours:1", colours / "more", colours / "test").ref == grown.ref
    assert registry.generation == generation


def test_an_image_with_another_label_than_before_is_refused(learner: Learner, colours: Path) -> None:
    learner.learn("colours", colours / "first", config=PROBE)
    (colours / "wrong" / "red").mkdir(parents=True)
    shutil.copy(colours / "all" / "blue" / "0.png", colours / "wrong" / "red")
    with pytest.raises(
        DataError, match=r"(?s)learned from 1 of the images with other labels:.*0\.png \('blue', now 'red'"
    ):
        learner.grow("colours", colours / "wrong")


def test_without_recorded_digests_the_same_dataset_is_refused_and_repeats_are_warned_of(
    learner: Learner, registry: Registry, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = learner.learn("colours", colours / "first", config=PROBE)
    statistics = registry.statistics("colours")
    assert statistics is not None
    old = replace(task, version=None, name="old")
    registry.register(old, golden(learner.backbone, old), replace(statistics, digests=None))
    with pytest.raises(DataError, match=r"first' has nothing new: task 'old:1' was learned from it"):
        learner.grow("old", colours / "first")
    with caplog.at_level(logging.WARNING):
        assert learner.grow("old", colours / "more").ref == "old:2"
    assert "not recorded which images old:1 was learned from" in caplog.text
    with pytest.raises(DataError, match="nothing new"):
        learner.grow("old", colours / "more")


def test_one_image_is_enough_but_leaves_the_version_without_a_validation_score(
    learner: Learner, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner.learn("colours", colours / "first", config=PROBE)
    (colours / "one" / "red").mkdir(parents=True)
    shutil.copy(colours / "all" / "red" / "0.png", colours / "one" / "red")
    with caplog.at_level(logging.WARNING):
        grown = learner.grow("colours", colours / "one", colours / "test")
    assert grown.data["counts"] == [12, 12, 1]
    assert (grown.temperature, set(grown.metrics)) == (1.0, {"test"})
    assert "no validation score, a fixed shrinkage and temperature 1: its statistics have no" in caplog.text
    assert "sampled image of class 'red', which takes three images" in caplog.text


def test_a_class_that_grows_one_image_at_a_time_is_validated_once_it_has_three(
    learner: Learner, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner.learn("colours", colours / "first", config=PROBE)
    scored = []
    for number in range(3):
        (colours / f"step {number}" / "red").mkdir(parents=True)
        shutil.copy(colours / "all" / "red" / f"{number}.png", colours / f"step {number}" / "red")
        scored.append(learner.grow("colours", colours / f"step {number}").metrics.get("validation"))
    assert scored[:2] == [None, None]
    assert scored[2]["per_class"].keys() == {"blue", "green", "red"}
    assert None not in scored[2]["per_class"].values()


def test_a_class_of_unreadable_images_is_refused(learner: Learner, registry: Registry, colours: Path) -> None:
    learner.learn("colours", colours / "first", config=PROBE)
    shutil.copytree(colours / "more", colours / "bad")
    (colours / "bad" / "purple").mkdir()
    (colours / "bad" / "purple" / "0.png").write_bytes((colours / "all" / "red" / "0.png").read_bytes()[:300])
    with pytest.raises(DataError, match=r"0\.png"):
        learner.grow("colours", colours / "bad")
    with pytest.raises(DataError, match="No image of class 'purple' can be read"):
        learner.grow("colours", colours / "bad", skip_bad=True)
    assert registry.record("colours").version == 1


def test_file_names_and_their_order_have_no_influence(
    learner: Learner, grown: Task, registry: Registry, colours: Path, tmp_path: Path
) -> None:
    (colours / "renamed" / "red").mkdir(parents=True)
    for number, file in enumerate(sorted((colours / "more" / "red").iterdir(), reverse=True)):
        shutil.copy(file, colours / "renamed" / "red" / f"a{number}.png")
    with Registry.open(tmp_path / "other.db") as other:
        elsewhere = Learner(learner.backbone, other)
        elsewhere.learn("colours", colours / "first", config=PROBE)
        assert elsewhere.grow("colours", colours / "renamed").sha256 == grown.sha256
        first, second = registry.statistics("colours"), other.statistics("colours")
        assert first is not None
        assert second is not None
        assert first.data == second.data


def test_a_grown_task_grows_again_is_routed_and_travels(
    learner: Learner, grown: Task, registry: Registry, colours: Path, tmp_path: Path
) -> None:
    colour_folder(colours / "purple", per_class=8, classes=("purple",))
    third = learner.grow("colours", colours / "purple")
    assert (third.ref, third.labels) == ("colours:3", ("blue", "green", "red", "purple"))
    assert third.data["grown_from"]["version"] == 2
    statistics = registry.statistics("colours")
    assert statistics is not None
    assert Router({"colours": statistics}).tasks == ("colours",)
    registry.export(["colours:2", "colours:3"], tmp_path / "grown.addenda")
    with Registry.open(tmp_path / "there.db") as there:
        assert [received.state for received in there.import_bundle(tmp_path / "grown.addenda")] == ["added", "added"]
        assert there.record("colours").grown_from == "colours:2"
        assert Learner(learner.backbone, there).grow("colours", colours / "test").ref == "colours:4"
        assert there.check_integrity().faults == ()


def test_a_token_is_not_continued_and_that_is_said(
    learner: Learner, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LearnConfig(optimizer="sgd", epochs=1, learning_rate=0.1, fall_back=False, batch_size=8)
    assert learner.learn("colours", colours / "first", config=config).class_token is not None
    with caplog.at_level(logging.WARNING):
        assert learner.grow("colours", colours / "more").class_token is None
    assert "the class token of colours:1 is not continued" in caplog.text


def test_test_images_that_were_learned_from_are_warned_of(
    learner: Learner, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner.learn("colours", colours / "first", config=PROBE)
    with caplog.at_level(logging.WARNING):
        learner.grow("colours", colours / "more", colours / "first")
    assert "colours:1 was learned from 24 of the test images" in caplog.text


def test_tasks_that_cannot_grow_are_refused_by_name(
    learner: Learner, registry: Registry, colours: Path, tmp_path: Path
) -> None:
    task = learner.learn("colours", colours / "first", config=PROBE)
    bare = replace(task, version=None, name="bare")
    registry.register(bare, golden(learner.backbone, bare))
    with pytest.raises(RegistryError, match=r"Task 'bare:1' has no routing statistics.*Learn it again"):
        learner.grow("bare", colours / "more")
    images = torch.utils.data.TensorDataset(torch.randn(12, 3, 32, 32), (torch.arange(24).view(12, 2) % 3 > 0).long())
    learner.learn("tags", images, config=replace(PROBE, layer_head=False))
    with pytest.raises(RegistryError, match=r"Task 'tags:1' is multi-label; only a single-label task can grow"):
        learner.grow("tags", colours / "more")
    with pytest.raises(DataError, match=r"is multi-label; the task is single-label"):
        learner.grow("colours", images)
    with pytest.raises(BackboneError, match=r"'colours:1' was learned on the backbone with fingerprint"):
        Learner(FrozenBackbone(tiny_vit(seed=9), "other", "hub"), registry).grow("colours", colours / "more")
    assert registry.record("colours").version == 1


def test_statistics_of_other_features_are_refused(learner: Learner, registry: Registry, colours: Path) -> None:
    task = learner.learn("colours", colours / "first", config=PROBE)
    statistics = registry.statistics("colours")
    assert statistics is not None
    assert statistics.layer_directions is not None
    odd = replace(task, version=None, name="odd")
    other = replace(statistics, layer_directions=statistics.layer_directions[:-1])
    registry.register(odd, golden(learner.backbone, odd), other)
    with pytest.raises(RegistryError, match="statistics of task 'odd:1' are of other features"):
        learner.grow("odd", colours / "more")


def test_statistics_without_layers_give_a_head_on_the_pooled_feature(
    learner: Learner, registry: Registry, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = learner.learn("colours", colours / "first", config=PROBE)
    statistics = registry.statistics("colours")
    assert statistics is not None
    pooled = {name: each for name, each in statistics.tensors.items() if not name.startswith("layer_")}
    old = replace(task, version=None, name="old")
    registry.register(old, golden(learner.backbone, old), FeatureStatistics(**pooled))
    with caplog.at_level(logging.WARNING):
        grown = learner.grow("old", colours / "more", colours / "test")
    assert grown.layer_weight is None
    assert "its next version reads the pooled feature alone" in caplog.text


def test_known_images_are_found_by_class() -> None:
    digests = [f"{number:064x}" for number in range(6)]
    prefixed = [digest[::-1] for digest in digests]
    statistics = feature_statistics(torch.randn(6, 8), torch.tensor([1, 0, 1, 0, 1, 0]), 2, digests=prefixed)
    assert known_classes(statistics, [*prefixed[:2], "f" * 64]) == [{1}, {0}, set()]
