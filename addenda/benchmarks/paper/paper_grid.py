"""`addenda bench paper`: the paper's comparison on any image folders and backbone, over several seeds."""

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
from addenda.benchmarks.continual.stream import round_robin
from addenda.benchmarks.paper.paper_report import COLLAPSE, PAIRS, best_of_rates, write_report
from addenda.benchmarks.report.output import append_line, read_lines, write_listing
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
"""All methods; M is a number of memory tokens, R a rank."""

MASKED, UNMASKED = "memory-5", "unmasked-5"
"""The methods that `pairs` and `collapse` combine."""

HIDDEN = ("num_images", "right", "last_right")
"""Fields of a cell that are not printed."""

OURS = LearnConfig(batch_size=16, layer_head=False, calibrate=False, fall_back=False, refit=False)
"""Comparable to the baselines: same training split and steps per epoch, and no layer head, calibration or fallback."""


@dataclass(frozen=True)
class PaperConfig:
    """Configuration of a comparison."""

    backbone: FrozenBackbone
    data: Path  # folder of datasets, each with train/ and test/
    limit: int | None = None  # training images per dataset, balanced over classes; None: all
    ours: LearnConfig = OURS  # for registrable methods; the method and the seed override it
    baselines: BaselineConfig = field(default_factory=BaselineConfig)  # for baselines; the seed overrides it

    def settings(self, method: str) -> dict[str, Any]:
        """All settings that a cell's results depend on, as they compare after a round trip through JSON."""
        common = {"backbone": self.backbone.fingerprint, "limit": self.limit}
        if method != PAIRS and (method == COLLAPSE or is_baseline(method)):
            return common | {"config": json.loads(json.dumps(asdict(replace(self.baselines, rates=()))))}
        ours = method_config(method, self.ours) if method in AS_SHIPPED else self.ours
        return common | {"config": ours.to_json()}


def check_run(data: Path, sets: Sequence[str], methods: Sequence[str]) -> None:
    """Raise an error for unknown methods or missing datasets, before any weights are loaded."""
    for method in methods:
        try:
            if method not in (PAIRS, COLLAPSE):
                is_baseline(method)
        except TrainingError as error:
            raise TrainingError(
                f"Unknown method {method!r}. Known: {', '.join(KNOWN)}, with M memory tokens per layer and rank R."
            ) from error
    missing = [name for name in sets if not all((data / name / split).is_dir() for split in ("train", "test"))]
    if missing:
        raise DataError(
            f"{str(data)!r} has no dataset {missing[0]!r} with train/ and test/. Add them, or correct --sets."
        )


def run_paper(
    comparison: PaperConfig, sets: Sequence[str], seeds: int, methods: Sequence[str], out: Path
) -> list[dict[str, Any]]:
    """Compute the cells missing from `out`/cells.jsonl, store each at once, write the report, and return all cells.

    The seed draws the subset, the validation split, the initial values and the order of images. `"pairs"` takes each
    dataset and the next, learns the second as an extension of the first, and runs both in one combined model.
    `"collapse"` joins the first two, three, ... datasets without the mask.
    """
    check_run(comparison.data, sets, methods)
    single_set = [method for method in methods if method not in (PAIRS, COLLAPSE)]
    baselines = [method for method in single_set if is_baseline(method)]
    ours = [method for method in single_set if method not in baselines]
    output_folder(out)
    with Registry.open(out / "tasks.db") as registry:
        run = _Run(comparison, Learner(comparison.backbone, registry), out)
        for seed in range(seeds):
            for name in sets:
                run.learn(name, seed, ours)
                for method in baselines:
                    run.train(name, seed, method)
            if PAIRS in methods:
                for first, second in pairwise(sets):
                    run.pair(first, second, seed)
            if COLLAPSE in methods:
                for count in range(2, len(sets) + 1):
                    run.collapse(sets[:count], seed)
    cells = run.comparable()
    write_report(cells, comparison.backbone, comparison.data, comparison.limit, out)
    return cells


class _Run:
    """Computes cells and stores each at once."""

    def __init__(self, comparison: PaperConfig, learner: Learner, out: Path) -> None:
        self.comparison, self.learner, self.backbone, self.out = comparison, learner, comparison.backbone, out
        self._file = out / "cells.jsonl"
        self.cells = read_lines(self._file)

    def learn(self, name: str, seed: int, methods: Sequence[str]) -> None:
        """Learn with registrable methods; one forward pass of the combined model scores all of them exactly."""
        learned: dict[str, tuple[Task, float, int]] = {}
        for method in methods:
            if not self._cell(name, seed, method):
                start = time.monotonic()
                task, num_images = self._task(name, seed, method)
                learned[method] = task, time.monotonic() - start, num_images
        if not learned:
            return
        tasks = [task for task, _, _ in learned.values()]
        test = self._test(name, tasks[0].labels)
        logits = self._predict(tasks, test)
        for method, (task, seconds, num_images) in learned.items():
            metrics = task.metrics
            correct = logits[task.name].argmax(1) == test.targets
            self._store(
                name, seed, method, seconds=seconds, num_images=num_images,
                chosen=metrics.get("chosen") or {"strength": metrics["linear_probe"]["strength"]},
                validation=metrics["validation"]["accuracy"],
                **_test_fields(correct, ""),
            )  # fmt: skip

    def train(self, name: str, seed: int, method: str) -> None:
        """Train and score a baseline with each rate, one cell per rate; the report selects among them."""
        baselines = self.comparison.baselines
        missing = [
            rate
            for rate in rates_of(method, baselines)
            if not self._cell(name, seed, method, rate=str(rate))
            or (method == UNMASKED and not self._unmasked_file(name, seed, rate).exists())
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
                    file = self._unmasked_file(name, seed, baseline.rate)
                    file.parent.mkdir(exist_ok=True)
                    save_file(baseline.tensors, file)
                self._store(
                    name, seed, method, rate=str(baseline.rate), seconds=time.monotonic() - start,
                    num_images=baseline.num_images, chosen={"rate": str(baseline.rate), "epoch": baseline.epoch},
                    validation=baseline.validation_accuracy, validation_loss=baseline.validation_loss,
                    last_validation=baseline.last_validation_accuracy, **_test_fields(baseline.right, ""),
                    **_test_fields(baseline.last_right, "last_"),
                )  # fmt: skip
                start = time.monotonic()

    def pair(self, first: str, second: str, seed: int) -> None:
        """Learn a dataset as an extension of another; score both tasks alone and together with the extension."""
        pair = f"{first}+{second}"
        if self._cell(pair, seed, PAIRS):
            return
        start = time.monotonic()
        first_task, second_task = (self._task(name, seed, MASKED)[0] for name in (first, second))
        extension, _ = self._task(second, seed, MASKED, extends=first_task)
        alone, together, identical = [], [], True
        for name, task in ((first, first_task), (second, second_task)):
            test = self._test(name, task.labels)
            alone_logits = self._predict([task], test)[task.name]
            logits = self._predict([first_task, second_task, extension], test)
            identical &= alone_logits.numpy().tobytes() == logits[task.name].numpy().tobytes()
            alone.append(accuracy(alone_logits, test.targets))
            together.append(accuracy(logits[task.name], test.targets))
        self._store(
            pair, seed, PAIRS, seconds=time.monotonic() - start, alone=alone, together=together, identical=identical,
            extended=accuracy(logits[extension.name], test.targets),
            validation=[task.metrics["validation"]["accuracy"] for task in (second_task, extension)],
        )  # fmt: skip

    def collapse(self, names: Sequence[str], seed: int) -> None:
        """Join separately trained unmasked baselines in one sequence."""
        joined = "+".join(names)
        if self._cell(joined, seed, COLLAPSE):
            return
        start = time.monotonic()
        for name in names:
            self.train(name, seed, UNMASKED)
        tests = {name: self._test(name, open_images(self._subset(name, seed)).labels) for name in names}
        unmasked = {"method": UNMASKED, "seed": seed}.items()
        best = {cell["set"]: cell for cell in best_of_rates(self.comparable()) if cell.items() >= unmasked}
        tensors = {name: load_file(self._unmasked_file(name, seed, best[name]["rate"])) for name in names}
        together = joined_accuracies(self.backbone, tensors, tests, self.comparison.baselines.autocast)
        alone = [best[name]["test"] for name in names]
        seconds = time.monotonic() - start
        self._store(joined, seed, COLLAPSE, seconds=seconds, alone=alone, together=[together[name] for name in names])

    def _task(self, name: str, seed: int, method: str, extends: Task | None = None) -> tuple[Task, int]:
        """The registered task, learned now if necessary, and the number of images that its training processed."""
        config = method_config(method, replace(self.comparison.ours, seed=seed))
        task_name = f"{name}-seed{seed}-{method}".lower().replace("+", "-")
        if extends is not None:
            config, task_name = replace(config, extends=(extends.ref,)), f"{name}-on-{extends.name}".lower()
        subset = self._subset(name, seed)
        with progress() as report:
            task = self.learner.learn(task_name, subset, config=config, new_version=True, report=report)
        losses = [loss for epoch in task.metrics.get("curves", ()) for loss in epoch["train_loss"] if loss is not None]
        held_out = task.metrics["validation"]["num_images"]
        return task, len(losses) * (task.data["num_images"] - held_out)

    def _subset(self, name: str, seed: int) -> Path:
        """Listing of the training images, the same for all methods."""
        file = self.out / "subsets" / f"{name}-seed{seed}.csv"
        images = open_images(self.comparison.data / name / "train")
        rows = balanced_rows(images.targets, self.comparison.limit or len(images), seed)
        file.parent.mkdir(exist_ok=True)
        return write_listing(file, images, rows)

    def _unmasked_file(self, name: str, seed: int, rate: object) -> Path:
        return self.out / "unmasked" / f"{name}-seed{seed}-{str(rate).replace(' ', '-')}.safetensors"

    def _test(self, name: str, labels: tuple[str, ...]) -> LabelledImages:
        return check_same_labels(labels, open_images(self.comparison.data / name / "test"), "single-label")

    def _predict(self, tasks: Sequence[Task], test: LabelledImages) -> dict[str, Tensor]:
        """The tasks' logits on all test images, from a single forward pass."""
        model = CombinedModel(self.backbone, tasks)
        chunks = [model(pixels) for pixels in batches(test, self.backbone, model.micro_batch)]
        return {task.name: torch.cat([chunk[task.name].cpu() for chunk in chunks]) for task in tasks}

    def comparable(self) -> list[dict[str, Any]]:
        """All cells with these settings."""
        return [cell for cell in self.cells if cell["settings"] == self.comparison.settings(cell["method"])]

    def _cell(self, name: str, seed: int, method: str, **more: str) -> dict[str, Any]:
        """The stored cell with these settings; empty if there is none."""
        key = {"set": name, "seed": seed, "method": method, "settings": self.comparison.settings(method), **more}
        return next((cell for cell in self.cells if cell.items() >= key.items()), {})

    def _store(self, name: str, seed: int, method: str, **fields: Any) -> None:
        cell = {"set": name, "seed": seed, "method": method, **fields, "settings": self.comparison.settings(method)}
        self.cells.append(cell)
        append_line(self._file, cell)
        text = ", ".join(f"{key} {_shown(value)}" for key, value in fields.items() if key not in HIDDEN)
        console.print(f"{name}, seed {seed}, {method}: {text}")


def balanced_rows(targets: Tensor, limit: int, seed: int) -> list[int]:
    """Draw `limit` rows at random, balanced over classes as far as they go."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=random, dtype=torch.int64, device="cpu").tolist()
    return round_robin(order, targets.tolist(), limit)


def _test_fields(correct: Bool[Tensor, " N"] | None, prefix: str) -> dict[str, Any]:
    """Fields of a cell: test accuracy, and a 0 or 1 for each test image; None without test images."""
    if correct is None:
        return {f"{prefix}test": None, f"{prefix}right": None}
    return {f"{prefix}test": correct.float().mean().item(), f"{prefix}right": "".join(map(str, correct.int().tolist()))}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_shown(nested)}" for key, nested in value.items())
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
