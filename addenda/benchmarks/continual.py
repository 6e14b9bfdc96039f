"""`addenda bench continual`: a stream under Avalanche, with exactness beside accuracy and forgetting."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch.utils.data import TensorDataset

from addenda.backbones import FrozenBackbone, load_backbone
from addenda.benchmarks.digits import PAIRS, digits
from addenda.benchmarks.exactness import LogitBits
from addenda.benchmarks.strategy import MaskedMemory
from addenda.exceptions import DataError
from addenda.learner import LearnConfig
from addenda.learner.data import open_images
from addenda.registry import Registry
from addenda.terminal import console, percent, table

STREAMS = ("digits",)


def run_continual(stream: str, num_memory_tokens: int = 5, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Runs a stream, one task after another, and evaluates every experience after each.

    Returns:
        `accuracy`, the matrix [after experience i][on experience j] in 0..1; `average_accuracy` after the last;
        `forgetting`, Avalanche's stream forgetting; `identical` and `max_difference` of old logits; `seconds`.

    Raises:
        DataError: an unknown stream.
    """
    if stream not in STREAMS:
        raise DataError(f"Stream {stream!r} is not known. Known: {', '.join(STREAMS)}.")
    start = time.monotonic()
    backbone = load_backbone("glyphs", device="cpu")
    benchmark = digits_benchmark(backbone, seed)
    bits = LogitBits()
    evaluator = EvaluationPlugin(
        accuracy_metrics(experience=True), forgetting_metrics(experience=True, stream=True), bits, loggers=[]
    )
    matrix: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder, Registry.open(f"{folder}/stream.db") as registry:
        config = LearnConfig(num_memory_tokens=num_memory_tokens, epochs=6, fall_back=False, seed=seed)
        strategy = MaskedMemory(backbone, registry, config, prefix=stream, evaluator=evaluator)
        for experience in benchmark.train_stream:
            strategy.train(experience)
            metrics = strategy.eval(benchmark.test_stream)
            # Top1_Acc_Stream under a task's name would be the whole stream's mean.
            found = {int(k[-3:]): v for k, v in metrics.items() if k.startswith("Top1_Acc_Exp/eval_phase/test_stream")}
            matrix.append([found[i] for i in sorted(found)])
            if not quiet:
                console.print(f"experience {len(matrix)} of {len(benchmark.train_stream)} learned and evaluated")
    result = {
        "stream": stream,
        "accuracy": matrix,
        "average_accuracy": sum(matrix[-1]) / len(matrix[-1]),
        "forgetting": next(v for k, v in metrics.items() if k.startswith("StreamForgetting")),
        "identical": bits.identical,
        "max_difference": bits.max_difference,
        "seconds": time.monotonic() - start,
    }
    if not quiet:
        _print(result)
    return result


def digits_benchmark(backbone: FrozenBackbone, seed: int = 0) -> Any:
    """scikit-learn's digits as an Avalanche benchmark: five experiences of two digits, with task labels."""
    order = [digit for pair in PAIRS for digit in pair]

    def part(test: bool) -> Any:
        data = digits(tuple(range(10)), test, seed)
        dataset = TensorDataset(open_images(data).read_all(backbone), torch.tensor(data.targets))
        dataset.targets = list(data.targets)  # type: ignore[attr-defined]
        return dataset

    return nc_benchmark(
        part(test=False),
        part(test=True),
        n_experiences=len(PAIRS),
        task_labels=True,
        fixed_class_order=order,
        shuffle=False,
    )


def _print(result: dict[str, Any]) -> None:
    count = len(result["accuracy"])
    columns = ("after", *(f"on {i + 1}" for i in range(count)))
    rows = [(f"experience {i + 1}", *map(percent, row)) for i, row in enumerate(result["accuracy"])]
    console.print(table(f"Test accuracy on {result['stream']}, %", columns, rows, right=columns[1:]))
    bits = "identical, byte for byte" if result["identical"] else f"MOVED by up to {result['max_difference']:.3g}"
    console.print(
        f"average accuracy {percent(result['average_accuracy'])} %, forgetting {result['forgetting']:.4f}, "
        f"old tasks' logits {bits}, {result['seconds']:.0f} s"
    )
