"""The Avalanche strategy and the exactness metric."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    benchmark_with_validation_stream,
    nc_benchmark,
    with_classes_timeline,
    with_task_labels,
)
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute, TransformGroups, as_classification_dataset
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, bwt_metrics, forgetting_metrics, forward_transfer_metrics
from avalanche.models import IncrementalClassifier, SimpleMLP, as_multitask
from avalanche.training import plugins
from avalanche.training.plugins import EvaluationPlugin, LwFPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.supervised import Naive, StreamingLDA
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from addenda import FrozenBackbone, LearnConfig, Registry
from addenda.backbones import KeyValue
from addenda.benchmarks import LogitBits, MaskedMemory
from addenda.benchmarks.demo import digits
from addenda.benchmarks.strategy import NEVER, ExperienceImages, LearnedTask, StreamClassifier
from addenda.combined import CombinedModel, Router, feature_statistics, forward, joined_statistics
from addenda.combined.forward import attend
from addenda.exceptions import DataError, IntegrityError, RegistryError
from addenda.registry import Task
from tests.support.images import colour_folder
from tests.support.tasks import random_task

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche and what it imports warn while they load

QUICK = LearnConfig(optimizer="sgd", epochs=1, learning_rate=(0.1,), num_memory_tokens=2, fall_back=False)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "stream.db") as opened:
        yield opened


def stream(task_labels: bool = True, classes: int = 6, **options: Any) -> Any:
    """Three experiences of two classes; each class is noise of one brightness."""

    def split(seed: int) -> torch.utils.data.TensorDataset:
        random = torch.Generator().manual_seed(seed)
        targets = torch.arange(48) % classes
        images = 0.3 * torch.randn(48, 3, 32, 32, generator=random) + (targets[:, None, None, None] - 2.5)
        dataset = torch.utils.data.TensorDataset(images, targets)
        dataset.targets = targets.tolist()  # type: ignore[attr-defined]
        return dataset

    order = {"fixed_class_order": list(range(classes)), "shuffle": False}
    return nc_benchmark(split(0), split(1), n_experiences=3, task_labels=task_labels, **order, **options)


def train(backbone: FrozenBackbone, registry: Registry, benchmark: Any) -> tuple[Any, Any, list[dict[str, float]]]:
    bits = LogitBits()
    evaluator = EvaluationPlugin(
        accuracy_metrics(experience=True), forgetting_metrics(experience=True, stream=True), bwt_metrics(stream=True),
        forward_transfer_metrics(stream=True), bits, loggers=[],
    )  # fmt: skip
    strategy = MaskedMemory(backbone=backbone, registry=registry, config=QUICK, evaluator=evaluator, eval_every=0)
    results = []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        results.append(strategy.eval(benchmark.test_stream))
    return strategy, bits, results


def accuracies(results: dict[str, float]) -> dict[int, float]:
    """Avalanche's test accuracy on each experience."""
    pattern = re.compile(r"Top1_Acc_Exp/eval_phase/test_stream/(?:Task\d+/)?Exp(\d+)")
    return {int(match[1]): value for key, value in results.items() if (match := pattern.fullmatch(key))}


def break_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes each task attend to another task's token instead of its own, and disables the self-test."""

    def leaking(scale, queries, frozen, tokens, memory, bias):
        moved = KeyValue(tokens.keys.roll(-1, dims=0), tokens.values.roll(-1, dims=0))
        return attend(scale, queries, frozen, moved, memory, bias)

    monkeypatch.setattr(forward, "attend", leaking)
    monkeypatch.setattr("addenda.combined.selftest._equal", lambda *_: True)


def test_each_experience_becomes_a_task_and_no_earlier_logit_changes(tiny: FrozenBackbone, registry: Registry) -> None:
    _, bits, results = train(tiny, registry, stream())
    assert [record.ref for record in registry.tasks()] == [f"experience-00{i}:1" for i in range(3)]
    assert [record.labels for record in registry.tasks()] == [("0", "1"), ("2", "3"), ("4", "5")]
    assert bits.identical
    assert bits.max_difference == 0
    emitted = {key: value for key, value in results[-1].items() if key.startswith("LogitsIdentical")}
    assert emitted == {"LogitsIdentical/Exp000": 1.0, "LogitsIdentical/Exp001": 1.0}
    matrix = [accuracies(result) for result in results]
    assert [sorted(row) for row in matrix] == [[0, 1, 2]] * 3
    assert matrix[0][0] == matrix[1][0] == matrix[2][0]
    assert matrix[1][1] == matrix[2][1]
    assert {v for k, v in results[-1].items() if k.startswith("StreamForgetting")} == {0.0}
    assert {v for k, v in results[-1].items() if k.startswith("StreamBWT")} == {0.0}
    assert any(key.startswith("StreamForwardTransfer") for key in results[-1])


def test_the_metric_detects_a_broken_mask(
    tiny: FrozenBackbone, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_the_mask(monkeypatch)
    _, bits, results = train(tiny, registry, stream())
    assert not bits.identical
    assert bits.max_difference > 0
    assert 0.0 in {value for key, value in results[-1].items() if key.startswith("LogitsIdentical")}


def naive(lr: float) -> tuple[Naive, LogitBits]:
    """Naive fine-tuning of a small model, and the metric that watches it."""
    torch.manual_seed(0)
    model = as_multitask(SimpleMLP(input_size=3 * 32 * 32, num_classes=2, drop_rate=0.0), "classifier")
    bits = LogitBits(num_images=4)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=lr), train_mb_size=8,
        evaluator=EvaluationPlugin(bits, loggers=[]),
    )  # fmt: skip
    return strategy, bits


def test_the_metric_counts_logits_that_became_nan_as_infinitely_changed() -> None:
    strategy, bits = naive(lr=0.0)
    first, second, *_ = stream().train_stream
    strategy.train(first)
    strategy.optimizer.param_groups[0]["lr"] = float("nan")
    strategy.train(second)
    assert not bits.identical
    assert bits.result() == float("inf")


def test_the_metric_detects_that_naive_fine_tuning_changes_logits() -> None:
    strategy, bits = naive(lr=0.01)
    for experience in stream().train_stream:
        strategy.train(experience)
    assert not bits.identical
    assert bits.max_difference > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("shared_label", [False, True])
def test_without_task_labels_a_router_chooses(tiny: FrozenBackbone, registry: Registry, shared_label: bool) -> None:
    """Avalanche gives no task label, or the same one to every experience."""
    benchmark = stream(task_labels=False)
    if shared_label:
        datasets = {
            split: [
                experience.dataset.update_data_attribute(
                    "targets_task_labels", ConstantSequence(0, len(experience.dataset))
                )
                for experience in experiences
            ]
            for split, experiences in (("train", benchmark.train_stream), ("test", benchmark.test_stream))
        }
        benchmark = with_task_labels(with_classes_timeline(benchmark_from_datasets(**datasets)))
    strategy, bits, results = train(tiny, registry, benchmark)
    assert bits.identical
    assert sorted(accuracies(results[-1])) == [0, 1, 2]
    labels = torch.zeros(16, dtype=torch.long) if shared_label else None
    for number, experience in enumerate(benchmark.test_stream):
        scores = strategy.model(torch.stack([item[0] for item in experience.dataset]), labels)
        assert scores.shape == (16, 6)
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(16))
        predicted = scores.argmax(1)
        assert ((predicted // 2) == number).float().mean() > 0.8  # the brightness differs, which the router detects
        accuracy = (predicted == torch.tensor(list(experience.dataset.targets))).float().mean()
        assert accuracies(results[-1])[number] == accuracy


def test_a_routed_probability_is_the_tasks_times_the_heads(tiny: FrozenBackbone) -> None:
    classifier, statistics, images = StreamClassifier(tiny), {}, torch.randn(5, 3, 32, 32)
    noise = torch.Generator().manual_seed(0)
    tasks = {name: random_task(tiny, name, classes=2, seed=i) for i, name in enumerate("ab")}
    for number, (name, task) in enumerate(tasks.items()):
        features = number + torch.randn(30, tiny.embed_dim, generator=noise)
        statistics[name] = feature_statistics(features, torch.arange(30) % 2, 2)
        classifier.add(LearnedTask(task, number, number, (2 * number, 2 * number + 1), statistics[name]))
    outputs = CombinedModel(tiny, list(tasks.values()))(images, features=True)
    of_task = Router(statistics).log_probabilities(outputs.features)
    expected = [of_task[name][:, None] + (outputs[name] / tasks[name].temperature).log_softmax(1) for name in "ab"]
    torch.testing.assert_close(classifier(images), torch.cat(expected, dim=1).float())


def test_the_scores_of_a_class_that_several_tasks_have_come_from_tasks_and_from_all_images(
    tiny: FrozenBackbone,
) -> None:
    classifier, noise, statistics = StreamClassifier(tiny), torch.Generator().manual_seed(0), {}
    for number, name in enumerate("ab"):
        features = number + torch.randn(30, tiny.embed_dim, generator=noise)
        statistics[name] = feature_statistics(features, torch.arange(30) % 2, 2)
        task = random_task(tiny, name, classes=2, seed=number)
        classifier.add(LearnedTask(task, number, number, (5 * number, 5 + 3 * number), statistics[name]))
    images = torch.randn(5, 3, 32, 32)
    scores = classifier(images)
    assert (scores[:, [1, 2, 3, 4, 6, 7]] == NEVER).all()
    torch.testing.assert_close(scores[:, [0, 5, 8]].exp().sum(1), torch.ones(5))
    outputs = classifier.combined(images, features=True)
    logits = {name: outputs[name] / entry.task.temperature for name, entry in classifier.learned.items()}
    within = {name: values.log_softmax(1) for name, values in logits.items()}
    routed = Router(statistics).routed(within, outputs.features)
    (a0, a5), (b5, b8) = routed["a"].T, routed["b"].T
    of_tasks = torch.stack([a0, a5.logaddexp(b5), b8], dim=1)
    joined = joined_statistics([(statistics["a"], (0, 1)), (statistics["b"], (1, 2))], 3)
    of_all = Router({"": joined}).class_scores(outputs.features)["combined"][""]
    torch.testing.assert_close(scores[:, [0, 5, 8]], ((of_tasks + of_all) / 2).log_softmax(1).float())


def test_a_task_without_statistics_needs_task_labels(tiny: FrozenBackbone) -> None:
    classifier = StreamClassifier(tiny)
    for number, name in enumerate("ab"):
        task = random_task(tiny, name, classes=2)
        classifier.add(LearnedTask(task, number, number, (2 * number, 2 * number + 1), None))
    images = torch.randn(3, 3, 32, 32)
    assert classifier(images, torch.tensor([0, 1, 0])).shape == (3, 4)
    with pytest.raises(RegistryError, match=r"task 'a' has no routing statistics .*; give the benchmark task labels"):
        classifier(images)


def test_a_head_of_negative_logits_still_wins_within_its_task(tiny: FrozenBackbone) -> None:
    task = random_task(tiny, "a", classes=2)
    task.head_bias.sub_(1000)
    classifier = StreamClassifier(tiny)
    classifier.add(LearnedTask(task, 0, 0, (2, 3), None))
    scores = classifier(torch.randn(3, 3, 32, 32), torch.zeros(3, dtype=torch.long), num_classes=6)
    assert scores.shape == (3, 6)
    assert set(scores.argmax(1).tolist()) <= {2, 3}
    assert (scores[:, [0, 1, 4, 5]] == NEVER).all()
    assert (classifier(torch.randn(3, 3, 32, 32), torch.ones(3, dtype=torch.long)) == NEVER).all()


@pytest.mark.slow
def test_a_repeated_stream_reuses_the_registered_tasks(tiny: FrozenBackbone, registry: Registry) -> None:
    _, _, before = train(tiny, registry, stream())
    generation = registry.generation
    _, _, after = train(tiny, registry, stream())
    assert registry.generation == generation
    assert accuracies(after[-1]) == accuracies(before[-1])


def shades(count: int, seed: int) -> tuple[list[Image.Image], list[int]]:
    """PIL images of two levels of brightness."""
    noise = torch.Generator().manual_seed(seed)
    targets = [i % 2 for i in range(count)]
    pixels = [(60 + 120 * t + 40 * torch.rand(32, 32, 3, generator=noise)).byte().numpy() for t in targets]
    return [Image.fromarray(array) for array in pixels], targets


def pictures(backbone: FrozenBackbone, train_transform: Any) -> Any:
    """One experience of PIL images with a script's transforms."""

    def dataset(seed: int, group: str) -> Any:
        images, targets = shades(16, seed)
        transforms = {"train": (train_transform, None), "eval": (backbone.transform, None)}
        return ClassificationDataset(
            [list(zip(images, targets, strict=True))],
            transform_groups=TransformGroups(transforms, current_group=group),
            data_attributes=[DataAttribute(targets, "targets")],
        )

    return with_classes_timeline(benchmark_from_datasets(train=[dataset(0, "train")], test=[dataset(1, "eval")]))


def test_pil_images_are_learned_from_in_random_views(tiny: FrozenBackbone, registry: Registry) -> None:
    train(tiny, registry, pictures(tiny, None))
    assert registry.tasks()[0].config["augmentation"]["views"] == 3


def test_images_with_a_train_transform_are_learned_through_the_eval_transform(
    tiny: FrozenBackbone, registry: Registry
) -> None:
    def vary(image: Image.Image) -> Tensor:
        varied: Tensor = tiny.transform(image)
        return varied + torch.rand(1)

    _, bits, results = train(tiny, registry, pictures(tiny, vary))
    assert registry.tasks()[0].config["augmentation"]["views"] == 0
    assert bits.identical
    assert accuracies(results[-1]) == {0: 1.0}


@pytest.mark.slow
def test_routing_statistics_of_the_training_images_are_stored(tiny: FrozenBackbone, registry: Registry) -> None:
    train(tiny, registry, stream())
    records = registry.tasks()
    stored = [registry.statistics(record.ref) for record in records]
    assert [statistics.counts.tolist() for statistics in stored] == [[8, 8]] * 3
    assert [record.statistics_bytes for record in records] == [len(statistics.data) for statistics in stored]
    assert isinstance(registry.get("experience-000"), Task)


def digits_stream(backbone: FrozenBackbone, keep: tuple[int, ...] = (0, 1, 2, 3), **options: Any) -> Any:
    """Two experiences of PIL images, with the backbone's transform for evaluation."""
    return nc_benchmark(
        digits(keep, test=False, limit=144), digits(keep, test=True, limit=36), n_experiences=2, shuffle=False,
        **{"task_labels": True, "train_transform": None, "eval_transform": backbone.transform} | options,
    )  # fmt: skip


def masked_memory(backbone: FrozenBackbone, registry: Registry, **options: Any) -> Any:
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    return MaskedMemory(
        backbone=backbone, registry=registry, config=LearnConfig(head_only=True), evaluator=evaluator, **options
    )


@pytest.mark.parametrize("kind", ["plain", "validation", "online"])
def test_task_labels_are_found_in_streams_of_every_kind(glyphs: FrozenBackbone, registry: Registry, kind: str) -> None:
    benchmark = digits_stream(glyphs)
    experiences = {
        "plain": lambda: benchmark.train_stream,
        "validation": lambda: benchmark_with_validation_stream(benchmark, validation_size=0.25).train_stream,
        "online": lambda: split_online_stream(benchmark.train_stream, experience_size=1000, shuffle=False),
    }[kind]()
    strategy = masked_memory(glyphs, registry)
    for experience in experiences:
        strategy.train(experience)
    assert [entry.task_label for entry in strategy.model.learned.values()] == [0, 1]
    assert min(accuracies(strategy.eval(benchmark.test_stream)).values()) > 0.9


def test_an_unknown_task_label_is_refused_or_counts_as_an_error(
    glyphs: FrozenBackbone, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    benchmark, strategy = digits_stream(glyphs), masked_memory(glyphs, registry)
    strategy.train(benchmark.train_stream[0])
    with pytest.raises(DataError, match=r"No task was learned for task label 1, .* Learned labels: 0\."):
        strategy.eval(benchmark.test_stream[1])
    result = accuracies(strategy.eval(benchmark.test_stream))  # as scripts do after each experience
    assert result[0] > 0.9
    assert result[1] == 0.0
    assert "No task was learned yet for task label 1;" in caplog.text


def test_predictions_for_an_unknown_task_label_are_never_correct(glyphs: FrozenBackbone, registry: Registry) -> None:
    """If the classes of each experience start at 0, class 0 would be correct for half of its images."""
    benchmark = digits_stream(glyphs, class_ids_from_zero_in_each_exp=True)
    strategy = masked_memory(glyphs, registry)
    strategy.train(benchmark.train_stream[0])
    assert accuracies(strategy.eval(benchmark.test_stream))[1] == 0.0


@pytest.mark.slow
def test_an_experience_may_have_one_class(glyphs: FrozenBackbone, registry: Registry) -> None:
    benchmark = digits_stream(glyphs, (0, 1, 2), task_labels=False, per_exp_classes={0: 2, 1: 1})
    strategy = masked_memory(glyphs, registry)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    result = accuracies(strategy.eval(benchmark.test_stream))
    assert min(result.values()) > 0.7


def test_the_metric_accepts_images_that_only_the_test_datasets_transform(
    glyphs: FrozenBackbone, registry: Registry, tmp_path: Path
) -> None:
    folder = str(colour_folder(tmp_path / "images"))
    train = as_classification_dataset(ImageFolder(folder))
    test = as_classification_dataset(ImageFolder(folder, transform=glyphs.transform))
    benchmark, bits = benchmark_from_datasets(train=[train], test=[test]), LogitBits()
    strategy = MaskedMemory(
        backbone=glyphs, registry=registry, config=LearnConfig(head_only=True),
        evaluator=EvaluationPlugin(bits, loggers=[]),
    )  # fmt: skip
    strategy.train(benchmark.train_stream[0])
    strategy.eval(benchmark.test_stream)
    assert bits.identical


@pytest.mark.parametrize(
    "name", ["ReplayPlugin", "EWCPlugin", "LwFPlugin", "GDumbPlugin", "AGEMPlugin", "EarlyStoppingPlugin",
             "SynapticIntelligencePlugin", "LRSchedulerPlugin"],
)  # fmt: skip
def test_plugins_that_change_training_are_refused_before_it(
    glyphs: FrozenBackbone, registry: Registry, name: str
) -> None:
    plugin = object.__new__(getattr(plugins, name))
    with pytest.raises(DataError, match=f"^{name} changes how a strategy trains.* remove the plugin"):
        masked_memory(glyphs, registry, plugins=[plugin])


def test_a_custom_plugin_may_only_observe(glyphs: FrozenBackbone, registry: Registry) -> None:
    seen: list[str] = []

    class Observing(SupervisedPlugin):  # type: ignore[misc]
        def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(strategy.experience.current_experience)

    class Hooked(SupervisedPlugin):  # type: ignore[misc]
        def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            seen.append("never")

    class Replacing(SupervisedPlugin):  # type: ignore[misc]
        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            strategy.dataloader = []

    benchmark = digits_stream(glyphs)
    strategy = masked_memory(glyphs, registry, plugins=[Observing(), EvaluationPlugin(loggers=[]), Clock()])
    strategy.train(benchmark.train_stream[0])
    assert seen == [0]
    with pytest.raises(DataError, match=r"Hooked uses the hook `after_backward`, which MaskedMemory never calls"):
        masked_memory(glyphs, registry, plugins=[Hooked()])
    with pytest.raises(DataError, match="A plugin has replaced the training data"):
        masked_memory(glyphs, registry, plugins=[Replacing()], prefix="other").train(benchmark.train_stream[0])
    assert [record.name for record in registry.tasks()] == ["experience-000"]


@pytest.mark.parametrize("method", ["deepcopy", "pickle"])
def test_a_copied_model_gives_the_same_bits(
    glyphs: FrozenBackbone, registry: Registry, method: str, tmp_path: Path
) -> None:
    benchmark, strategy = digits_stream(glyphs), masked_memory(glyphs, registry)
    strategy.train(benchmark.train_stream[0])
    images = torch.randn(5, 3, 32, 32)
    before = strategy.model(images)
    if method == "deepcopy":
        copied = deepcopy(strategy.model)
    else:
        torch.save(strategy.model, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    assert copied(images).numpy().tobytes() == before.numpy().tobytes()
    backbone = copied.combined.backbone
    assert backbone is not glyphs
    backbone.check_unchanged()
    with torch.no_grad():
        backbone.model.norm.weight[0] += 1
    with pytest.raises(IntegrityError, match="have changed since they were loaded"):
        copied(images)
    assert strategy.model(images).numpy().tobytes() == before.numpy().tobytes()


def test_targets_must_equal_those_of_the_items(glyphs: FrozenBackbone, registry: Registry, tmp_path: Path) -> None:
    folder = str(colour_folder(tmp_path / "images", classes=("red", "blue")))
    data = ImageFolder(folder, target_transform=lambda y: 1 - y)
    benchmark = nc_benchmark(
        data, data, n_experiences=1, task_labels=True, shuffle=False, train_transform=None,
        eval_transform=glyphs.transform,
    )  # fmt: skip
    with pytest.raises(DataError, match="has the target"):
        masked_memory(glyphs, registry).train(benchmark.train_stream[0])
    assert registry.tasks() == []


def test_a_new_strategy_cannot_evaluate_before_training(glyphs: FrozenBackbone, registry: Registry) -> None:
    benchmark = digits_stream(glyphs)
    with pytest.raises(DataError, match=r"nothing to evaluate\. Call train first; it reuses registered tasks"):
        masked_memory(glyphs, registry).eval(benchmark.test_stream)
    strategy = masked_memory(glyphs, registry)
    strategy.train(benchmark.train_stream[0])
    untransformed = digits_stream(glyphs, eval_transform=None)
    with pytest.raises(DataError, match=r"give the benchmark `eval_transform=backbone.transform`"):
        strategy.eval(untransformed.test_stream)


def test_an_experience_is_refused_before_anything_is_learned_from_it(
    glyphs: FrozenBackbone, registry: Registry
) -> None:
    class Halving(SupervisedPlugin):  # type: ignore[misc]
        def after_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            strategy.adapted_dataset = strategy.adapted_dataset.subset(range(6))

    benchmark, strategy = digits_stream(glyphs), masked_memory(glyphs, registry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(benchmark.train_stream[0]), "task_labels", property(lambda self: [0, 1]))
        with pytest.raises(DataError, match=r"has images of the task labels \[0, 1\]"):
            strategy.train(benchmark.train_stream[0])
    strategy.plugins.append(LwFPlugin())
    with pytest.raises(DataError, match="LwFPlugin changes how a strategy trains"):
        strategy.train(benchmark.train_stream[1])
    with pytest.raises(DataError, match="A plugin has replaced the training data"):
        masked_memory(glyphs, registry, plugins=[Halving()]).train(benchmark.train_stream[1])
    assert registry.tasks() == []


class Items(Dataset[Any]):
    """Noise of one brightness for each class, with further elements beside image and target."""

    def __init__(self, classes: Sequence[int], seed: int, *more: Any) -> None:
        random = torch.Generator().manual_seed(seed)
        self.targets = [classes[i % len(classes)] for i in range(24)]
        self._more = more
        self._images = [0.3 * torch.randn(3, 32, 32, generator=random) + (target - 1.5) for target in self.targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self._images[index], self.targets[index], *self._more


@pytest.mark.parametrize("more", [(), (7,)])
def test_a_further_element_of_an_item_is_no_task_label(
    tiny: FrozenBackbone, registry: Registry, more: tuple[int, ...]
) -> None:
    parts = {
        split: [as_classification_dataset(Items(classes, seed, *more)) for classes in ((0, 1), (2, 3))]
        for seed, split in enumerate(("train", "test"))
    }
    benchmark = benchmark_from_datasets(**parts)
    strategy = masked_memory(tiny, registry)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    assert strategy.clock.train_iterations == 2
    assert list(accuracies(strategy.eval(benchmark.test_stream)).values()) == [1.0, 1.0]


def test_a_dataset_without_targets_is_refused() -> None:
    bare = AvalancheDataset([[(torch.randn(3, 32, 32), 0), (torch.randn(3, 32, 32), 1)]])
    with pytest.raises(DataError, match="has no attribute `targets`"):
        ExperienceImages(bare)


def test_another_seed_in_the_same_registry_is_told_of_the_prefix(tiny: FrozenBackbone, registry: Registry) -> None:
    first = stream().train_stream[0]
    masked_memory(tiny, registry).train(first)
    evaluator = EvaluationPlugin(loggers=[])
    other = MaskedMemory(backbone=tiny, registry=registry, config=replace(QUICK, seed=1), evaluator=evaluator)
    with pytest.raises(RegistryError, match=r"'experience-000' is registered from other .* another `prefix`"):
        other.train(first)


def test_the_metric_compares_the_scores_of_a_strategy_that_makes_its_own() -> None:
    bits = LogitBits(num_images=4)
    evaluator = EvaluationPlugin(bits, loggers=[])
    features = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    strategy = StreamingLDA(features, nn.CrossEntropyLoss(), 48, 6, evaluator=evaluator, train_epochs=1)
    for experience in stream(task_labels=False).train_stream:
        strategy.train(experience)
    assert not bits.identical


class Growing(nn.Module):
    """Avalanche's head that grows, and masks classes not seen yet."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.classifier = nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), IncrementalClassifier(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


def test_the_metric_ignores_columns_of_classes_that_come_later() -> None:
    bits, model = LogitBits(num_images=4), Growing()
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), train_mb_size=16,
        evaluator=EvaluationPlugin(bits, loggers=[]),
    )  # fmt: skip
    experiences = stream(task_labels=False).train_stream
    for experience in experiences[:2]:
        strategy.train(experience)
    assert (bits.identical, bits.max_difference) == (True, 0.0)
    with torch.no_grad():
        model.classifier.classifier.bias[0] += 1
    strategy.train(experiences[2])
    assert (bits.identical, bits.max_difference > 0.9) == (False, True)


def test_an_eval_transform_other_than_the_backbones_causes_a_warning(
    tiny: FrozenBackbone, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    def other(image: Image.Image) -> Tensor:
        halved: Tensor = tiny.transform(image) / 2
        return halved

    for prefix, transform in (("its-own", tiny.transform), ("other", other)):
        benchmark = nc_benchmark(
            digits((0, 1), test=False, limit=24), digits((0, 1), test=True, limit=4), n_experiences=1, shuffle=False,
            task_labels=False, train_transform=None, eval_transform=transform,
        )  # fmt: skip
        masked_memory(tiny, registry, prefix=prefix).train(benchmark.train_stream[0])
        assert ("is not `backbone.transform`" in caplog.text) == (transform is other)
