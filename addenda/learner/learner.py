"""The learner: images in, a registered task out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined import CombinedModel, TileStore, golden, numerics, numerics_fingerprint, tensor_digest
from addenda.exceptions import NameTakenError, RegistryError, TrainingError
from addenda.learner.cache import Activations, Report, compute_activations, read_in_batches
from addenda.learner.config import LearnConfig
from addenda.learner.data import Data, LabelledImages, check_learnable, check_same_labels, has_test_part, open_images
from addenda.learner.metrics import score
from addenda.learner.regression import Regression, choose_strength, fit_regression
from addenda.learner.training import Candidate, Epoch, OnEpoch, Trainer
from addenda.registry import EvaluationRecord, Registry, Task, check_name

RIVAL = "logistic regression"
"""What the rival is called beside the task; no task can have this name."""


class Learner:
    """Learns tasks on one backbone and registers them.

    Args:
        backbone: the frozen backbone; it says on which device all happens.
        registry: where the tasks go.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from addenda import LearnConfig, Registry, load_backbone
        >>> images = torch.cat([torch.zeros(8, 3, 32, 32), torch.ones(8, 3, 32, 32)])
        >>> dataset = torch.utils.data.TensorDataset(images, torch.arange(16) // 8)
        >>> with TemporaryDirectory() as folder, Registry.open(f"{folder}/tasks.db") as registry:
        ...     learner = Learner(load_backbone("glyphs", device="cpu"), registry)
        ...     task = learner.learn("bright", train=dataset, config=LearnConfig(epochs=1))
        >>> task.ref, task.metrics["validation"]["accuracy"]
        ('bright:1', 1.0)
    """

    def __init__(self, backbone: FrozenBackbone, registry: Registry) -> None:
        self.backbone = backbone
        self.registry = registry
        self._last: tuple[Any, Activations] | None = None

    def learn(
        self,
        name: str,
        train: Data,
        test: Data | None = None,
        config: LearnConfig | None = None,
        new_version: bool = False,
        skip_bad: bool = False,
        on_epoch: OnEpoch | None = None,
        report: Report | None = None,
    ) -> Task:
        """Learns a task and registers it, or registers nothing.

        A validation part is held out of `train` to choose the learning rate and the number of epochs. The test set is
        scored once, by the combined model, after everything is chosen.

        Args:
            name: the task's name.
            train: a folder of class folders, a CSV or Parquet listing, a torch Dataset or a Hugging Face one; a folder,
                listing or DatasetDict may hold train and test.
            test: likewise; None takes the test part of `train` where there is one.
            config: the settings.
            new_version: whether a name already taken gets a further version.
            skip_bad: leave out images that cannot be read.
            on_epoch: called after each epoch.
            report: told of the progress: what is done, how much, of how much.

        Returns:
            The registered task. The same name, data, settings and numerics as a registered version give that version.

        Raises:
            DataError: the images cannot be learned from.
            NameTakenError: the name is taken by other content.
            TrainingError: no candidate stayed finite.
        """
        config = config or LearnConfig()
        check_name(name)
        versions = [record for record in self.registry.tasks(include_retired=True) if record.name == name]
        parents = tuple(self.registry.get(ref) for ref in config.extends)
        for parent in parents:
            if parent.class_token is None:
                raise RegistryError(f"Task {parent.ref!r} is head-only: it has no token that {name!r} could see.")
        images = open_images(train)
        check_learnable(images)
        test = train if test is None and has_test_part(train) else test
        test_images = (
            None if test is None else check_same_labels(images.labels, open_images(test, "test"), images.objective)
        )

        fingerprint = images.fingerprint()
        run = {
            "data": fingerprint,
            "config": config.to_json(),
            "extends": [parent.sha256 for parent in parents],
            "numerics": numerics_fingerprint(numerics(self.backbone)),
        }
        for record in versions:
            if record.data.get("run") == run and record.backbone == self.backbone.fingerprint:
                return self.registry.get(record.ref)
        if versions and not new_version:
            raise NameTakenError(name, versions[-1].version)

        activations = self._activations(images, fingerprint, parents, skip_bad, report)
        check_learnable(replace(images, targets=activations.targets))  # those left out may have been a class's last
        task, rival = self._train(name, images, activations, parents, config, on_epoch, report)
        metrics = dict(task.metrics)
        if test_images is not None:
            scored = self._score([task, rival], test_images, skip_bad, report)
            metrics["test"], metrics["regression"] = (
                scored[name].metrics,
                metrics["regression"] | {"test": scored[rival.name].metrics},
            )
        counts = activations.targets.bincount(minlength=len(images.labels)).tolist()
        data = {"run": run, "num_images": len(activations), "counts": counts, "skipped": list(activations.skipped)}
        finished = replace(task, metrics=metrics, data=data)
        self.registry.add_backbone(self.backbone.record())
        return self.registry.register(finished, golden(self.backbone, finished), new_version=new_version)

    def evaluate(self, ref: str, data: Data, skip_bad: bool = False, report: Report | None = None) -> EvaluationRecord:
        """Scores a registered task and records the result.

        Args:
            ref: the task.
            data: as for `learn`; of data that holds train and test, the test part.
            skip_bad: leave out images that cannot be read.
            report: told of the progress.

        Raises:
            DataError: the images cannot be scored, or have other classes.
            UnknownTaskError: there is no such task.
        """
        task = self.registry.get(ref)
        images = check_same_labels(task.labels, open_images(data, "test"), task.objective)
        scored = self._score([task], images, skip_bad, report)[task.name]
        fingerprint = numerics_fingerprint(numerics(self.backbone))
        return self.registry.add_evaluation(
            task.ref, images.fingerprint(), fingerprint, scored.metrics, scored.logits_digest
        )

    def _activations(
        self, images: LabelledImages, fingerprint: str, parents: Sequence[Task], skip_bad: bool, report: Report | None
    ) -> Activations:
        """The activations of some images; those of the last run are kept, for a next one on the same images."""
        key = (fingerprint, tuple(parent.sha256 for parent in parents))
        if self._last is None or self._last[0] != key:
            self._last = None  # frees the memory before it is taken anew
            self._last = key, compute_activations(self.backbone, images, _family(parents), skip_bad, report)
        return self._last[1]

    def _train(
        self,
        name: str,
        images: LabelledImages,
        activations: Activations,
        parents: tuple[Task, ...],
        config: LearnConfig,
        on_epoch: OnEpoch | None,
        report: Report | None,
    ) -> tuple[Task, Task]:
        """Sweeps, chooses by validation, refits. Returns the task, with what validation said, and its rival."""
        pooled, targets = activations.pooled, activations.targets
        everything = torch.arange(len(targets))
        train, validation = _split(targets, len(images.labels), config)
        strength = choose_strength(pooled, targets, config.seed)
        fitted = fit_regression(pooled[train], targets[train], strength)
        rival_logits = F.linear(pooled[validation], fitted.weight, fitted.bias)
        metrics: dict[str, Any] = {
            "regression": {
                "strength": strength,
                "validation": score(rival_logits, targets[validation], images.labels, images.objective),
            }
        }
        last = fit_regression(pooled, targets, strength) if config.refit else fitted
        rival = _as_task(RIVAL, self.backbone, images.labels, None, last, (), config)
        if config.head_only:
            return replace(
                rival, name=name, metrics=metrics | {"validation": metrics["regression"]["validation"]}
            ), rival

        def step(done: int, total: int, standing: str) -> None:
            if report is not None:
                report(f"training, {standing}", done, total)

        trainer = Trainer(self.backbone, activations, self._parent_memory(parents), config, step)
        snapshots, history = trainer.run(
            fitted, config.learning_rates, train, validation, config.epochs, on_epoch, "sweep"
        )
        rival_loss = F.cross_entropy(rival_logits, targets[validation]).item() if config.fall_back else math.inf
        best, epoch = _choose(history, rival_loss)
        metrics["candidates"] = _table(history)
        metrics["curves"] = [{"train_loss": e.train_loss, "validation_loss": e.validation_loss} for e in history[1:]]
        metrics["chosen"] = {"learning_rate": None if best is None else config.learning_rates[best], "epoch": epoch}
        if best is None:
            chosen = Candidate.regression(self.backbone, last, config)
            metrics["validation"] = metrics["regression"]["validation"]
        else:
            chosen = snapshots[epoch][best]
            logits = trainer.validation_logits([_on(chosen, self.backbone)], validation)[:, 0]
            metrics["validation"] = score(logits, targets[validation], images.labels, images.objective)
            if config.refit:
                rate, nothing = config.learning_rates[best], everything[:0]
                refitted, _ = trainer.run(last, [rate], everything, nothing, epoch, on_epoch, "refit")
                chosen = refitted[-1][0]
        return replace(
            _as_task(name, self.backbone, images.labels, chosen, last, parents, config), metrics=metrics
        ), rival

    def _parent_memory(self, parents: Sequence[Task]) -> list[KeyValue]:
        """For each layer the memory keys and values of all that a task would see, [1, H, m, d]."""
        family = [task for task in _family(parents) if task.num_memory_tokens]
        store = TileStore(self.backbone)
        layers = zip(*(store.memory(task) for task in family), strict=True)
        return [
            KeyValue(*(torch.cat(parts, dim=1).unsqueeze(0) for parts in zip(*layer, strict=True))) for layer in layers
        ]

    def _score(
        self, tasks: Sequence[Task], images: LabelledImages, skip_bad: bool, report: Report | None
    ) -> dict[str, _Scored]:
        """Runs the combined model of some tasks over every image, once."""
        model = CombinedModel(self.backbone, tasks)
        logits: dict[str, list[Tensor]] = {task.name: [] for task in tasks}
        kept: list[int] = []

        def flush(batch: list[tuple[int, Tensor]]) -> None:
            kept.extend(index for index, _ in batch)
            for name, part in model(torch.stack([image for _, image in batch])).items():
                logits[name].append(part.cpu())

        read_in_batches(images, self.backbone, model.micro_batch, flush, skip_bad, "scoring test images", report)
        targets = images.targets[torch.tensor(kept, dtype=torch.long)]
        joined = {name: torch.cat(parts) for name, parts in logits.items()}
        return {
            name: _Scored(score(values, targets, images.labels, images.objective), tensor_digest(values))
            for name, values in joined.items()
        }


@dataclass(frozen=True)
class _Scored:
    metrics: dict[str, Any]
    logits_digest: str


def _family(parents: Sequence[Task]) -> list[Task]:
    """All that a task with these parents sees."""
    seen = {task.sha256: task for parent in parents for task in (*parent.closure, parent)}
    return list(seen.values())


def _split(targets: Tensor, num_classes: int, config: LearnConfig) -> tuple[Tensor, Tensor]:
    """Training and validation rows: stratified and seeded, at least one image of each class to learn from."""
    held_out = max(num_classes, round(config.validation_fraction * len(targets)))
    train, validation = train_test_split(
        range(len(targets)), test_size=held_out, stratify=targets.tolist(), random_state=config.seed
    )
    return torch.tensor(train), torch.tensor(validation)


def _choose(history: Sequence[Epoch], regression_loss: float) -> tuple[int | None, int]:
    """The candidate and epoch of least validation loss; no candidate where the regression's is less."""
    finite = [
        (loss, epoch, candidate)
        for epoch, record in enumerate(history)
        for candidate, loss in enumerate(record.validation_loss)
        if epoch > 0 and math.isfinite(loss)
    ]
    if not finite:
        raise TrainingError("Every candidate's loss became infinite or NaN. Try smaller learning rates.")
    loss, epoch, candidate = min(finite)
    return (candidate, epoch) if loss < regression_loss else (None, 0)


def _table(history: Sequence[Epoch]) -> list[dict[str, Any]]:
    """Each candidate at its best epoch."""
    rows = []
    for i, rate in enumerate(history[0].learning_rates):
        losses = [e.validation_loss[i] if math.isfinite(e.validation_loss[i]) else math.inf for e in history]
        best = min(range(1, len(history)), key=losses.__getitem__)
        diverged = math.isinf(losses[best])
        rows.append(
            {
                "learning_rate": rate,
                "epoch": best,
                "validation_loss": None if diverged else losses[best],
                "validation_accuracy": None if diverged else history[best].validation_accuracy[i],
            }
        )
    return rows


def _on(candidate: Candidate, backbone: FrozenBackbone) -> Candidate:
    return Candidate(candidate.learning_rate, *(tensor.to(backbone.device) for tensor in candidate.tensors))


def _as_task(
    name: str,
    backbone: FrozenBackbone,
    labels: tuple[str, ...],
    candidate: Candidate | None,
    regression: Regression,
    parents: tuple[Task, ...],
    config: LearnConfig,
) -> Task:
    """What was trained, as a task; without a candidate, the regression as a head-only task."""
    common: dict[str, Any] = {
        "name": name,
        "backbone": backbone.fingerprint,
        "labels": labels,
        "config": config.to_json(),
    }
    if candidate is None:
        return Task(**common, head_weight=regression.weight, head_bias=regression.bias)
    return Task(
        **common,
        head_weight=candidate.head_weight,
        head_bias=candidate.head_bias,
        class_token=candidate.class_token,
        memory=candidate.memory,
        pooled_weight=candidate.pooled_weight,
        parents=parents,
    )
