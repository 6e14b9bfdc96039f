"""Addenda as a method of the benchmark: masked memory tokens, a registry, and a router when there is no task label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from addenda.benchmarks.baselines.method import Method, Scores, quiet_evaluator
from addenda.benchmarks.baselines.paper_methods import batches
from addenda.benchmarks.continual.stream import Experience
from addenda.benchmarks.strategy import LearnedTask, MaskedMemory
from addenda.combined import Router, TaskLogits, pass_operations, task_cost
from addenda.learner import LearnConfig
from addenda.registry import Registry


@dataclass(eq=False, kw_only=True)
class Masked(Method):
    """Addenda as a method of the benchmark; an interrupted run resumes with the tasks in its registry."""

    config: LearnConfig
    registry: Registry

    def __post_init__(self) -> None:
        self._strategy = MaskedMemory(
            backbone=self.backbone,
            registry=self.registry,
            config=self.config,
            prefix=self.stream.name,
            evaluator=quiet_evaluator(),
        )
        self._experiences = self.stream.benchmark(None, self.backbone.transform).train_stream
        self._learned: dict[str, LearnedTask] = self._strategy.model.learned  # filled as it learns
        self._predictions: dict[str, TaskLogits] = {}

    def _learn(self, number: int) -> None:
        self._strategy.train(self._experiences[number])
        self._predictions.clear()

    def scores(self, experience: Experience) -> Scores:
        """Score the test images of an experience.

        Task-incremental scores are the logits of the experience's task; class-incremental scores are each task's class
        probabilities weighted by the router.
        """
        predictions, task_incremental = self._predict(experience), self.no_scores(experience.test)
        for name, learned in self._learned.items():
            if learned.number == self.stream.experiences.index(experience):
                task_incremental[:, list(learned.classes)] = predictions[name].cpu()
        return Scores(task_incremental, self._strategy.model.score(predictions, num_classes=len(self.stream.labels)))

    def _stored_bytes(self) -> float:
        """Bytes of artifacts and routing statistics."""
        records = [self.registry.record(learned.task.ref) for learned in self._learned.values()]
        return sum(record.size_bytes + record.statistics_bytes for record in records)

    def _relative_inference(self) -> float:
        """Operations of a forward pass with all tasks."""
        return pass_operations(self._strategy.model.combined) / task_cost(self.backbone, 0).backbone_operations

    def extra(self) -> dict[str, float | dict[str, float]]:
        """Compare routers, and measure how well a router detects images of unknown tasks.

        `routers`: class-incremental accuracy with the head of the task that each router chooses, averaged over
        experiences. `auroc`: images of later tasks against those of known tasks by familiarity, averaged over the
        routers after each experience but the last.
        """
        return {"routers": self._routers()} | ({"auroc": self._auroc()} if len(self.stream.experiences) > 1 else {})

    def _routers(self) -> dict[str, float]:
        learned, router = self._learned, self._router(len(self._learned))
        classes = {name: torch.tensor(task.classes, dtype=torch.int64, device="cpu") for name, task in learned.items()}
        accuracies: dict[str, list[float]] = {}
        for experience in self.stream.experiences:
            predictions = self._predict(experience)
            logits = {name: predictions[name].cpu() / entry.task.temperature for name, entry in learned.items()}
            predicted = torch.stack([classes[name][rows.argmax(1)] for name, rows in logits.items()])
            scores = {
                "max softmax": {name: rows.log_softmax(1).amax(1) for name, rows in logits.items()},
                "energy": {name: rows.logsumexp(1) for name, rows in logits.items()},
                "the router": router.log_probabilities(_features(predictions)),
            }
            for method, by_task in router.class_scores(_features(predictions)).items():
                if method != "combined":
                    scores[method.replace("-", " ")] = {name: rows.amax(1) for name, rows in by_task.items()}
            for method, task_scores in scores.items():
                chosen = torch.stack([task_scores[name] for name in learned]).argmax(0, keepdim=True)
                correct = predicted.gather(0, chosen)[0] == experience.test.targets
                accuracies.setdefault(method, []).append(correct.float().mean().item())
        return {method: sum(values) / len(values) for method, values in accuracies.items()}

    def _auroc(self) -> float:
        features = [_features(self._predict(experience)) for experience in self.stream.experiences]
        values: list[float] = []
        for num_known in range(1, len(features)):
            router = self._router(num_known)
            familiarity = [router.familiarity(images) for images in features]
            is_known = [number < num_known for number, images in enumerate(familiarity) for _ in range(len(images))]
            values.append(roc_auc_score(is_known, torch.cat(familiarity).numpy()))
        return sum(values) / len(values)

    def _router(self, count: int) -> Router:
        """A router over the first `count` tasks."""
        learned = list(self._learned.items())[:count]
        return Router({name: entry.statistics for name, entry in learned if entry.statistics is not None})

    def _predict(self, experience: Experience) -> TaskLogits:
        """All tasks' logits on an experience's test images, from a single forward pass."""
        if experience.name not in self._predictions:
            model, images = self._strategy.model.combined, experience.test
            chunks = [model(pixels, features=True) for pixels in batches(images, self.backbone, model.micro_batch)]
            logits = {name: torch.cat([chunk[name] for chunk in chunks]) for name in model.tasks}
            self._predictions[experience.name] = TaskLogits(
                logits, model.exact, torch.cat([_features(chunk) for chunk in chunks])
            )
        return self._predictions[experience.name]


def _features(predictions: TaskLogits) -> Tensor:
    assert predictions.features is not None
    return predictions.features
