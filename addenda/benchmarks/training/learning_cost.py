"""`addenda bench training`: cost of learning relative to a forward pass, the dense mask and full fine-tuning."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.dense_mask import DENSE_NAMES, DenseMask
from addenda.benchmarks.baselines.paper_methods import batches
from addenda.benchmarks.cost import Run, interleave
from addenda.benchmarks.report.output import write_listing
from addenda.benchmarks.report.tables import Figure, write
from addenda.benchmarks.training.peak_memory import peak_bytes
from addenda.combined import CombinedModel, forward_pass, micro_batch, task_cost
from addenda.combined.numerics import numerics_settings
from addenda.exceptions import DataError
from addenda.files import output_folder
from addenda.learner import ActivationCache, Augmentation, LearnConfig, Learner
from addenda.learner.activations import Activations
from addenda.learner.candidates import HEAD_WEIGHTS, Candidate, as_fields, first_tensors
from addenda.learner.context import RunContext
from addenda.learner.data import LabelledImages, check_same_labels, has_test_part, open_images
from addenda.learner.objectives import LinearProbe, accuracy
from addenda.learner.trainer import Trainer
from addenda.registry import Registry, Task
from addenda.terminal import console, progress, size

MEMORY = 5
RATE, RATES = 0.001, (0.0002, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01)
STOCK_IMAGES = 64
EPOCHS = 100
GROUP = "learning a task"
VIEWS = Augmentation(views=3)


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

    Epochs, stock timm's forward pass and the dense mask's step are interleaved, and ratios are computed within a round.
    Filling the cache and the complete cached training are timed once, as they run. The dense mask trains for
    `dense_epochs`; the time of its 100 epochs is extrapolated.
    """
    if out is not None:
        output_folder(out)
    if not has_test_part(data):
        raise DataError(f"{str(data)!r} must contain both train/ and test/, each with class folders.")
    test = open_images(data, "test")
    if quick:
        limit, rounds, dense_epochs, test = min(limit, 200), min(rounds, 3), 1, _subset(test, 100)
    images = _subset(open_images(data, "train"), limit)
    test = check_same_labels(images.labels, test, images.objective.name)
    config = LearnConfig(num_memory_tokens=MEMORY, learning_rate=RATE, epochs=EPOCHS)
    details: dict[str, Any] = {
        "command": f"addenda {' '.join(sys.argv[1:])}",
        "backbone": backbone.name,
        "numerics": numerics_settings(backbone),
        "train_images": len(images),
        "test_images": len(test),
        "batch_size": config.batch_size,
        "epochs": EPOCHS,
        "dense_epochs": dense_epochs,
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory() as folder, progress() as report:
        start, context = time.perf_counter(), RunContext(report=report)
        activations = Activations(backbone, images, config.augmentation, ActivationCache(folder), context=context)
        details["fill_s"] = time.perf_counter() - start
        pooled, targets, objective = activations.pooled, activations.targets, activations.objective
        linear_probe = objective.fit_linear_probe(pooled, targets, objective.choose_strength(pooled, targets, 0))
        setting = Setting(backbone, images, activations, linear_probe, config)
        figures = _measure(setting, test, details, report)
    described = details["numerics"]
    title = (
        f"{backbone.name}, {len(images)} images, {described['device']}, {described['threads']} threads, "
        f"{described['precision']}"
    )
    write("training", title, figures, details, out, _summary(details))
    if out is not None:
        from addenda.benchmarks.report.plots import training_curves

        training_curves(details, out / "training.png")
        console.print(f"Written to {out}: training.png.")
    return figures


def _measure(setting: Setting, test: LabelledImages, details: dict[str, Any], report: Any) -> list[Figure]:
    """Makes all measurements, and adds the underlying values to the details."""
    backbone, activations, config = setting.backbone, setting.activations, setting.config
    count, rounds, dense_epochs = len(activations), details["rounds"], details["dense_epochs"]
    sweep, dense, timed_dense = replace(config, learning_rate=RATES), DenseTraining(setting), DenseTraining(setting)
    one, eight = Trainer(activations, [], config), Trainer(activations, [], sweep)
    sample, rows = setting.pixels(range(min(STOCK_IMAGES, count))), next(dense.batches(1))
    batch = setting.pixels(rows.tolist())
    variants: dict[str, Run] = {
        "stock": lambda: [backbone.backbone_logits(chunk) for chunk in sample.split(micro_batch(backbone.device))],
        "one": lambda: setting.train(one, config, 1),
        "eight": lambda: setting.train(eight, sweep, 1),
        "dense": lambda: timed_dense.step(batch, rows),
    }
    report("timing epochs and forward passes", 0, 1)
    seconds = interleave(variants, rounds, backbone.device)
    seconds["stock"] = [value * count / len(sample) for value in seconds["stock"]]
    seconds["dense"] = [value * count / len(rows) for value in seconds["dense"]]
    report("timing epochs and forward passes", 1, 1)

    start = time.perf_counter()
    (learned,) = setting.train(one, config, EPOCHS)
    train_s = time.perf_counter() - start
    (cached,) = setting.train(one, config, dense_epochs)
    trained = {"start": dense.tensors, "cached": cached.snapshot()}
    steps = [step_rows for epoch in range(dense_epochs) for step_rows in dense.batches(epoch + 1)]
    for number, step_rows in enumerate(steps, 1):
        dense.step(setting.pixels(step_rows.tolist()), step_rows)
        report("training through the dense mask", number, len(steps))
    trained |= {"dense": dense.tensors, "learned": learned.snapshot()}
    model = CombinedModel(backbone, [as_task(setting, name, tensors) for name, tensors in trained.items()])
    outputs = [model(pixels) for pixels in batches(test, backbone, model.micro_batch)]
    accuracies = {
        name: accuracy(torch.cat([logits[name].cpu() for logits in outputs]), test.targets) for name in trained
    }
    memory = _memory(setting, sweep, batch, rows)
    filling = measure_filling(backbone, setting.images.select(range(min(STOCK_IMAGES, count))), VIEWS, rounds)
    layer_head_s = _measure_layer_head(backbone, setting.images)
    passes_s = count * (1 + VIEWS.num_views) / filling["pass_images_per_s"]

    cost, dense_operations = task_cost(backbone, MEMORY), _dense_operations(backbone)
    token = 2 * cost.operations  # forward, and backward with respect to its inputs
    cached_operations, cached_s = cost.backbone_operations + EPOCHS * token, details["fill_s"] + train_s
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    details |= {
        "pass_s": medians["stock"], "epoch_s": medians["one"], "sweep_epoch_s": medians["eight"],
        "dense_epoch_s": medians["dense"], "train_s": train_s, "filling": filling, "layer_head_s": layer_head_s,
        "accuracy": accuracies, "peak_bytes": memory, "cache_bytes": sum(t.nbytes for t in _cached(activations)),
        "side_by_side": all(eight._together.values()),
        "operations_per_image": {"token": token, "dense": dense_operations, "backbone": cost.backbone_operations},
    }  # fmt: skip
    of_rounds = partial(Figure.of_rounds, GROUP)
    difference = 100 * abs(accuracies["cached"] - accuracies["dense"])
    epochs = [100 * a / b for a, b in zip(seconds["one"], seconds["stock"], strict=True)]
    sweeps = [a / b for a, b in zip(seconds["eight"], seconds["one"], strict=True)]
    name, speedups = f"dense mask / cached, {EPOCHS} epochs", [EPOCHS * value / cached_s for value in seconds["dense"]]
    return [
        of_rounds("epoch / stock timm's pass", "%", epochs, 4, limit=100 * token / cost.backbone_operations),
        of_rounds("epoch of 8 / epoch of 1", "x", sweeps, 2, limit=len(RATES)),
        of_rounds(name, "x", speedups, 40, limit=EPOCHS * dense_operations / cached_operations, more=True),
        of_rounds("filling from files / frozen pass", "x", filling["ratios"], 1.1, limit=1),
        Figure(GROUP, "layer-head task / frozen pass", "x", layer_head_s / passes_s, target=1.3, limit=1),
        Figure(GROUP, "accuracy, |dense - cached|", "points", difference, target=0.5),
        Figure(GROUP, "memory, full fine-tuning / 1", "x", memory["full"] / memory["one"], target=10, more=True),
        Figure(GROUP, "memory, full fine-tuning / 8", "x", memory["full"] / memory["eight"], more=True),
    ]


@dataclass(frozen=True)
class Setting:
    """Shared state of all measurements; all training starts from the linear probe."""

    backbone: FrozenBackbone
    images: LabelledImages
    activations: Activations
    linear_probe: LinearProbe
    config: LearnConfig

    def train(self, trainer: Trainer, config: LearnConfig, epochs: int, count: int | None = None) -> list[Candidate]:
        """Trains the config's candidates for `epochs` of its schedule, on all images or the first `count`."""
        rows = torch.arange(count or len(self.activations), dtype=torch.int64, device="cpu")
        no_rows = torch.empty(0, dtype=torch.long, device="cpu")
        return trainer.run(self.linear_probe, config.candidates, rows, no_rows, epochs, "refit")[0]

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """The preprocessed images of these rows."""
        return torch.stack([self.images.read(row, self.backbone) for row in rows])


class DenseTraining:
    """Training through the dense mask with the same initialization, image order, loss, optimizer and schedule."""

    def __init__(self, setting: Setting) -> None:
        backbone, config = setting.backbone, setting.config
        (settings,) = config.candidates
        first = first_tensors(backbone, setting.linear_probe, settings, config.memory_std)
        self._setting = setting
        self._order = Trainer(setting.activations, [], config)._order
        self._penalty = 1 / (setting.linear_probe.strength * len(setting.activations))  # as in the Trainer
        num_steps = -(-len(setting.activations) // config.batch_size) * config.epochs
        self._candidate = Candidate(settings, first, config, num_steps, backbone.device)
        self._model = DenseMask(backbone, [as_task(setting, "dense", first)])
        dense_parameters = dict(self._model.named_parameters())
        parameters = {name: dense_parameters[dense_name] for name, dense_name in DENSE_NAMES.items()}
        self._parameters = [parameters[name] for name in self._candidate.tensors]
        self._head = [parameters[name] for name in HEAD_WEIGHTS]
        for parameter, tensor in zip(self._parameters, self._candidate.tensors.values(), strict=True):
            parameter.data = tensor.data  # shared memory, so that the candidate's optimizer updates the model

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The current tensors of the task."""
        return self._candidate.snapshot()

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """The image rows of each step."""
        order, _ = self._order(torch.arange(len(self._setting.activations), dtype=torch.int64, device="cpu"), epoch)
        yield from order.split(self._setting.config.batch_size)

    def step(self, images: Tensor, rows: Tensor) -> None:
        """One optimizer step."""
        activations = self._setting.activations
        targets = activations.targets[rows].to(self._setting.backbone.device)
        loss = activations.objective.loss(self._model(images)["dense"], targets)
        penalty = self._penalty * torch.stack([weight.square().sum() for weight in self._head]).sum()
        self._candidate.step(torch.autograd.grad(loss + penalty, self._parameters))


def as_task(setting: Setting, name: str, tensors: dict[str, Tensor]) -> Task:
    """A task with these tensors."""
    return Task(name, setting.backbone.fingerprint, setting.images.labels, **as_fields(tensors))


def measure_filling(
    backbone: FrozenBackbone, images: LabelledImages, augmentation: Augmentation, rounds: int
) -> dict[str, Any]:
    """Times filling a new cache from files, and forward passes over as many images and views in memory.

    Images are hashed beforehand, because every run does so. A ratio of 1 between filling and forward passes means that
    all reading is hidden.
    """
    images, num_views = images.hashed(), 1 + augmentation.num_views
    pixels, count = images.read_all(backbone), len(images) * num_views

    def fill() -> None:
        with tempfile.TemporaryDirectory() as folder:
            Activations(backbone, images, augmentation, ActivationCache(folder))

    def forward() -> None:
        for _ in range(num_views):
            outputs = forward_pass(backbone, pixels, sizes=(micro_batch(backbone.device),), pooled=True)
            assert outputs.pooled is not None
            outputs.pooled.cpu()

    seconds = interleave({"fill": fill, "forward": forward}, rounds, backbone.device)
    return {
        "num_images": count,
        "images_per_s": count / statistics.median(seconds["fill"]),
        "pass_images_per_s": count / statistics.median(seconds["forward"]),
        "ratios": [fill_s / forward_s for fill_s, forward_s in zip(*seconds.values(), strict=True)],
    }


def _measure_layer_head(backbone: FrozenBackbone, images: LabelledImages) -> float:
    """Seconds of learning and registering a head-only task from files, with a new cache."""
    with tempfile.TemporaryDirectory() as folder, Registry.open(f"{folder}/tasks.db") as registry:
        data = write_listing(Path(folder) / "images.csv", images, range(len(images)))
        learner = Learner(backbone, registry, ActivationCache(f"{folder}/cache"))
        start = time.perf_counter()
        learner.learn("layers", data, config=LearnConfig(head_only=True, augmentation=VIEWS))
        return time.perf_counter() - start


def _dense_operations(backbone: FrozenBackbone) -> int:
    """Multiply-adds of the dense mask, forward and backward, for one image, without the linear layers of the memory.

    In the backward pass each linear layer has one product, attention four, and the patch embedding none.
    """
    cost, width = task_cost(backbone, 0), backbone.embed_dim
    tokens = backbone.num_tokens + 1
    linear = cost.operations - 2 * backbone.depth * tokens * width
    attention = 2 * backbone.depth * width * tokens * (tokens + MEMORY)
    return tokens * 2 * linear + 3 * attention + backbone.patch_operations()


def _memory(setting: Setting, sweep: LearnConfig, batch: Tensor, rows: Tensor) -> dict[str, int]:
    """Peak bytes of two training steps: one candidate, eight, and full fine-tuning with AdamW on the same batch."""
    backbone, activations = setting.backbone, setting.activations
    two_batches = 2 * setting.config.batch_size
    existing = [*backbone.weights.state_dict().values(), *_cached(activations), batch]
    peaks = {}
    for name, config in {"one": setting.config, "eight": sweep}.items():
        steps = partial(setting.train, Trainer(activations, [], config), config, 1, min(two_batches, len(activations)))
        peaks[name] = peak_bytes(steps, existing, backbone.device)
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


def _cached(activations: Activations) -> list[Tensor]:
    store = activations._frozen.store
    assert store is not None
    return [store.key_values, store.features]


def _subset(images: LabelledImages, count: int) -> LabelledImages:
    """A random subset of the images, always the same."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu")
    return images.select(order[:count].tolist())


def _summary(details: Mapping[str, Any]) -> str:
    """The text below the table: seconds, accuracies and bytes."""
    accuracies, memory = details["accuracy"], details["peak_bytes"]
    num, num_dense, cache_size = details["epochs"], details["dense_epochs"], size(details["cache_bytes"])
    joint = "trained jointly" if details["side_by_side"] else "trained one by one, because joint training changes bits"
    return (
        f"An epoch of one candidate takes {details['epoch_s']:.2f} s, of eight {details['sweep_epoch_s']:.2f} s "
        f"({joint}); stock timm's forward pass over the images takes {details['pass_s']:.1f} s. Filling the cache "
        f"takes {details['fill_s']:.1f} s and {num} cached epochs {details['train_s']:.1f} s; the dense mask takes "
        f"{details['dense_epoch_s']:.1f} s per epoch, {num} of them extrapolated from steps. Test accuracy on "
        f"{details['test_images']} images after {num_dense} epochs: cached {100 * accuracies['cached']:.1f} %, dense "
        f"{100 * accuracies['dense']:.1f} % (before training {100 * accuracies['start']:.1f} %; cached after {num} "
        f"epochs {100 * accuracies['learned']:.1f} %). Peak memory of live tensors: one candidate "
        f"{size(memory['one'])}, eight {size(memory['eight'])}, full fine-tuning {size(memory['full'])}; the cache has "
        f"{cache_size}."
    )
