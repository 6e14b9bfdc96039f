"""The learner trains a task on images and registers it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from addenda.backbones import FrozenBackbone, counted, plain
from addenda.combined import feature_statistics, golden, numerics, numerics_fingerprint
from addenda.exceptions import DataError, NameTakenError, RegistryError, RetiredError, TrainingError
from addenda.learner.activation_cache import ActivationCache
from addenda.learner.activations import Activations
from addenda.learner.augmentation import Augmentation
from addenda.learner.context import OnEpoch, Report, RunContext, silent
from addenda.learner.data import Data, LabelledImages, check_learnable, check_same_labels, open_images, open_parts
from addenda.learner.data.labelled import alike, unreadable
from addenda.learner.data.openers import repeats
from addenda.learner.evaluation import check_readable, score
from addenda.learner.growing import Growth, warn_of_repeats
from addenda.learner.learn_config import LearnConfig
from addenda.learner.learning_run import LearningRun
from addenda.registry import (
    BASELINES,
    Evaluation,
    EvaluationRecord,
    FeatureStatistics,
    Registry,
    Task,
    TaskFilter,
    TaskRecord,
    canonical_json,
    check_new_name,
    digest,
)
from addenda.text import shown

OTHER_NUMERICS = (
    "numerics, from these images with these settings: the number of threads (OMP_NUM_THREADS), the device or torch's "
    "version has changed since"
)

log = logging.getLogger(__name__)


class Learner:
    """Learns tasks on one backbone and registers them.

    Args:
        backbone: the frozen backbone; everything runs on its device.
        registry: the registry that receives the tasks.
        cache: the activation cache. Default: `ActivationCache()`.

    Examples:
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
        """Learns a task and registers it; on an error, nothing is registered.

        Hyperparameters and the number of epochs are chosen on a validation split of `train`. The test split is
        evaluated once, by the combined model, after everything is chosen. File names and the order of images have no
        influence on the result.

        Args:
            name: the task's name; "auto", "combined", "features" and "none" are reserved.
            train: a folder of class folders, a CSV or Parquet listing, a torch Dataset or a Hugging Face dataset. A
                folder, listing or DatasetDict may hold train and test splits.
            test: data to evaluate on, likewise. Default: the test split of `train`, if it has one.
            config: the settings.
            new_version: register a new version if the name is already taken.
            skip_bad: skip missing and unreadable images in both splits.
            on_epoch: called after each epoch.
            report: progress callback.

        Returns:
            The registered task. If a registered version has the same name, data, settings and numerics, that version
            is returned; it is evaluated on the given test split if it was not before, and `metrics["test"]` is of
            that split.

        Raises:
            BackboneError: a setting asks for tokens that the backbone cannot carry.
            DataError: the images cannot be used for training.
            NameTakenError: the name is registered with other content.
            RetiredError: the same task was learned before and retired; pass `new_version` to register it again.
            TrainingError: every candidate diverged.
        """
        with plain(self.backbone.device, grad=True):
            context = RunContext(skip_bad, report or silent, on_epoch or silent)
            return self._learn(name, train, test, config or LearnConfig(), new_version, context)

    def _learn(
        self, name: str, train: Data, test: Data | None, config: LearnConfig, new_version: bool, context: RunContext
    ) -> Task:
        check_new_name(name)
        auto = config.extends == "auto"
        config, parents = self._tokens(name, config)
        images, test_images = open_parts(train, test, context.skip_bad)
        _log_remarks(images)
        if test_images is not None:
            _log_remarks(test_images)
        config = replace(config, augmentation=_augmentation(config, images))
        if config.group_by is not None:
            images = images.grouped_by(config.group_by)
        images = images.hashed()
        fingerprint = numerics_fingerprint(numerics(self.backbone))
        run: dict[str, Any] = {
            "data": images.fingerprint(),
            "config": config.to_json(),
            "extends": "auto" if auto else [parent.sha256 for parent in parents],
            "numerics": fingerprint,
        }
        registered = self._find_registered(name, images, run, new_version, context)
        if registered is not None:
            return self._reuse(registered.ref, images, test_images, context)

        test_data: dict[str, Any] = {}
        if test_images is not None:  # fail on bad test images before hours of training
            test_images, skipped = check_readable(self.backbone, test_images, context)
            test_data["test"] = {"skipped": skipped, "left_out": counted(test_images.left_out)}
        repeated = repeats(images, test_images)
        pool = None
        if auto:  # without tasks whose tokens were refitted to this run's validation images
            stored = self.registry.load(self.backbone)
            others = (task for task in stored if task.data.get("run", {}).get("data") != run["data"])
            pool = [task for task in others if task.class_token is not None]
        tokens = not config.head_only
        extended = parents if tokens else ()
        activations = Activations(self.backbone, images, config.augmentation, self.cache, extended, context, tokens)
        readable = replace(images, targets=activations.targets)
        check_learnable(readable)  # a class may have lost its last image
        identity = run | {"name": name, "backbone": self.backbone.fingerprint, "skipped": activations.skipped}
        checkpoint = self.cache.checkpoint(digest(canonical_json(identity).encode()))
        learning_run = LearningRun(name, activations, config, replace(context, checkpoint=checkpoint))
        learning_run.log_warnings()
        try:
            task = learning_run.task(parents, pool)
        except TrainingError:
            if checkpoint is not None:
                checkpoint.clear()
            raise
        data = {
            "run": run,
            "num_images": len(readable),
            "counts": readable.counts,
            "skipped": [shown(text) for text in (*images.lost, *activations.skipped)],
            "left_out": counted(images.left_out),
            "repeated": repeated,
            "near_duplicates": learning_run.near_duplicates,
        }
        statistics = None
        if activations.objective.routable:
            statistics = feature_statistics(
                activations.pooled, activations.targets, activations.num_classes, activations.layers[0],
                activations.digests,
            )  # fmt: skip
        task = replace(task, data=data | test_data)
        registered_task = self._register(task, statistics, learning_run.baselines, test_images, new_version, context)
        if checkpoint is not None:
            checkpoint.clear()
        return registered_task

    def _tokens(self, name: str, config: LearnConfig) -> tuple[LearnConfig, tuple[Task, ...]]:
        """Checks what the settings say of tokens; returns them as the backbone allows, and the tasks to extend."""
        if config.head_only and (asked := config.settings_of_tokens):
            raise TrainingError(
                f"head_only trains no token, so {', '.join(asked)} would have no effect. Remove either."
            )
        if self.backbone.token_obstacle() is not None:
            for setting in config.settings_of_tokens:
                self.backbone.check_tokens(f"The setting {setting}")
            config = replace(config, head_only=True)
        parents = () if config.extends == "auto" else tuple(self.registry.get(ref) for ref in config.extends)
        for parent in parents:
            if parent.class_token is None:
                raise RegistryError(
                    f"Task {parent.ref!r} is head-only: it has no token that {name!r} could extend. To give it one, "
                    "learn it again with `fall_back: false`."
                )
        return config, parents

    def grow(
        self, ref: str, data: Data, test: Data | None = None, skip_bad: bool = False, report: Report | None = None
    ) -> Task:
        """Registers the next version of a task, with further classes or further images, without its earlier images.

        The new version is a head in closed form from the statistics of the earlier images and of the new ones; it has
        no token. Labels keep their positions; new ones follow in sorted order. The earlier version does not change.

        Args:
            ref: the registered task.
            data: the new images, as for `learn`, of new and known classes. Images that the task was learned from are
                left out.
            test: data to evaluate on, likewise, of any of the classes. Default: the test split of `data`, if any.
            skip_bad: skip missing and unreadable images in both splits.
            report: progress callback.

        Returns:
            The registered version. If it is registered already, nothing is done but to evaluate a new test split.

        Raises:
            BackboneError: the task is on another backbone.
            DataError: the images cannot be used, or none is new.
            RegistryError: the task has no routing statistics, or is multi-label.
            UnknownTaskError: the task is not registered.
        """
        with plain(self.backbone.device):
            return self._grow(ref, data, test, RunContext(skip_bad, report or silent))

    def _grow(self, ref: str, data: Data, test: Data | None, context: RunContext) -> Task:
        growth = Growth.of(self.registry, ref, self.backbone)
        images, test_images = growth.open(data, test, context.skip_bad)
        _log_remarks(images)
        images = images.hashed()
        fingerprint = numerics_fingerprint(numerics(self.backbone))
        run = {"data": images.fingerprint(), "grown_from": growth.task.sha256, "numerics": fingerprint}
        registered = self._find_registered(growth.task.name, images, run, True, context)
        if registered is not None:
            return self._reuse(registered.ref, images, test_images, context)
        test_data: dict[str, Any] = {}
        if test_images is not None:
            _log_remarks(test_images)
            test_images, skipped = check_readable(self.backbone, test_images, context)
            test_data["test"] = {"skipped": skipped, "left_out": counted(test_images.left_out)}
            warn_of_repeats(growth.task.ref, growth.statistics, test_images)
        new = growth.new_images(images)
        activations = Activations(self.backbone, new, Augmentation(views=0), self.cache, context=context, tokens=False)
        task, statistics = growth.version(activations, run["data"], len(images) - len(new))
        data_record = {
            "run": run,
            "skipped": [shown(text) for text in (*images.lost, *activations.skipped)],
            "left_out": counted(images.left_out),
            "repeated": repeats(images, test_images),
        }
        task = replace(task, data={**task.data, **data_record, **test_data})
        return self._register(task, statistics, (), test_images, True, context)

    def _register(
        self,
        task: Task,
        statistics: FeatureStatistics | None,
        probes: Sequence[Task],
        test_images: LabelledImages | None,
        new_version: bool,
        context: RunContext,
    ) -> Task:
        """Evaluates a task and its probes on the test split, if there is one, and registers the task."""
        metrics, evaluations = dict(task.metrics), []
        if test_images is not None:
            ((metrics["test"], logits_digest), *scores), _, _ = score(
                self.backbone, [task, *probes], test_images, context
            )
            for probe, (of_probe, _) in zip(probes, scores, strict=True):
                key = probe.name.replace(" ", "_")
                metrics[key] = metrics[key] | {"test": of_probe}
            fingerprint = numerics_fingerprint(numerics(self.backbone))
            evaluations.append(Evaluation(test_images.fingerprint(), fingerprint, metrics["test"], logits_digest))
        if statistics is not None and statistics.excess is not None:
            log.warning("A router cannot choose this task: %s.", statistics.excess)
            statistics = None
        finished = replace(task, metrics=metrics)
        self.registry.add_backbone(self.backbone.record())
        golden_probe = golden(self.backbone, finished)
        return self.registry.register(finished, golden_probe, statistics, new_version, evaluations)

    def _find_registered(
        self, name: str, images: LabelledImages, run: Mapping[str, Any], new_version: bool, context: RunContext
    ) -> TaskRecord | None:
        """Finds the active version that the same run registered; raises if the name is taken by another task."""
        versions = self.registry.tasks(TaskFilter(name=name, retired=True))
        comparable = [
            record
            for record in versions
            if record.labels == images.labels and record.backbone == self.backbone.fingerprint
        ]
        same = [record for record in comparable if record.data.get("run") == run]
        active = next((record for record in same if record.retired is None), None)
        if active is not None:
            if active.data.get("skipped") and not context.skip_bad:
                check_readable(self.backbone, images, context)  # names the files where they are now
                raise unreadable(active.data["skipped"], len(images) + len(images.lost), images.where)
            return active
        if same and not new_version:
            raise RetiredError(same[-1].ref, same[-1].retired or "")
        if versions and not new_version:
            for record in reversed(comparable):
                if {**record.data.get("run", {}), "numerics": None} == {**run, "numerics": None}:
                    raise NameTakenError(name, record.version, OTHER_NUMERICS)
            raise NameTakenError(name, versions[-1].version)
        return None

    def _reuse(self, ref: str, train: LabelledImages, test: LabelledImages | None, context: RunContext) -> Task:
        """Returns a registered version with its metrics on `test`, which is evaluated now if it was not before."""
        task = self.registry.get(ref)
        if test is None:
            return task
        images, skipped = test.hashed(), list[str]()
        evaluations = {record.data_fingerprint: record for record in self.registry.evaluations(ref)}
        if images.lost or images.fingerprint() not in evaluations:
            images, skipped = check_readable(self.backbone, images, context)
        record = evaluations.get(images.fingerprint()) or self._evaluate(task, images, context)[0]
        result = copy(task)
        scored = task.metrics.get("test")
        if scored is None or not scored.items() <= record.metrics.items():  # which may also count what was skipped
            probes = {  # without their test metrics, which are of the earlier test split
                key: {split: metrics for split, metrics in task.metrics[key].items() if split != "test"}
                for key in BASELINES.keys() & task.metrics.keys()
            }
            vars(result)["metrics"] = {**task.metrics, **probes, "test": record.metrics}
        test_data = {"skipped": skipped, "left_out": counted(images.left_out)}
        vars(result)["data"] = {**task.data, "test": test_data, "repeated": repeats(train, images)}
        return result

    def evaluate(self, ref: str, data: Data, skip_bad: bool = False, report: Report | None = None) -> EvaluationRecord:
        """Evaluates a registered task and records the result.

        Args:
            ref: the task.
            data: data as for `learn`; its test split, if it has train and test splits.
            skip_bad: skip missing and unreadable images; `metrics["skipped"]` counts them.
            report: progress callback.

        Raises:
            DataError: the images cannot be read, or their classes differ from the task's.
            UnknownTaskError: the task is not registered.
        """
        task = self.registry.get(ref)
        with plain(self.backbone.device):
            images = check_same_labels(task.labels, open_images(data, "test"), task.objective).check_whole(skip_bad)
            _log_remarks(images)
            if not isinstance(images.items, list):  # read twice, to detect a Dataset whose images change
                images = images.hashed()
            record, scored = self._evaluate(task, images, RunContext(skip_bad, report or silent))
        warn_of_repeats(task.ref, self.registry.statistics(ref), scored)
        return record

    def _evaluate(
        self, task: Task, images: LabelledImages, context: RunContext
    ) -> tuple[EvaluationRecord, LabelledImages]:
        """Evaluates a task and records the result; also returns the images that were scored."""
        ((metrics, logits_digest),), scored, bad = score(self.backbone, [task], images, context)
        counts = {"skipped": len(scored.lost) + len(bad), "left_out": counted(scored.left_out)}
        metrics |= {key: value for key, value in counts.items() if value}
        fingerprint = numerics_fingerprint(numerics(self.backbone))
        record = self.registry.add_evaluation(task.ref, scored.fingerprint(), fingerprint, metrics, logits_digest)
        return record, scored


def _augmentation(config: LearnConfig, images: LabelledImages) -> Augmentation:
    """The settings of the random views; none for a linear probe alone, and tensors have none."""
    if not images.can_vary and (config.augmentation.views or config.augmentation.fresh):
        raise DataError(
            f"{images.where} holds tensors, of which there are no random views. Set views to 0 and do not set fresh, "
            "or pass PIL images."
        )
    return config.augmentation.resolved(images.can_vary and not (config.head_only and not config.layer_head))


def _log_remarks(images: LabelledImages) -> None:
    """Logs what was left out of a dataset, and warns if it has only one class."""
    if images.remarks:
        only_hidden = images.left_out.keys() <= {"hidden"} and not images.deeper
        log.log(logging.INFO if only_hidden else logging.WARNING, "%s", images.remarks)
    if images.objective.is_settled(len(images.labels)):
        log.warning("%s has one class: every prediction will be %r.", images.where, images.labels[0])
    if pair := alike(images.labels):
        log.warning("%r and %r are learned as two classes. If they are one, give them one name.", *pair)
