"""`addenda bench paper`: the paper's comparison on any image folders and any backbone, cell by cell, over seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from safetensors.torch import load_file, save_file
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.paper_methods import (
    AS_SHIPPED,
    REGISTRABLE,
    BaselineConfig,
    batches,
    is_baseline,
    joined_accuracies,
    method_config,
    rates_of,
    train_baselines,
)
from addenda.benchmarks.continual.stream import in_turn
from addenda.benchmarks.listing import write_listing
from addenda.benchmarks.paper.paper_report import COLLAPSE, PAIRS, best_of_rates, write_report
from addenda.benchmarks.report.jsonl import append_line, read_lines
from addenda.combined import CombinedModel
from addenda.exceptions import DataError, TrainingError
from addenda.files import output_folder
from addenda.learner import LearnConfig, Learner
from addenda.learner.data import LabelledImages, check_same_labels, open_images
from addenda.learner.objectives import accuracy
from addenda.registry import Registry, Task
from addenda.terminal import console, progress

METHODS = (
    "full", "lora-8", "attentive", "head", "head+class", "memory-1", "memory-5", "memory-10", "memory-20",
    "unmasked-5", "adapters-8", "linear-probe", "layer-probe", "default", "default+adapters", PAIRS, COLLAPSE,
)  # fmt: skip
KNOWN = ("full", "lora-R", "unmasked-M", "attentive", *REGISTRABLE, PAIRS, COLLAPSE)
"""Every regime; M is a number of memory tokens, R a rank."""

MASKED, UNMASKED = "memory-5", "unmasked-5"
"""The regimes of which pairs and the collapse are made."""

HIDDEN = ("num_images", "right", "last_right")
"""Of a cell, what is not printed."""

OURS = LearnConfig(batch_size=16, layer_head=False, calibrate=False, fall_back=False, refit=False)
"""As the rivals: all learn from the training part alone, in as many steps an epoch, and stand for themselves."""


@dataclass(frozen=True)
class PaperConfig:
    """What is compared, and how."""

    backbone: FrozenBackbone
    data: Path  # a folder of data sets, each with train/ and test/
    limit: int | None = None  # training images of a set, drawn class by class; None takes all
    ours: LearnConfig = OURS  # of the registrable regimes, less what the regime and the seed say
    baselines: BaselineConfig = field(default_factory=BaselineConfig)  # of the others, less the seed

    def settings(self, method: str) -> dict[str, Any]:
        """All that a cell's figures depend on beside its place, as JSON gives it back."""
        common = {"backbone": self.backbone.fingerprint, "limit": self.limit}
        if method != PAIRS and (method == COLLAPSE or is_baseline(method)):
            return common | {"config": json.loads(json.dumps(asdict(replace(self.baselines, rates=()))))}
        ours = method_config(method, self.ours) if method in AS_SHIPPED else self.ours
        return common | {"config": ours.to_json()}


def check_run(data: Path, sets: Sequence[str], methods: Sequence[str]) -> None:
    """Finds what would stop a run, before weights are looked for."""
    for method in methods:
        try:
            if method not in (PAIRS, COLLAPSE):
                is_baseline(method)
        except TrainingError as error:
            raise TrainingError(
                f"Regime {method!r} is not known. Known: {', '.join(KNOWN)}; M memory tokens in each layer, R the rank."
            ) from error
    missing = [name for name in sets if not all((data / name / part).is_dir() for part in ("train", "test"))]
    if missing:
        raise DataError(f"{str(data)!r} has no set {missing[0]!r} with train/ and test/ in it.")


def run_paper(
    comparison: PaperConfig, sets: Sequence[str], seeds: int, methods: Sequence[str], out: Path
) -> list[dict[str, Any]]:
    """Computes the cells that `out`/cells.jsonl does not hold yet, each added as soon as it is known; then reports.

    A seed draws the subset, its validation part, first values and order. `"pairs"` are each set and the next: the
    second learned as an extension of the first, and both in one combined model. `"collapse"` joins the first sets, two
    and more, without the mask.

    All cells of these settings are returned, earlier runs' and other sets' too.
    """
    check_run(comparison.data, sets, methods)
    of_one_set = [method for method in methods if method not in (PAIRS, COLLAPSE)]
    baselines = [method for method in of_one_set if is_baseline(method)]
    ours = [method for method in of_one_set if method not in baselines]
    output_folder(out)
    with Registry.open(out / "tasks.db") as registry:
        run = _Run(comparison, Learner(comparison.backbone, registry), out)
        for seed in range(seeds):
            for name in sets:
                run.learn(name, seed, ours)
                for method in baselines:
                    run.train(name, seed, method)
            if PAIRS in methods:
                for one, other in pairwise(sets):
                    run.pair(one, other, seed)
            if COLLAPSE in methods:
                for count in range(2, len(sets) + 1):
                    run.collapse(sets[:count], seed)
    cells = run.comparable()
    write_report(cells, comparison.backbone, comparison.data, comparison.limit, out)
    return cells


class _Run:
    """Computes cells, and keeps each at once."""

    def __init__(self, comparison: PaperConfig, learner: Learner, out: Path) -> None:
        self.comparison, self.learner, self.backbone, self.out = comparison, learner, comparison.backbone, out
        self._file = out / "cells.jsonl"
        self.cells = read_lines(self._file)

    def learn(self, name: str, seed: int, methods: Sequence[str]) -> None:
        """Learns registrable regimes; one combined pass over the test images scores all, each as if it were alone."""
        found: dict[str, tuple[Task, float, int]] = {}
        for method in methods:
            if not self._cell(name, seed, method):
                start = time.monotonic()
                task, num_images = self._task(name, seed, method)
                found[method] = task, time.monotonic() - start, num_images
        if not found:
            return
        tasks = [task for task, _, _ in found.values()]
        test = self._test(name, tasks[0].labels)
        answers = self._predict(tasks, test)
        for method, (task, seconds, num_images) in found.items():
            metrics = task.metrics
            right = answers[task.name].argmax(1) == test.targets
            self._keep(
                name, seed, method, seconds=seconds, num_images=num_images,
                chosen=metrics.get("chosen") or {"strength": metrics["linear_probe"]["strength"]},
                validation=metrics["validation"]["accuracy"],
                **_scored(right, ""),
            )  # fmt: skip

    def train(self, name: str, seed: int, method: str) -> None:
        """Trains and scores a rival with each rate; a cell for each, which of them is chosen the report says."""
        baselines = self.comparison.baselines
        missing = [
            rate
            for rate in rates_of(method, baselines)
            if not self._cell(name, seed, method, rate=str(rate))
            or (method == UNMASKED and not self._learned(name, seed, rate).exists())
        ]
        if not missing:
            return
        images, start = open_images(self._subset(name, seed)), time.monotonic()
        config = replace(baselines, seed=seed, rates=tuple(missing))
        with progress() as report:
            for baseline in train_baselines(
                method, self.backbone, images, self._test(name, images.labels), config, self.learner.cache,
                lambda what, done, total: report(f"{name} seed {seed}: {what}", done, total),
            ):  # fmt: skip
                if method == UNMASKED:
                    learned = self._learned(name, seed, baseline.rate)
                    learned.parent.mkdir(exist_ok=True)
                    save_file(baseline.tensors, learned)
                self._keep(
                    name, seed, method, rate=str(baseline.rate), seconds=time.monotonic() - start,
                    num_images=baseline.num_images, chosen={"rate": str(baseline.rate), "epoch": baseline.epoch},
                    validation=baseline.validation_accuracy, validation_loss=baseline.validation_loss,
                    last_validation=baseline.last_validation_accuracy, **_scored(baseline.right, ""),
                    **_scored(baseline.last_right, "last_"),
                )  # fmt: skip
                start = time.monotonic()

    def pair(self, one: str, other: str, seed: int) -> None:
        """Learns a set as an extension of another; answers both, and the extension, together and each alone."""
        place = f"{one}+{other}"
        if self._cell(place, seed, PAIRS):
            return
        start = time.monotonic()
        first, second = (self._task(name, seed, MASKED)[0] for name in (one, other))
        extension, _ = self._task(other, seed, MASKED, extends=first)
        alone, together, identical = [], [], True
        for name, task in ((one, first), (other, second)):
            test = self._test(name, task.labels)
            by_itself = self._predict([task], test)[task.name]
            answers = self._predict([first, second, extension], test)
            identical &= by_itself.numpy().tobytes() == answers[task.name].numpy().tobytes()
            alone.append(accuracy(by_itself, test.targets))
            together.append(accuracy(answers[task.name], test.targets))
        self._keep(
            place, seed, PAIRS, seconds=time.monotonic() - start, alone=alone, together=together, identical=identical,
            extended=accuracy(answers[extension.name], test.targets),
            validation=[task.metrics["validation"]["accuracy"] for task in (second, extension)],
        )  # fmt: skip

    def collapse(self, names: Sequence[str], seed: int) -> None:
        """Joins rivals that were trained apart, without the mask."""
        place = "+".join(names)
        if self._cell(place, seed, COLLAPSE):
            return
        start = time.monotonic()
        for name in names:
            self.train(name, seed, UNMASKED)
        tests = {name: self._test(name, open_images(self._subset(name, seed)).labels) for name in names}
        mine = [
            cell for cell in best_of_rates(self.comparable()) if cell["method"] == UNMASKED and cell["seed"] == seed
        ]
        best = {cell["set"]: cell for cell in mine}
        tensors = {name: load_file(self._learned(name, seed, best[name]["rate"])) for name in names}
        together = joined_accuracies(self.backbone, tensors, tests, self.comparison.baselines.autocast)
        alone = [best[name]["test"] for name in names]
        seconds = time.monotonic() - start
        self._keep(place, seed, COLLAPSE, seconds=seconds, alone=alone, together=[together[name] for name in names])

    def _task(self, name: str, seed: int, method: str, extends: Task | None = None) -> tuple[Task, int]:
        """A registered task, learned now if it was not before, and how many images training passed for it."""
        config = method_config(method, replace(self.comparison.ours, seed=seed))
        called = f"{name}-seed{seed}-{method}".lower().replace("+", "-")
        if extends is not None:
            config, called = replace(config, extends=(extends.ref,)), f"{name}-on-{extends.name}".lower()
        with progress() as report:
            task = self.learner.learn(called, self._subset(name, seed), config=config, new_version=True, report=report)
        trained = [loss for epoch in task.metrics.get("curves", ()) for loss in epoch["train_loss"] if loss is not None]
        held_out = task.metrics["validation"]["num_images"]
        return task, len(trained) * (task.data["num_images"] - held_out)

    def _subset(self, name: str, seed: int) -> Path:
        """A listing of the training images that all regimes see."""
        file = self.out / "subsets" / f"{name}-seed{seed}.csv"
        images = open_images(self.comparison.data / name / "train")
        rows = balanced_rows(images.targets, self.comparison.limit or len(images), seed)
        file.parent.mkdir(exist_ok=True)
        return write_listing(file, images, rows)

    def _learned(self, name: str, seed: int, rate: object) -> Path:
        return self.out / "unmasked" / f"{name}-seed{seed}-{str(rate).replace(' ', '-')}.safetensors"

    def _test(self, name: str, labels: tuple[str, ...]) -> LabelledImages:
        return check_same_labels(labels, open_images(self.comparison.data / name / "test"), "single-label")

    def _predict(self, tasks: Sequence[Task], test: LabelledImages) -> dict[str, Tensor]:
        """Logits of some tasks on all test images, in one pass."""
        model = CombinedModel(self.backbone, tasks)
        parts = [model(part) for part in batches(test, self.backbone, model.micro_batch)]
        return {task.name: torch.cat([part[task.name].cpu() for part in parts]) for task in tasks}

    def comparable(self) -> list[dict[str, Any]]:
        """All cells of these settings."""
        return [cell for cell in self.cells if cell["settings"] == self.comparison.settings(cell["method"])]

    def _cell(self, place: str, seed: int, method: str, **more: str) -> dict[str, Any]:
        """What is known of a cell under these settings; nothing yet is empty."""
        key = {"set": place, "seed": seed, "method": method, "settings": self.comparison.settings(method), **more}
        return next((cell for cell in self.cells if cell.items() >= key.items()), {})

    def _keep(self, place: str, seed: int, method: str, **found: Any) -> None:
        cell = {"set": place, "seed": seed, "method": method, **found, "settings": self.comparison.settings(method)}
        self.cells.append(cell)
        append_line(self._file, cell)
        said = ", ".join(f"{key} {_shown(value)}" for key, value in found.items() if key not in HIDDEN)
        console.print(f"{place}, seed {seed}, {method}: {said}", markup=False, highlight=False)


def balanced_rows(targets: Tensor, limit: int, seed: int) -> list[int]:
    """Rows of so many images, drawn at random, of each class alike as far as they go."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=random, dtype=torch.int64, device="cpu").tolist()
    return in_turn(order, targets.tolist(), limit)


def _scored(right: Bool[Tensor, " N"] | None, prefix: str) -> dict[str, Any]:
    """The share of test images that are answered rightly, and as a text of 0 and 1 which; None where there is none."""
    if right is None:
        return {f"{prefix}test": None, f"{prefix}right": None}
    return {f"{prefix}test": right.float().mean().item(), f"{prefix}right": "".join(map(str, right.int().tolist()))}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_shown(below)}" for key, below in value.items())
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
