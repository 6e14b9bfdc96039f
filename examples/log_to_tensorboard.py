"""Logs the curves of a learning run to TensorBoard: one chart per metric, with one line per candidate.

Run `pip install tensorboard` first; `tensorboard --logdir curves` shows the result.
"""

from __future__ import annotations

import math
from functools import partial

from torch.utils.tensorboard import SummaryWriter

from addenda import LearnConfig, Learner, Registry, load_backbone
from addenda.benchmarks.demo import digits
from addenda.learner import Epoch


def write(writer: SummaryWriter, epoch: Epoch) -> None:
    """Logs the results of an epoch."""
    for name in ("train_loss", "validation_loss", "validation_accuracy"):
        values = getattr(epoch, name)  # the refit has no validation
        lines = {
            f"{number}_lr_{settings.learning_rate:g}": value
            for number, (settings, value) in enumerate(zip(epoch.candidates, values, strict=False))
            if math.isfinite(value)  # NaN once a candidate has stopped
        }
        if lines:
            writer.add_scalars(f"{epoch.phase}/{name}", lines, epoch.epoch)


with Registry.open("curves.db") as registry, SummaryWriter("curves") as writer:
    learner = Learner(load_backbone("glyphs"), registry)
    train, test = (digits((3, 8), test, limit=80) for test in (False, True))
    task = learner.learn("three-or-eight", train, test, LearnConfig(epochs=4), on_epoch=partial(write, writer))
    writer.add_text("registered", f"{task.ref}, sha256 {task.sha256}, {task.metrics['test']['accuracy']:.3f} on test")

print(f"{task.ref}: {len(task.metrics['curves'])} epochs of the sweep are in curves/")
