"""`addenda bench training` makes fair comparisons and records its measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from addenda import FrozenBackbone, LearnConfig
from addenda.benchmarks.baselines.dense_mask import DenseMask
from addenda.benchmarks.training import learning_cost
from addenda.benchmarks.training.learning_cost import DenseTraining, Setting, measure_filling, run_training
from addenda.exceptions import DataError
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.activations import Activations
from addenda.learner.data import open_images
from addenda.learner.trainer import Trainer
from tests.support.images import colour_folder
from tests.support.models import backbone, images
from tests.support.tasks import random_task


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed, split in enumerate(("train", "test")):
        colour_folder(tmp_path / "data" / split, per_class=8, seed=seed)
    return tmp_path / "data"


def test_training_through_the_dense_mask_equals_cached_training(
    tiny: FrozenBackbone, data: Path, tmp_path: Path
) -> None:
    labelled = open_images(data)
    activations = Activations(tiny, labelled, Augmentation(), ActivationCache(tmp_path / "cache"))
    config = LearnConfig(num_memory_tokens=3, learning_rate=0.3, epochs=4, batch_size=5, warmup_steps=2)
    linear_probe = activations.objective.fit_linear_probe(activations.pooled, activations.targets, 0.1)
    setting = Setting(tiny, labelled, activations, linear_probe, config)
    (cached,) = setting.train(Trainer(activations, [], config), config, 3)
    dense = DenseTraining(setting)
    start = dense.tensors
    for epoch in (1, 2, 3):
        for rows in dense.batches(epoch):
            dense.step(setting.pixels(rows.tolist()), rows)
    for name, tensor in dense.tensors.items():
        change = (tensor - start[name]).abs().max()
        assert change > 0
        assert (tensor - cached.snapshot()[name]).abs().max() < 0.05 * change, name  # cached in half precision


def test_the_dense_masks_operations_are_those_that_torch_counts() -> None:
    on = backbone()
    task = random_task(on, "task", memory=learning_cost.MEMORY)
    with FlopCounterMode(display=False) as counter:
        logits = DenseMask(on, [task])(images(4))["task"]
        logits.sum().backward()
    linear = sum(
        flops
        for name, flops in counter.get_flop_counts()["Global"].items()
        if str(name) in ("aten.addmm", "aten.mm", "aten.convolution")
    )
    attention = 3 * 2 * on.depth * on.embed_dim * (on.num_tokens + 1) * (on.num_tokens + 1 + learning_cost.MEMORY)
    counted = learning_cost._dense_operations(on) - attention
    assert counted == pytest.approx(linear / 2 / 4, rel=0.2)  # without the memory's rows: 5 of 23 in one of 4 layers


@pytest.mark.slow
def test_bench_training_measures_and_records(
    tiny: FrozenBackbone, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning_cost, "EPOCHS", 3)
    figures = run_training(tiny, data, tmp_path / "out", quick=True, limit=20)
    assert [figure.target for figure in figures] == [4, 2, 40, 1.1, 1.3, 0.5, 10, None]
    for figure in figures:
        assert figure.measured >= 0
        assert figure.low is None or figure.low <= figure.measured <= figure.high
    assert figures[0].limit < figures[0].measured
    assert figures[-2].measured > figures[-1].measured > 1
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert [row["what"] for row in written["figures"]] == [figure.what for figure in figures]
    assert written["side_by_side"]
    assert written["train_images"] == 20
    assert 0 < written["peak_bytes"]["one"] < written["peak_bytes"]["eight"] < written["peak_bytes"]["full"]
    table = (tmp_path / "out" / "training.md").read_text()
    assert "| epoch of 8 / epoch of 1 |" in table
    assert "3 of them extrapolated" in table
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_test_split_is_refused(tiny: FrozenBackbone, data: Path) -> None:
    with pytest.raises(DataError, match="must contain both train/ and test/"):
        run_training(tiny, data / "train", None)


def test_a_subset_is_random_but_always_the_same(data: Path) -> None:
    labelled = open_images(data)
    subset = learning_cost._subset(labelled, 10)
    assert list(subset.items) == list(learning_cost._subset(labelled, 10).items)
    assert [labelled.targets[labelled.items.index(item)] for item in subset.items] == subset.targets.tolist()
    assert len(torch.unique(subset.targets)) > 1


def test_filling_is_measured_over_every_view_relative_to_forward_passes(tiny: FrozenBackbone, data: Path) -> None:
    images = open_images(data, "test")
    filling = measure_filling(tiny, images, Augmentation(views=2), rounds=1)
    assert filling["num_images"] == 3 * len(images)
    assert filling["ratios"] == [pytest.approx(filling["pass_images_per_s"] / filling["images_per_s"])]
