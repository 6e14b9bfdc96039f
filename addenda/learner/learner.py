"""The learner: images in, a registered task out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined import CombinedModel, TileStore, golden, numerics, numerics_fingerprint, tensor_digest
from addenda.exceptions import NameTakenError, RegistryError, TrainingError
from addenda.learner.activations import Activations
from addenda.learner.cache import RUNS, ActivationCache
from addenda.learner.calibration import fit_temperature
from addenda.learner.candidates import Candidate, as_fields, silenced
from addenda.learner.checkpoint import Checkpoint
from addenda.learner.config import LearnConfig
from addenda.learner.data import Data, LabelledImages, check_learnable, check_same_labels, open_images, open_parts
from addenda.learner.metrics import score
from addenda.learner.objectives import loss
from addenda.learner.reading import Report, read_in_batches
from addenda.learner.regression import choose_strength, fit_regression
from addenda.learner.splitting import split
from addenda.learner.training import Epoch, OnEpoch, Trainer
from addenda.registry import EvaluationRecord, Registry, Task, canonical_json, check_name, digest

RIVAL = "logistic regression"
"""What the rival is called beside the task; no task can have this name."""


class Learner:
    """Learns tasks on one backbone and registers them.

    Args:
        backbone: the frozen backbone; it says on which device all happens.
        registry: where the tasks go.
        cache: where activations are kept for later runs on the same images.

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

    def __init__(self, backbone: FrozenBackbone, registry: Registry, cache: ActivationCache | None = None) -> None:
        self.backbone = backbone
        self.registry = registry
        self.cache = cache or ActivationCache()

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
        images, test_images = open_parts(train, test)
        digests = [images.digest(index) for index in range(len(images))]
        fingerprint = images.fingerprint(digests)
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

        activations = Activations(
            self.backbone, images, config.augmentation, self.cache, _family(parents), digests, skip_bad, report
        )
        kept = replace(images, targets=activations.targets)
        check_learnable(kept)  # those left out may have been a class's last
        identity = canonical_json(run | {"backbone": self.backbone.fingerprint, "skipped": activations.skipped})
        checkpoint = Checkpoint(self.cache.folder / RUNS / digest(identity.encode())[:16])
        try:
            task, rival = self._train(name, images, activations, parents, config, checkpoint, on_epoch, report)
        except TrainingError:
            checkpoint.clear()
            raise
        metrics = dict(task.metrics)
        if test_images is not None:
            scored = self._score([task, rival], test_images, skip_bad, report)
            metrics["test"], metrics["regression"] = (
                scored[name].metrics,
                metrics["regression"] | {"test": scored[rival.name].metrics},
            )
        data = {"run": run, "num_images": len(kept), "counts": kept.counts, "skipped": list(activations.skipped)}
        finished = replace(task, metrics=metrics, data=data)
        self.registry.add_backbone(self.backbone.record())
        registered = self.registry.register(finished, golden(self.backbone, finished), new_version=new_version)
        checkpoint.clear()
        return registered

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

    def _train(
        self,
        name: str,
        images: LabelledImages,
        activations: Activations,
        parents: tuple[Task, ...],
        config: LearnConfig,
        checkpoint: Checkpoint,
        on_epoch: OnEpoch | None,
        report: Report | None,
    ) -> tuple[Task, Task]:
        """Sweeps, chooses by validation, refits. Returns the task, with what validation said, and its rival."""
        pooled, targets, objective = activations.pooled, activations.targets, images.objective
        train, validation = split(targets, len(images.labels), config.validation_fraction, config.first_seed)
        strength = choose_strength(pooled, targets, config.first_seed)
        fitted = fit_regression(pooled[train], targets[train], strength)
        last = fit_regression(pooled, targets, strength) if config.refit else fitted

        def judged(logits: Tensor) -> tuple[float, dict[str, Any]]:
            """The temperature that validation logits ask for, and their scores under it."""
            temperature = fit_temperature(logits, targets[validation], objective) if config.calibrate else 1.0
            return temperature, score(logits / temperature, targets[validation], images.labels, objective)

        rival_logits = F.linear(pooled[validation], fitted.weight, fitted.bias)
        temperature, scores = judged(rival_logits)
        plain = Task(
            name=RIVAL,
            backbone=self.backbone.fingerprint,
            labels=images.labels,
            objective=objective,
            temperature=temperature,
            config=config.to_json(),
            head_weight=last.weight,
            head_bias=last.bias,
        )
        metrics: dict[str, Any] = {"regression": {"strength": strength, "validation": scores}, "validation": scores}
        if config.head_only:
            return replace(plain, name=name, metrics=metrics), plain

        def step(done: int, total: int, standing: str) -> None:
            if report is not None:
                report(f"training, {standing}", done, total)

        trainer = Trainer(activations, self._parent_memory(parents), config, checkpoint, step)
        candidates, history = trainer.run(
            fitted, config.candidates, train, validation, config.epochs, on_epoch, "sweep"
        )
        bar = loss(rival_logits, targets[validation], objective).item() if config.fall_back else math.inf
        chosen = _choose(candidates, bar)
        metrics |= _record(candidates, history, chosen)
        tensors = silenced(self.backbone, last, config.candidates[0], config.memory_std)
        if chosen is not None:
            tensors = chosen.best.tensors
            temperature, metrics["validation"] = judged(trainer.logits(tensors, validation))
            if config.refit:
                everything, nothing = torch.arange(len(targets)), torch.empty(0, dtype=torch.long)
                (refitted,), _ = trainer.run(
                    last, [chosen.settings], everything, nothing, chosen.best.epoch, on_epoch, "refit"
                )
                if refitted.stopped is None:
                    tensors = refitted.best.tensors
        whole = replace(plain, name=name, parents=parents, temperature=temperature, metrics=metrics)
        return replace(whole, **as_fields(tensors)), plain

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

        def take(batch: list[tuple[int, Tensor]]) -> None:
            kept.extend(index for index, _ in batch)
            for name, part in model(torch.stack([image for _, image in batch])).items():
                logits[name].append(part.cpu())

        def read(index: int) -> Tensor:
            return images.read(index, self.backbone)

        size, what = model.micro_batch, "scoring test images"
        count = len(images)
        read_in_batches(range(count), read, size, take, images.where, count, skip_bad, what, report)
        targets = images.targets[torch.tensor(kept, dtype=torch.long)]
        joined = {name: torch.cat(parts) for name, parts in logits.items()}
        return {
            task.name: _Scored(
                score(joined[task.name] / task.temperature, targets, images.labels, images.objective),
                tensor_digest(joined[task.name]),
            )
            for task in tasks
        }


@dataclass(frozen=True)
class _Scored:
    metrics: dict[str, Any]
    logits_digest: str


def _family(parents: Sequence[Task]) -> list[Task]:
    """All that a task with these parents sees."""
    seen = {task.sha256: task for parent in parents for task in (*parent.closure, parent)}
    return list(seen.values())


def _choose(candidates: Sequence[Candidate], regression_loss: float) -> Candidate | None:
    """The candidate of least validation loss; None where the regression's is less."""
    best = min(candidates, key=lambda candidate: candidate.best.loss)
    if best.best.epoch == 0:
        raise TrainingError("Every candidate's loss became infinite or NaN. Try smaller learning rates.")
    return best if best.best.loss < regression_loss else None


def _record(candidates: Sequence[Candidate], history: Sequence[Epoch], chosen: Candidate | None) -> dict[str, Any]:
    """What the task's record keeps of a sweep: each candidate at its best epoch, all losses, and what was chosen."""
    rows = []
    for i, candidate in enumerate(candidates):
        best = candidate.best
        rows.append(
            candidate.settings._asdict()
            | {
                "epoch": best.epoch,
                "validation_loss": best.loss if best.epoch else None,
                "validation_accuracy": history[best.epoch - 1].validation_accuracy[i] if best.epoch else None,
                "stopped": candidate.stopped,
            }
        )
    curves = [
        {"train_loss": _finite(epoch.train_loss), "validation_loss": _finite(epoch.validation_loss)}
        for epoch in history
    ]
    picked = None if chosen is None else chosen.settings._asdict() | {"epoch": chosen.best.epoch}
    return {"candidates": rows, "curves": curves, "chosen": picked}


def _finite(values: Sequence[float]) -> list[float | None]:
    """A candidate that trains no more, or has diverged, has no loss."""
    return [value if math.isfinite(value) else None for value in values]
