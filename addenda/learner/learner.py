"""The learner: images in, a registered task out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from addenda.backbones import FrozenBackbone, counted, plain
from addenda.combined import CombinedModel, feature_statistics, golden, numerics, numerics_fingerprint, tensor_digest
from addenda.exceptions import NameTakenError, RegistryError, RetiredError, TrainingError
from addenda.learner.activation_cache import ActivationCache
from addenda.learner.activations import Activations
from addenda.learner.context import OnEpoch, Report, RunContext, silent
from addenda.learner.data import Data, LabelledImages, check_learnable, check_same_labels, open_images, open_parts
from addenda.learner.data.labelled import Item, read_in_batches, unreadable
from addenda.learner.data.openers import repeats
from addenda.learner.learn_config import LearnConfig
from addenda.learner.learning_run import LearningRun
from addenda.learner.objectives import OBJECTIVES
from addenda.registry import (
    BASELINES,
    Evaluation,
    EvaluationRecord,
    Registry,
    Task,
    TaskFilter,
    TaskRecord,
    canonical_json,
    check_new_name,
    digest,
)
from addenda.text import shown

BY_CONTENT = "2:"
"""Before the digest of logits in the order of the images' contents; version 0.1 hashed them in that of the files."""

log = logging.getLogger(__name__)


class Learner:
    """Learns tasks on one backbone and registers them.

    Args:
        backbone: the frozen backbone; it says on which device all happens.
        registry: where the tasks go.
        cache: where activations are kept for later runs on the same images.

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
        """Learns a task and registers it, or registers nothing.

        A validation part is held out of `train` to choose the learning rate and the number of epochs. The test set is
        scored once, by the combined model, after everything is chosen. Order and names of the images decide nothing.

        Args:
            name: the task's name; not one of "auto", "combined" and "none", which mean something else.
            train: a folder of class folders, a CSV or Parquet listing, a torch Dataset or a Hugging Face one; a folder,
                listing or DatasetDict may hold train and test.
            test: likewise; None takes the test part of `train` where there is one.
            config: the settings.
            new_version: whether a name already taken gets a further version.
            skip_bad: leave out images that cannot be had or read, of either part.
            on_epoch: called after each epoch.
            report: told of the progress: what is done, how much, of how much.

        Returns:
            The registered task. The same name, data, settings and numerics as a registered version give that version;
            a test set that it was not scored on is scored, and `metrics["test"]` is of the set that was given.

        Raises:
            DataError: the images cannot be learned from.
            NameTakenError: the name is taken by other content.
            RetiredError: it was learned before and retired; `new_version` has it active again.
            TrainingError: no candidate stayed finite.
        """
        with plain(self.backbone.device, grad=True):
            context = RunContext(skip_bad, report or silent, on_epoch or silent)
            return self._learn(name, train, test, config or LearnConfig(), new_version, context)

    def _learn(
        self, name: str, train: Data, test: Data | None, config: LearnConfig, new_version: bool, context: RunContext
    ) -> Task:
        check_new_name(name)
        auto = config.extends == "auto"
        parents = () if auto else tuple(self.registry.get(ref) for ref in config.extends)
        for parent in parents:
            if parent.class_token is None:
                raise RegistryError(
                    f"Task {parent.ref!r} is head-only: it has no token that {name!r} could see. Learned again with "
                    "`fall_back: false` in its settings it keeps one."
                )
        images, test_images = open_parts(train, test, context.skip_bad)
        for part in filter(None, (images, test_images)):
            _remark_on(part)
        varied = config.augmentation.resolved(images.can_vary and not (config.head_only and not config.layer_head))
        config = replace(config, augmentation=varied)
        if config.group_by is not None:
            images = images.grouped_by(config.group_by)
        images = images.hashed()
        here = numerics_fingerprint(numerics(self.backbone))
        run = {
            "data": images.fingerprint(),
            "config": config.to_json(),
            "extends": "auto" if auto else [parent.sha256 for parent in parents],
            "numerics": here,
        }
        known = self._known(name, images, run, new_version, context.skip_bad)
        if known is not None:
            return self._again(known.ref, test_images, context)

        test_data: dict[str, Any] = {}
        if test_images is not None:  # all that can be found out before hours of training
            test_images, skipped = self._checked(test_images, context)
            test_data["test"] = {"skipped": skipped, "left_out": counted(test_images.left_out)}
        pool = [task for task in self.registry.load(self.backbone) if task.class_token is not None] if auto else None
        tokens = not config.head_only
        seen = parents if tokens else ()
        activations = Activations(self.backbone, images, config.augmentation, self.cache, seen, context, tokens)
        kept = replace(images, targets=activations.targets)
        check_learnable(kept)  # those left out may have been a class's last
        told = {"name": name, "backbone": self.backbone.fingerprint, "skipped": activations.skipped}
        identity = digest(canonical_json(run | told).encode())
        checkpoint = self.cache.checkpoint(identity)
        started = LearningRun(name, activations, config, replace(context, checkpoint=checkpoint))
        for remark in started.remarks():
            log.warning("%s", remark)
        try:
            task = started.task(parents, pool)
        except TrainingError:
            checkpoint.clear()
            raise
        metrics, evaluations = dict(task.metrics), []
        if test_images is not None:
            every = [task, *started.baselines]
            ((metrics["test"], logits_digest), *probes), _, _ = self._score(
                every, test_images, RunContext(report=context.report)
            )
            for baseline, (scores, _) in zip(started.baselines, probes, strict=True):
                key = baseline.name.replace(" ", "_")
                metrics[key] = metrics[key] | {"test": scores}
            evaluations.append(Evaluation(test_images.fingerprint(), here, metrics["test"], logits_digest))
        repeated = repeats(images, test_images)
        _warn_of(repeated, test_images)
        data = {
            "run": run,
            "num_images": len(kept),
            "counts": kept.counts,
            "skipped": [shown(text) for text in (*images.lost, *activations.skipped)],
            "left_out": counted(images.left_out),
            "repeated": repeated,
            "near_duplicates": started.near_duplicates,
        }
        finished = replace(task, metrics=metrics, data=data | test_data)
        statistics = None
        if activations.objective.routable:
            statistics = feature_statistics(activations.pooled, activations.targets, activations.num_classes)
            if statistics.excess is not None:
                log.warning("No router will know of this task: %s.", statistics.excess)
                statistics = None
        self.registry.add_backbone(self.backbone.record())
        probe = golden(self.backbone, finished)
        registered = self.registry.register(finished, probe, statistics, new_version, evaluations)
        checkpoint.clear()
        return registered

    def _known(
        self, name: str, images: LabelledImages, run: Mapping[str, Any], new_version: bool, skip_bad: bool
    ) -> TaskRecord | None:
        """The active version that the same run made; refuses a name that is taken, unless by a further version."""
        versions = self.registry.tasks(TaskFilter(name=name, retired=True))
        same = [
            record
            for record in versions
            if record.data.get("run") == run and record.labels == images.labels
            if record.backbone == self.backbone.fingerprint
        ]
        active = next((record for record in same if record.retired is None), None)
        if active is not None:
            if active.data.get("skipped") and not skip_bad:
                raise unreadable(active.data["skipped"], len(images) + len(images.lost), images.where)
            return active
        if same and not new_version:
            raise RetiredError(same[-1].ref, same[-1].retired or "")
        if versions and not new_version:
            raise NameTakenError(name, versions[-1].version)
        return None

    def _again(self, ref: str, test: LabelledImages | None, context: RunContext) -> Task:
        """A version that was learned before; on a test set that it was not scored on it is scored now."""
        task = self.registry.get(ref)
        if test is None:
            return task
        images, skipped = test.hashed(), list[str]()
        known = {record.data_fingerprint: record for record in self.registry.evaluations(ref)}
        if images.lost or images.fingerprint() not in known:
            images, skipped = self._checked(images, context)
        found = known.get(images.fingerprint()) or self._evaluate(task, images, RunContext(report=context.report))
        asked = copy(task)
        if found.metrics != task.metrics.get("test"):
            others = {  # the probes' are of the test set of then
                key: {part: held for part, held in task.metrics[key].items() if part != "test"}
                for key in BASELINES.keys() & task.metrics.keys()
            }
            vars(asked)["metrics"] = {**task.metrics, **others, "test": found.metrics}
        of_test = {"skipped": skipped, "left_out": counted(images.left_out)}
        vars(asked)["data"] = {**task.data, "test": of_test}
        return asked

    def evaluate(self, ref: str, data: Data, skip_bad: bool = False, report: Report | None = None) -> EvaluationRecord:
        """Scores a registered task and records the result.

        Args:
            ref: the task.
            data: as for `learn`; of data that holds train and test, the test part.
            skip_bad: leave out images that cannot be had or read; `metrics["skipped"]` says how many.
            report: told of the progress.

        Raises:
            DataError: the images cannot be scored, or have other classes.
            UnknownTaskError: there is no such task.
        """
        task = self.registry.get(ref)
        with plain(self.backbone.device):
            images = check_same_labels(task.labels, open_images(data, "test"), task.objective).check_whole(skip_bad)
            _remark_on(images)
            if not isinstance(images.items, list):  # twice, which finds out a Dataset that gives other images each time
                images = images.hashed()
            return self._evaluate(task, images, RunContext(skip_bad, report or silent))

    def _evaluate(self, task: Task, images: LabelledImages, context: RunContext) -> EvaluationRecord:
        """Scores a registered task on some images, and records that."""
        ((metrics, logits_digest),), seen, bad = self._score([task], images, context)
        more = {"skipped": len(seen.lost) + len(bad), "left_out": counted(seen.left_out)}
        metrics |= {key: value for key, value in more.items() if value}
        here = numerics_fingerprint(numerics(self.backbone))
        return self.registry.add_evaluation(task.ref, seen.fingerprint(), here, metrics, logits_digest)

    def _checked(self, images: LabelledImages, context: RunContext) -> tuple[LabelledImages, list[str]]:
        """The images that can be read, hashed and in order, and what is wrong with the others; no pixels are kept."""
        bad: dict[int, str] = {}

        def look(row: int, item: Item) -> list[tuple[int, str]]:
            item.views(self.backbone)
            return [(row, item.digest)]

        reading = read_in_batches(images, range(len(images)), look, 1, "checking test images", context, bad)
        seen, _ = images.in_order(dict(one for batch in reading for one in batch))
        return seen, [shown(text) for text in (*images.lost, *bad.values())]

    def _score(
        self, tasks: Sequence[Task], images: LabelledImages, context: RunContext
    ) -> tuple[list[tuple[dict[str, Any], str]], LabelledImages, dict[int, str]]:
        """Runs the combined model of some tasks over every image, once: each one's metrics and digest of its logits.

        Also gives the images that it saw, hashed, and what was wrong with the others.
        """
        model = CombinedModel(self.backbone, tasks)
        logits: dict[str, dict[int, Tensor]] = {task.name: {} for task in tasks}
        digests: dict[int, str] = {}
        bad: dict[int, str] = {}

        def view(row: int, item: Item) -> list[tuple[int, str, Tensor]]:
            return [(row, item.digest, item.views(self.backbone)[0])]

        every, what = range(len(images)), "scoring test images"
        for batch in read_in_batches(images, every, view, model.micro_batch, what, context, bad):
            rows, found, pixels = zip(*batch, strict=True)
            digests |= zip(rows, found, strict=True)
            for name, part in model(torch.stack(pixels)).items():
                logits[name] |= zip(rows, part.cpu(), strict=True)
        seen, order = images.in_order(digests)
        scored = []
        for task in tasks:
            joined = torch.stack([logits[task.name][row] for row in order])
            metrics = OBJECTIVES[task.objective].score(joined / task.temperature, seen.targets, images.labels)
            scored.append((metrics, f"{BY_CONTENT}{tensor_digest(joined)}"))
        return scored, seen, bad


def _remark_on(images: LabelledImages) -> None:
    """Says what a person should know of images before anything is done with them."""
    if images.remarks:
        only_hidden = images.left_out.keys() <= {"hidden"} and not images.deeper
        log.log(logging.INFO if only_hidden else logging.WARNING, "%s", images.remarks)
    if images.objective.is_settled(len(images.labels)):
        log.warning("%s has one class: the answer will be %r whatever an image shows.", images.where, images.labels[0])


def _warn_of(repeated: Mapping[str, int], test: LabelledImages | None) -> None:
    """One warning where images stand twice that should not; with counts."""
    said = []
    if repeated["classes"]:
        said.append(f"{repeated['classes']} training images occur with other labels too")
    if repeated["test"] and test is not None:
        said.append(f"{repeated['test']} of {len(test)} test images are training images too: their score flatters")
    if said:
        log.warning("Byte for byte the same: %s.", "; ".join(said))
