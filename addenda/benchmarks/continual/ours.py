"""Addenda in the benchmark: masked memory tokens, a registry underneath, a router where nobody names the task."""

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
    """Addenda as a method of the benchmark; a run that was interrupted finds its tasks in the registry."""

    def __init__(self, stream: Stream, backbone: FrozenBackbone, config: LearnConfig, registry: Registry) -> None:
        self._stream, self._backbone, self._registry = stream, backbone, registry
        self._strategy = MaskedMemory(
            backbone=backbone, registry=registry, config=config, prefix=stream.name, evaluator=quiet_evaluator()
        )
        self._experiences = stream.benchmark(None, backbone.transform).train_stream
        self._predictions: dict[str, TaskLogits] = {}

    def learn(self, number: int) -> None:
        """Learns experience `number` as one more task."""
        self._strategy.train(self._experiences[number])
        self._predictions.clear()

    def scores(self, experience: Experience) -> Scores:
        """Told: the bare logits of the experience's own task. Untold: the router's choice times the heads' answers."""
        answers = self._predict(experience)
        width = len(self._stream.labels)
        task_incremental = torch.full((len(experience.test), width), NEVER, dtype=torch.float32, device="cpu")
        for name, learned in self._strategy.model.learned.items():
            if learned.number == self._stream.experiences.index(experience):
                task_incremental[:, list(learned.classes)] = answers[name].cpu()
        return Scores(task_incremental, self._strategy.model.score(answers, num_classes=width))

    def price(self) -> Price:
        """Artifacts and statistics in the registry, and the combined pass with all tasks."""
        records = [self._registry.record(one.task.ref) for one in self._strategy.model.learned.values()]
        weights = [record.size_bytes + record.statistics_bytes for record in records]
        operations = pass_operations(self._strategy.model.combined)
        return Price(sum(weights) / len(weights), operations / task_cost(self._backbone, 0).backbone_operations)

    def extra(self) -> dict[str, float | dict[str, float]]:
        """Ways to choose the task compared, and how well a router tells images of tasks that it does not know.

        `routers`: untold accuracy, in the mean over experiences, where each chooses and the chosen task's head answers.
        `auroc`: of familiarity, the images of tasks to come against those of known ones, in the mean over the routers
        after each experience but the last.
        """
        return {"routers": self._routers()} | ({"auroc": self._auroc()} if len(self._stream.experiences) > 1 else {})

    def _routers(self) -> dict[str, float]:
        learned = self._strategy.model.learned
        classes = {name: torch.tensor(one.classes, dtype=torch.int64, device="cpu") for name, one in learned.items()}
        router = self._router(len(learned))
        right: dict[str, list[float]] = {}
        for experience in self._stream.experiences:
            answers = self._predict(experience)
            logits = {name: answers[name].cpu() / one.task.temperature for name, one in learned.items()}
            heads = torch.stack([classes[name][one.argmax(1)] for name, one in logits.items()], dim=1)
            found = {
                "max softmax": {name: one.log_softmax(1).amax(1) for name, one in logits.items()},
                "energy": {name: one.logsumexp(1) for name, one in logits.items()},
                "the router": router.log_probabilities(_pooled(answers)),
            }
            for how, scores in router.class_scores(_pooled(answers)).items():
                if how != "pooled":
                    found[how.replace("-", " ")] = {name: one.amax(1) for name, one in scores.items()}
            for how, by_name in found.items():
                chosen = torch.stack([by_name[name] for name in learned], dim=1).argmax(1)
                answered = heads.gather(1, chosen[:, None])[:, 0]
                right.setdefault(how, []).append((answered == experience.test.targets).float().mean().item())
        return {how: sum(values) / len(values) for how, values in right.items()}

    def _auroc(self) -> float:
        features = [_pooled(self._predict(experience)) for experience in self._stream.experiences]
        found: list[float] = []
        for known in range(1, len(features)):
            router = self._router(known)
            familiar = [router.familiarity(one) for one in features]
            truth = [number < known for number, one in enumerate(familiar) for _ in range(len(one))]
            found.append(roc_auc_score(truth, torch.cat(familiar).numpy()))
        return sum(found) / len(found)

    def _router(self, count: int) -> Router:
        """The router that knows the first experiences, so many of them."""
        learned = list(self._strategy.model.learned.items())[:count]
        return Router({name: one.statistics for name, one in learned if one.statistics is not None})

    def _predict(self, experience: Experience) -> TaskLogits:
        """All tasks' logits on an experience's test images, from one pass."""
        if experience.name not in self._predictions:
            model, images = self._strategy.model.combined, experience.test
            parts = [model(part, pooled=True) for part in batches(images, self._backbone, model.micro_batch)]
            logits = {name: torch.cat([part[name] for part in parts]) for name in model.tasks}
            self._predictions[experience.name] = TaskLogits(
                logits, model.exact, torch.cat([_pooled(part) for part in parts])
            )
        return self._predictions[experience.name]


def _pooled(answers: TaskLogits) -> Tensor:
    assert answers.pooled is not None
    return answers.pooled
