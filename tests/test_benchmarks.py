"""The Avalanche strategy, the exactness metric, and the demo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from addenda import FrozenBackbone, LearnConfig, Registry
from addenda.backbones import KeyValue
from addenda.combined import streams

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche and what it imports warn while they load

QUICK = LearnConfig(epochs=1, learning_rates=(0.1,), num_memory_tokens=2, fall_back=False)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "stream.db") as opened:
        yield opened


def stream(task_labels: bool = True) -> object:
    """Three experiences of two classes; each class is a shade of noise."""
    from avalanche.benchmarks import nc_benchmark

    def part(seed: int) -> torch.utils.data.TensorDataset:
        random = torch.Generator().manual_seed(seed)
        targets = torch.arange(48) % 6
        images = 0.3 * torch.randn(48, 3, 32, 32, generator=random) + (targets[:, None, None, None] - 2.5)
        dataset = torch.utils.data.TensorDataset(images, targets)
        dataset.targets = targets.tolist()  # type: ignore[attr-defined]
        return dataset

    return nc_benchmark(
        part(0), part(1), n_experiences=3, task_labels=task_labels, fixed_class_order=list(range(6)), shuffle=False
    )


def train(backbone: FrozenBackbone, registry: Registry, benchmark: object) -> tuple[object, object, list[dict]]:
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    from addenda.benchmarks import LogitBits, MaskedMemory

    bits = LogitBits()
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), bits, loggers=[])
    strategy = MaskedMemory(backbone, registry, QUICK, evaluator=evaluator)
    results = []
    for experience in benchmark.train_stream:
        strategy.train(experience)
        results.append(strategy.eval(benchmark.test_stream))
    return strategy, bits, results


def break_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task sees its neighbour's token in place of its own."""
    attend = streams.attend

    def leaking(scale, queries, frozen, tokens, memory, bias):
        moved = KeyValue(tokens.keys.roll(-1, dims=2), tokens.values.roll(-1, dims=2))
        return attend(scale, queries, frozen, moved, memory, bias)

    monkeypatch.setattr(streams, "attend", leaking)


def test_each_experience_becomes_a_task_and_no_old_logit_moves(tiny: FrozenBackbone, registry: Registry) -> None:
    _, bits, results = train(tiny, registry, stream())
    assert [record.ref for record in registry.tasks()] == [f"experience-00{i}:1" for i in range(3)]
    assert [record.labels for record in registry.tasks()] == [("0", "1"), ("2", "3"), ("4", "5")]
    assert bits.identical
    assert bits.max_difference == 0
    emitted = {key: value for key, value in results[-1].items() if key.startswith("LogitsIdentical")}
    assert emitted == {"LogitsIdentical/experience-000": 1.0, "LogitsIdentical/experience-001": 1.0}
    accuracy = [{k: v for k, v in r.items() if "Exp000" in k and k.startswith("Top1_Acc_Exp")} for r in results]
    assert len(accuracy[0]) == 1
    assert accuracy[0] == accuracy[1] == accuracy[2]


def test_a_broken_mask_is_caught_by_the_metric(
    tiny: FrozenBackbone, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = streams.attend

    def leaking(
        scale, queries, frozen, tokens, memory, bias
    ):  # each task sees its neighbour's token in place of its own
        moved = KeyValue(tokens.keys.roll(-1, dims=2), tokens.values.roll(-1, dims=2))
        return attend(scale, queries, frozen, moved, memory, bias)

    monkeypatch.setattr(streams, "attend", leaking)
    _, bits, results = train(tiny, registry, stream())
    assert not bits.identical
    assert bits.max_difference > 0
    assert 0.0 in {value for key, value in results[-1].items() if key.startswith("LogitsIdentical")}


def test_without_task_labels_the_most_confident_task_answers(tiny: FrozenBackbone, registry: Registry) -> None:
    strategy, bits, results = train(tiny, registry, stream(task_labels=False))
    assert bits.identical
    scores = strategy.model(torch.zeros(2, 3, 32, 32))
    assert scores.shape == (2, 6)
    assert (scores > -100).all()
    assert any(key.startswith("Top1_Acc_Exp") for key in results[-1])


def test_a_head_of_negative_logits_still_wins_within_its_task(tiny: FrozenBackbone) -> None:
    from addenda.benchmarks.strategy import NEVER, TaskAnswers
    from addenda.combined import CombinedModel
    from tests.conftest import random_task

    task = random_task(tiny, "a", classes=2)
    task.head_bias.sub_(1000)
    answers = TaskAnswers(tiny)
    answers.add(CombinedModel(tiny, [task]), "a", 0, [2, 3])
    scores = answers(torch.randn(3, 3, 32, 32), torch.zeros(3, dtype=torch.long), num_classes=6)
    assert scores.shape == (3, 6)
    assert set(scores.argmax(1).tolist()) <= {2, 3}
    assert (scores[:, [0, 1, 4, 5]] == NEVER).all()


def test_a_stream_met_again_is_taken_up_where_it_stopped(tiny: FrozenBackbone, registry: Registry) -> None:
    train(tiny, registry, stream())
    generation = registry.generation
    train(tiny, registry, stream())
    assert registry.generation == generation


@pytest.mark.slow
def test_the_digits_stream_forgets_nothing() -> None:
    from addenda.benchmarks.continual import run_continual

    result = run_continual("digits", quiet=True)
    assert result["identical"]
    assert result["forgetting"] == 0
    matrix = result["accuracy"]
    assert all(matrix[i][i] == matrix[-1][i] for i in range(5))
    assert result["average_accuracy"] > 0.9


def test_the_demo_proves_that_nothing_moved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from addenda.benchmarks.demo import run_demo

    monkeypatch.setenv("COLUMNS", "200")
    assert run_demo()
    out = capsys.readouterr().out
    assert "4 of 4 bit-identical" in out
    assert "One more task costs" in out
    assert out.count("  addenda ") == 3


def test_the_demo_fails_when_a_mask_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from addenda.benchmarks import demo

    break_the_mask(monkeypatch)
    monkeypatch.setattr(demo, "PAIRS", demo.PAIRS[:2])
    assert not demo.run_demo()
    assert "NOT every earlier task" in capsys.readouterr().out
