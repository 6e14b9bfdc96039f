"""Addenda as a method of the benchmark: masked memory tokens, a registry, and a router when there is no task label."""

from __future__ import annotations

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.method import Method, Price, Scores, quiet_evaluator
from addenda.benchmarks.baselines.paper_methods import batches
from addenda.benchmarks.continual.stream import Experience, Stream
from addenda.benchmarks.strategy import NEVER, MaskedMemory
from addenda.combined import Router, TaskLogits, pass_operations, task_cost
from addenda.learner import LearnConfig
from addenda.registry import Registry


class Masked(Method):
    """Addenda as a method of the benchmark; an interrupted run resumes with the tasks in its registry."""

    def __init__(self, stream: Stream, backbone: FrozenBackbone, config: LearnConfig, registry: Registry) -> None:
        self._stream, self._backbone, self._registry = stream, backbone, registry
        self._strategy = MaskedMemory(
            backbone=backbone, registry=registry, config=config, prefix=stream.name, evaluator=quiet_evaluator()
        )
        self._experiences = stream.benchmark(None, backbone.transform).train_stream
        self._predictions: dict[str, TaskLogits] = {}

    def learn(self, number: int) -> None:
        """Learn experience `number` as a new task."""
        self._strategy.train(self._experiences[number])
        self._predictions.clear()

    def scores(self, experience: Experience) -> Scores:
        """Score the test images of an experience.

        Task-incremental scores are the logits of the experience's task; class-incremental scores are each task's class
        probabilities weighted by the router.
        """
        predictions = self._predict(experience)
        num_classes = len(self._stream.labels)
        task_incremental = torch.full((len(experience.test), num_classes), NEVER, dtype=torch.float32, device="cpu")
        for name, learned in self._strategy.model.learned.items():
            if learned.number == self._stream.experiences.index(experience):
                task_incremental[:, list(learned.classes)] = predictions[name].cpu()
        return Scores(task_incremental, self._strategy.model.score(predictions, num_classes=num_classes))

    def price(self) -> Price:
        """Bytes of artifacts and routing statistics per task, and operations of a forward pass with all tasks."""
        records = [self._registry.record(learned.task.ref) for learned in self._strategy.model.learned.values()]
        sizes = [record.size_bytes + record.statistics_bytes for record in records]
        operations = pass_operations(self._strategy.model.combined)
        return Price(sum(sizes) / len(sizes), operations / task_cost(self._backbone, 0).backbone_operations)

    def extra(self) -> dict[str, float | dict[str, float]]:
        """Compare routers, and measure how well a router detects images of unknown tasks.

        `routers`: class-incremental accuracy with the head of the task that each router chooses, averaged over
        experiences. `auroc`: images of later tasks against those of known tasks by familiarity, averaged over the
        routers after each experience but the last.
        """
        return {"routers": self._routers()} | ({"auroc": self._auroc()} if len(self._stream.experiences) > 1 else {})

    def _routers(self) -> dict[str, float]:
        learned = self._strategy.model.learned
        classes = {name: torch.tensor(task.classes, dtype=torch.int64, device="cpu") for name, task in learned.items()}
        router = self._router(len(learned))
        accuracies: dict[str, list[float]] = {}
        for experience in self._stream.experiences:
            predictions = self._predict(experience)
            logits = {name: predictions[name].cpu() / entry.task.temperature for name, entry in learned.items()}
            predicted = torch.stack([classes[name][rows.argmax(1)] for name, rows in logits.items()], dim=1)
            scores = {
                "max softmax": {name: rows.log_softmax(1).amax(1) for name, rows in logits.items()},
                "energy": {name: rows.logsumexp(1) for name, rows in logits.items()},
                "the router": router.log_probabilities(_features(predictions)),
            }
            for method, by_task in router.class_scores(_features(predictions)).items():
                if method != "combined":
                    scores[method.replace("-", " ")] = {name: rows.amax(1) for name, rows in by_task.items()}
            for method, task_scores in scores.items():
                task = torch.stack([task_scores[name] for name in learned], dim=1).argmax(1)
                labels = predicted.gather(1, task[:, None])[:, 0]
                correct = (labels == experience.test.targets).float().mean().item()
                accuracies.setdefault(method, []).append(correct)
        return {method: sum(values) / len(values) for method, values in accuracies.items()}

    def _auroc(self) -> float:
        features = [_features(self._predict(experience)) for experience in self._stream.experiences]
        values: list[float] = []
        for num_known in range(1, len(features)):
            router = self._router(num_known)
            familiarity = [router.familiarity(images) for images in features]
            is_known = [number < num_known for number, images in enumerate(familiarity) for _ in range(len(images))]
            values.append(roc_auc_score(is_known, torch.cat(familiarity).numpy()))
        return sum(values) / len(values)

    def _router(self, count: int) -> Router:
        """A router over the first `count` tasks."""
        learned = list(self._strategy.model.learned.items())[:count]
        return Router({name: entry.statistics for name, entry in learned if entry.statistics is not None})

    def _predict(self, experience: Experience) -> TaskLogits:
        """All tasks' logits on an experience's test images, from a single forward pass."""
        if experience.name not in self._predictions:
            model, images = self._strategy.model.combined, experience.test
            chunks = [model(pixels, features=True) for pixels in batches(images, self._backbone, model.micro_batch)]
            logits = {name: torch.cat([chunk[name] for chunk in chunks]) for name in model.tasks}
            self._predictions[experience.name] = TaskLogits(
                logits, model.exact, torch.cat([_features(chunk) for chunk in chunks])
            )
        return self._predictions[experience.name]


def _features(predictions: TaskLogits) -> Tensor:
    assert predictions.features is not None
    return predictions.features
