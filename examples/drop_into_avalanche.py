"""Addenda as a strategy in an Avalanche script, beside Avalanche's own Naive.

The strategies learn two digits per experience and are tested without task labels.
"""

from __future__ import annotations

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin

from addenda import LearnConfig, Registry, load_backbone
from addenda.benchmarks import LogitBits, MaskedMemory
from addenda.benchmarks.demo import digits

backbone = load_backbone("glyphs", device="cpu")  # or any timm ViT; its transform is the benchmark's
benchmark = nc_benchmark(
    *(digits(tuple(range(10)), test, limit=300) for test in (False, True)),
    n_experiences=5,
    task_labels=False,
    shuffle=False,
    train_transform=backbone.transform,
    eval_transform=backbone.transform,
)


def evaluator() -> EvaluationPlugin:
    """Measures accuracy on all ten digits, and whether the logits of earlier experiences kept their bits."""
    return EvaluationPlugin(accuracy_metrics(stream=True), LogitBits(), loggers=[])


torch.manual_seed(0)
mlp = SimpleMLP(num_classes=10, input_size=3 * 32 * 32)
sgd = torch.optim.SGD(mlp.parameters(), lr=0.01, momentum=0.9)
with Registry.open("avalanche.db") as registry:
    strategies = {
        "naive": Naive(model=mlp, optimizer=sgd, train_mb_size=16, train_epochs=4, evaluator=evaluator()),
        "addenda": MaskedMemory(
            backbone=backbone, registry=registry, config=LearnConfig(epochs=3), evaluator=evaluator()
        ),
    }
    results = {}
    for name, strategy in strategies.items():
        for experience in benchmark.train_stream:
            strategy.train(experience)
        results[name] = strategy.eval(benchmark.test_stream)

for name, strategy in strategies.items():
    (accuracy,) = (value for key, value in results[name].items() if key.startswith("Top1_Acc_Stream"))
    bits = "are bitwise identical" if strategy.evaluator.metrics[-1].identical else "changed"
    print(f"{name}: {100 * accuracy:.1f} % accuracy on all digits after five experiences; old logits {bits}")
