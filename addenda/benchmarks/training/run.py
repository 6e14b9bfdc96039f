"""`addenda bench training`: what learning costs beside the backbone's own pass, the dense mask and full fine-tuning."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.regimes import batches
from addenda.benchmarks.cost.run import interleave
from addenda.benchmarks.report.tables import Figure, write
from addenda.benchmarks.training.dense import DenseTraining, Setting, as_task, peak_bytes
from addenda.benchmarks.training.filling import measure_filling
from addenda.combined import CombinedModel, micro_batch, numerics, task_cost
from addenda.exceptions import DataError
from addenda.files import output_folder
from addenda.learner import ActivationCache, LearnConfig
from addenda.learner.activations import Activations
from addenda.learner.candidates import first_tensors
from addenda.learner.context import RunContext
from addenda.learner.data import LabelledImages, check_same_labels, has_test_part, open_images
from addenda.learner.objectives import accuracy
from addenda.learner.training import Trainer
from addenda.terminal import console, progress, size

MEMORY = 5
RATE, RATES = 0.001, (0.0002, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01)
STOCK_IMAGES = 64
EPOCHS = 100
CLOSE, FILLING = 0.5, 1.1
GROUP = "learning a task"


def run_training(
    backbone: FrozenBackbone,
    data: Path,
    out: Path | None,
    quick: bool = False,
    limit: int = 1000,
    rounds: int = 5,
    dense_epochs: int = 2,
) -> list[Figure]:
    """Measures one candidate, eight, the dense mask and full fine-tuning on the same images, threads and weights.

    Epochs, stock timm's pass and the dense mask's step are interleaved, round by round, and ratios are taken within a
    round. Filling the cache and the whole of cached training are timed once, as they run.

    Args:
        backbone: the frozen backbone.
        data: a folder with train/ and test/ in it.
        out: folder for training.json, training.md and training.png.
        quick: 200 training images, 100 test images, three rounds and one dense epoch at most: under two minutes.
        limit: training images, drawn at random.
        rounds: measured rounds.
        dense_epochs: epochs that the dense mask really trains; its 100 are extrapolated.

    Raises:
        DataError: the folder lacks a part, or its parts have not the same classes.
    """
    if out is not None:
        output_folder(out)
    if not has_test_part(data):
        raise DataError(f"{str(data)!r} has not both train/ and test/ in it.")
    test = open_images(data, "test")
    if quick:
        limit, rounds, dense_epochs, test = min(limit, 200), min(rounds, 3), 1, _some(test, 100)
    images = _some(open_images(data, "train"), limit)
    test = check_same_labels(images.labels, test, images.objective.name)
    with tempfile.TemporaryDirectory() as folder, progress() as report:
        start = time.perf_counter()
        activations = Activations(
            backbone, images, LearnConfig().augmentation, ActivationCache(folder), context=RunContext(report=report)
        )
        fill_s = time.perf_counter() - start
        pooled, targets, objective = activations.pooled, activations.targets, activations.objective
        regression = objective.fit_regression(pooled, targets, objective.choose_strength(pooled, targets, 0))
        config = LearnConfig(num_memory_tokens=MEMORY, learning_rate=RATE, epochs=EPOCHS)
        setting = Setting(backbone, images, activations, regression, config, fill_s)
        figures, details = _measure(setting, test, rounds, dense_epochs, report)
    described = {key: value for key, value in numerics(backbone).items() if key != "probe"}
    context = {
        "command": f"addenda {' '.join(sys.argv[1:])}",
        "backbone": backbone.name,
        "numerics": described,
        "train_images": len(images),
        "test_images": len(test),
        "batch_size": config.batch_size,
        "epochs": EPOCHS,
        "dense_epochs": dense_epochs,
        "rounds": rounds,
    }
    details = context | details
    write("training", title(details), figures, details, out, summary(details))
    if out is not None:
        from addenda.benchmarks.report.plots import training_curves

        training_curves(details, out / "training.png")
        console.print(f"Written to {out}: training.png.")
    return figures


def _measure(
    setting: Setting, test: LabelledImages, rounds: int, dense_epochs: int, report: Any
) -> tuple[list[Figure], dict[str, Any]]:
    backbone, activations, config = setting.backbone, setting.activations, setting.config
    count, several = len(activations), replace(config, learning_rate=RATES)
    one, eight, dense = Trainer(activations, [], config), Trainer(activations, [], several), DenseTraining(setting)
    timed = DenseTraining(setting)
    sample = setting.pixels(range(min(STOCK_IMAGES, count)))
    at_once = micro_batch(backbone.device)
    rows = next(dense.batches(1))
    batch = setting.pixels(rows.tolist())

    def stock() -> None:
        for part in sample.split(at_once):
            backbone.backbone_logits(part)

    report("timing epochs and passes", 0, 1)
    seconds = interleave(
        {
            "stock": stock,
            "one": lambda: setting.train(one, config, 1),
            "eight": lambda: setting.train(eight, several, 1),
            "dense": lambda: timed.step(batch, rows),
        },
        rounds,
        backbone.device,
    )
    passes = [value * count / len(sample) for value in seconds["stock"]]
    dense_epoch = [value * count / len(rows) for value in seconds["dense"]]
    report("timing epochs and passes", 1, 1)

    start = time.perf_counter()
    (learned,) = setting.train(one, config, EPOCHS)
    train_s = time.perf_counter() - start
    (equal,) = setting.train(one, config, dense_epochs)
    for epoch in range(dense_epochs):
        for step, of_step in enumerate(dense.batches(epoch + 1)):
            dense.step(setting.pixels(of_step.tolist()), of_step)
            report(
                "training through the dense mask",
                epoch * setting.num_steps + step + 1,
                dense_epochs * setting.num_steps,
            )
    reached = _accuracies(
        setting, test,
        {
            "start": first_tensors(backbone, setting.regression, config.candidates[0], config.memory_std),
            "cached": equal.snapshot(), "dense": dense.tensors, "learned": learned.snapshot(),
        },
    )  # fmt: skip
    apart = 100 * (reached["cached"] - reached["dense"])
    memory = _memory(setting, several, batch, rows)
    some = setting.images.select(range(min(STOCK_IMAGES, count)))
    filling = measure_filling(backbone, some, rounds=rounds)

    operations = task_cost(backbone, MEMORY)
    token = 2 * operations.operations  # forward, and backward with respect to its inputs
    through = _dense_operations(backbone)
    both = operations.backbone_operations + EPOCHS * token
    figures = [
        Figure.of_rounds(
            GROUP, "epoch / stock timm's pass", "%",
            [100 * a / b for a, b in zip(seconds["one"], passes, strict=True)], 4,
            limit=100 * token / operations.backbone_operations,
        ),
        Figure.of_rounds(
            GROUP, "epoch of 8 / epoch of 1", "x",
            [a / b for a, b in zip(seconds["eight"], seconds["one"], strict=True)], 2, limit=len(RATES),
        ),
        Figure.of_rounds(
            GROUP, f"dense mask / cached, {EPOCHS} epochs", "x",
            [EPOCHS * value / (setting.fill_s + train_s) for value in dense_epoch], 40,
            limit=EPOCHS * through / both, more=True,
        ),
        Figure.of_rounds(GROUP, "filling from files / frozen pass", "x", filling.ratios, FILLING, limit=1),
        Figure(GROUP, "accuracy, |dense - cached|", "points", abs(apart), target=CLOSE),
        Figure(GROUP, "memory, full fine-tuning / 1", "x", memory["full"] / memory["one"], target=10, more=True),
        Figure(GROUP, "memory, full fine-tuning / 8", "x", memory["full"] / memory["eight"], more=True),
    ]  # fmt: skip
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    details = {
        "pass_s": statistics.median(passes), "epoch_s": medians["one"], "sweep_epoch_s": medians["eight"],
        "dense_epoch_s": statistics.median(dense_epoch), "fill_s": setting.fill_s, "train_s": train_s,
        "filling": asdict(filling),
        "accuracy": reached, "peak_bytes": memory, "cache_bytes": sum(t.nbytes for t in _kept(activations)),
        "side_by_side": all(eight._together.values()),
        "operations_per_image": {"token": token, "dense": through, "backbone": operations.backbone_operations},
    }  # fmt: skip
    return figures, details


def _dense_operations(backbone: FrozenBackbone) -> int:
    """Multiply-adds of the dense mask, forward and backward, for one image; the memory's own products are left out.

    Backward, each linear layer has one product, with respect to its inputs, and attention has twice its own two. The
    patch embedding has none.
    """
    cost, width = task_cost(backbone, 0), backbone.embed_dim
    tokens = backbone.num_tokens + 1
    linear = cost.operations - 2 * backbone.depth * tokens * width
    attention = 2 * backbone.depth * width * tokens * (tokens + MEMORY)
    return tokens * 2 * linear + 3 * attention + backbone.patch_operations


def _memory(setting: Setting, several: LearnConfig, batch: Tensor, rows: Tensor) -> dict[str, int]:
    """Peak bytes of two steps: of one candidate, of eight, and of full fine-tuning with AdamW on the same batch."""
    backbone, activations = setting.backbone, setting.activations
    two = 2 * setting.config.batch_size
    there = [*backbone.weights.state_dict().values(), *_kept(activations), batch]

    def cached(config: LearnConfig) -> None:
        setting.train(Trainer(activations, [], config), config, 1, min(two, len(activations)))

    peaks = {
        name: peak_bytes(lambda config=config: cached(config), there, backbone.device)  # type: ignore[misc]
        for name, config in {"one": setting.config, "eight": several}.items()
    }
    model = backbone.trainable_copy(activations.num_classes)
    images, targets = batch.to(backbone.device), activations.targets[rows].to(backbone.device)

    def full() -> None:
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()

    peaks["full"] = peak_bytes(full, [*model.state_dict().values(), images, targets], backbone.device)
    return peaks


def _kept(activations: Activations) -> list[Tensor]:
    store = activations._store
    assert store is not None
    return [store.key_values, store.pooled]


def _accuracies(setting: Setting, test: LabelledImages, found: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Share of the test images that each set of tensors answers rightly, by the combined model."""
    model = CombinedModel(setting.backbone, [as_task(setting, name, tensors) for name, tensors in found.items()])
    parts = [model(part) for part in batches(test, setting.backbone, model.micro_batch)]
    return {name: accuracy(torch.cat([part[name].cpu() for part in parts]), test.targets) for name in found}


def _some(images: LabelledImages, count: int) -> LabelledImages:
    """A few of the images, drawn at random but always the same."""
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu")
    return images.select(drawn[:count].tolist())


def title(details: Mapping[str, Any]) -> str:
    """What was measured on what."""
    numerics = details["numerics"]
    return (
        f"{details['backbone']}, {details['train_images']} images, {numerics['device']}, "
        f"{numerics['threads']} threads, {numerics['precision']}"
    )


def summary(details: Mapping[str, Any]) -> str:
    """Below the table: seconds, accuracies and bytes in sentences."""
    accuracy, memory = details["accuracy"], details["peak_bytes"]
    num, few, kept = details["epochs"], details["dense_epochs"], size(details["cache_bytes"])
    beside = "side by side" if details["side_by_side"] else "one by one, since their bits differ side by side"
    return (
        f"An epoch of one candidate takes {details['epoch_s']:.2f} s, of eight {details['sweep_epoch_s']:.2f} s "
        f"({beside}); stock timm passes the images in {details['pass_s']:.1f} s. Cached, filling takes "
        f"{details['fill_s']:.1f} s and {num} epochs {details['train_s']:.1f} s; the dense mask takes "
        f"{details['dense_epoch_s']:.1f} s an epoch, {num} of them extrapolated from steps. On "
        f"{details['test_images']} held-out images, epochs: {few}: cached {100 * accuracy['cached']:.1f} %, dense "
        f"{100 * accuracy['dense']:.1f} % (at the start {100 * accuracy['start']:.1f} %; cached after {num} epochs "
        f"{100 * accuracy['learned']:.1f} %). Live tensors at most: one candidate {size(memory['one'])}, eight "
        f"{size(memory['eight'])}, full fine-tuning {size(memory['full'])}; the cache is {kept}."
    )
