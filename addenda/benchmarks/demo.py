"""The demo: learns five tasks in sequence and checks that the logits of earlier tasks never change."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import numpy as np
import torch
from PIL import Image
from rich.text import Text
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from addenda.backbones import load_backbone
from addenda.combined import CombinedModel, task_cost, tensor_digest
from addenda.learner import LearnConfig, Learner
from addenda.learner.data import open_images
from addenda.learner.objectives import accuracy
from addenda.registry import Registry
from addenda.terminal import console, percent, progress, size, table

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


@dataclass(frozen=True, eq=False)
class DigitImages:
    """Handwritten digits as a torch Dataset of 8 x 8 px PIL images; `targets` are indices into `classes`."""

    images: tuple[Image.Image, ...]
    targets: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]

    def save(self, folder: Path) -> None:
        """Writes each image as a PNG file into the folder of its class."""
        for number, (image, target) in enumerate(zip(self.images, self.targets, strict=True)):
            class_folder = folder / self.classes[target]
            class_folder.mkdir(parents=True, exist_ok=True)
            image.save(class_folder / f"{number}.png")


def digits(keep: tuple[int, ...], test: bool, seed: int = 0, limit: int | None = None) -> DigitImages:
    """The training or test split of the digits in `keep` (test: a stratified fifth), at most `limit` images."""
    data = load_digits()
    splits = train_test_split(np.arange(len(data.target)), test_size=0.2, stratify=data.target, random_state=seed)
    rows = [int(i) for i in splits[1 if test else 0] if int(data.target[i]) in keep][:limit]
    images = tuple(Image.fromarray((data.images[i] * 255 / 16).astype(np.uint8)) for i in rows)
    targets = tuple(keep.index(int(data.target[i])) for i in rows)
    return DigitImages(images, targets, tuple(map(str, keep)))


@contextmanager
def without_warnings() -> Iterator[None]:
    """Hides the warning of near-duplicates: to a backbone of letters, many digits of 8 x 8 px look the same."""
    logger = logging.getLogger("addenda.learner.learning_run")
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def run_demo() -> bool:
    """Runs the demo on the CPU in a temporary folder; returns whether all earlier logits stayed bit-identical."""
    start = time.monotonic()
    torch.set_num_threads(1)  # at this size more threads only add synchronization
    folder = Path(tempfile.mkdtemp(prefix="addenda-demo-"))
    backbone = load_backbone("glyphs", device="cpu")
    console.print(
        f"Backbone glyphs: {backbone.num_parameters / 1e6:.1f} M frozen weights, trained on letters, never on digits."
        "\nFive tasks are learned in sequence. Each adds a class token, five memory tokens per layer, and a head.\n"
    )
    names = [f"digits-{a}{b}" for a, b in PAIRS]
    tests = {name: open_images(digits(pair, test=True, limit=48)) for name, pair in zip(names, PAIRS, strict=True)}
    images = {name: test.read_all(backbone) for name, test in tests.items()}
    first_digests: dict[str, str] = {}
    stages: list[list[object]] = []
    intact = True
    with Registry.open(folder / "demo.db") as registry:
        learner = Learner(backbone, registry)
        for stage, (name, pair) in enumerate(zip(names, PAIRS, strict=True)):
            config = LearnConfig(epochs=6, fall_back=False)
            with progress() as report, without_warnings():
                learner.learn(name, digits(pair, test=False, limit=160), config=config, report=report)
            model = CombinedModel(backbone, registry.load(backbone))
            logits = {known: model(images[known])[known] for known in names[: stage + 1]}
            changed = [known for known, digest in first_digests.items() if tensor_digest(logits[known]) != digest]
            first_digests.setdefault(name, tensor_digest(logits[name]))
            intact = intact and not changed
            accuracies = [percent(accuracy(rows.cpu(), tests[known].targets)) for known, rows in logits.items()]
            verdict = Text(f"{stage} of {stage}", "green") if stage else Text("–")
            if changed:
                verdict = Text(f"CHANGED: {', '.join(changed)}", "bold red")
            stages.append([name, *accuracies, *[""] * (len(names) - len(accuracies)), verdict])
        title = "Test accuracy in % on each task's two digits; earlier tasks whose logits are bit-identical"
        console.print(table(title, ("after", *names, "identical"), stages, names))
        last = registry.record(names[-1])
    cost = task_cost(backbone, 5)
    console.print(
        f"\nOne more task costs {size(last.size_bytes)} in the registry (the backbone has "
        f"{size(4 * backbone.num_parameters)}), {size(last.statistics_bytes)} more for routing statistics, and "
        f"{100 * cost.relative_operations:.1f} % of the backbone's operations on an image of {backbone.num_tokens} "
        "tokens (about 0.5 % at 224 px)."
    )
    (folder / "digits").mkdir()
    for number, image in enumerate(digits(PAIRS[-1], test=True, limit=3).images):
        image.resize((64, 64)).save(folder / "digits" / f"{number}.png")
    command = "addenda" if which("addenda") else os.path.relpath(Path(sys.executable).with_name("addenda"))
    console.print(
        f"{'Every' if intact else 'NOT every'} earlier task kept its logits, bit for bit "
        f"({time.monotonic() - start:.0f} s).\n\nTry next:\n"
        f"  {command} tasks list --registry {folder}/demo.db\n"
        f"  {command} predict {folder}/digits --registry {folder}/demo.db\n"
        f"  {command} verify --registry {folder}/demo.db",
        soft_wrap=True,
    )
    return intact
