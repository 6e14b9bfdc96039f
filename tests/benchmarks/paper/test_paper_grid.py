"""`bench paper`: each cell is computed once, all methods get the same images, bits are compared and reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.benchmarks.baselines.paper_methods import BaselineConfig, Rate, method_config
from addenda.benchmarks.paper import paper_grid
from addenda.benchmarks.paper.paper_grid import OURS, PaperConfig, balanced_rows, run_paper
from addenda.benchmarks.paper.paper_report import COLLAPSE, PAIRS, PAPER, paired_gain, write_report
from addenda.exceptions import DataError, TrainingError
from addenda.files import output_folder
from addenda.learner.data import open_images
from tests.support.images import colour_folder
from tests.support.tiny import tiny_vit

CLASSES = {"warm": ("red", "green", "grey"), "cold": ("blue", "green", "grey")}
METHODS = ("head", "memory-5", "unmasked-5", PAIRS, COLLAPSE)


def two_sets(folder: Path) -> Path:
    for seed, (name, classes) in enumerate(CLASSES.items()):
        colour_folder(folder / name / "train", 8, classes, seed)
        colour_folder(folder / name / "test", 6, classes, seed + 10)
    return folder


def quick(backbone: FrozenBackbone, data: Path, limit: int | None = 18) -> PaperConfig:
    ours = replace(OURS, epochs=1, learning_rate=(0.3,))
    return PaperConfig(backbone, data, limit, ours, BaselineConfig(epochs=1, rates=(Rate("adamw", 1e-3),)))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> PaperConfig:
    return quick(FrozenBackbone(tiny_vit(), "tiny", "hub"), two_sets(tmp_path_factory.mktemp("sets")))


@pytest.fixture(scope="module")
def out(comparison: PaperConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    run_paper(comparison, tuple(CLASSES), 1, METHODS, folder)
    return folder


def cells(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


def test_each_cell_is_computed_once(comparison: PaperConfig, out: Path) -> None:
    keys = [(cell["set"], cell["seed"], cell["method"]) for cell in cells(out)]
    plain = {(name, 0, method) for name in CLASSES for method in ("head", "memory-5", "unmasked-5")}
    assert set(keys) == plain | {("warm+cold", 0, PAIRS), ("warm+cold", 0, COLLAPSE)}
    assert len(keys) == len(set(keys))
    for cell in cells(out):
        assert cell["seconds"] > 0
        if cell["method"] not in (PAIRS, COLLAPSE):
            assert 0 <= cell["validation"] <= 1
            assert 0 <= cell["test"] <= 1
            assert cell["chosen"]
    before = (out / "cells.jsonl").read_bytes()
    again = run_paper(comparison, tuple(CLASSES), 1, METHODS, out)
    assert (out / "cells.jsonl").read_bytes() == before
    assert again == cells(out)


def test_an_interrupted_run_computes_the_missing_cells(comparison: PaperConfig, out: Path, tmp_path: Path) -> None:
    lines = (out / "cells.jsonl").read_text().splitlines(keepends=True)
    output_folder(tmp_path)
    (tmp_path / "cells.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])  # killed while writing the last one
    (tmp_path / "unmasked").symlink_to(out / "unmasked")
    resumed = run_paper(comparison, tuple(CLASSES), 1, METHODS, tmp_path)
    expected, last = json.loads(lines[-1]), resumed[-1]
    assert len(resumed) == len(lines)
    assert {key: last[key] for key in last if key != "seconds"} == {
        key: expected[key] for key in expected if key != "seconds"
    }
    assert (tmp_path / "cells.jsonl").read_text().startswith("".join(lines[:-1]))


def test_other_settings_are_other_cells(comparison: PaperConfig, out: Path, tmp_path: Path) -> None:
    output_folder(tmp_path)
    (tmp_path / "cells.jsonl").write_bytes((out / "cells.jsonl").read_bytes())
    smaller = quick(comparison.backbone, comparison.data, limit=15)
    result = run_paper(smaller, ["warm"], 1, ["head"], tmp_path)
    assert [(cell["set"], cell["method"]) for cell in result] == [("warm", "head")]
    assert len(cells(tmp_path)) == len(cells(out)) + 1


def test_every_method_gets_the_same_balanced_images(comparison: PaperConfig, out: Path) -> None:
    listing = open_images(out / "subsets" / "warm-seed0.csv")
    assert len(listing) == 18
    assert listing.counts == [6, 6, 6]
    with Registry.open(out / "tasks.db") as registry:
        tasks = [registry.get(record.ref) for record in registry.tasks() if record.name.startswith("warm-seed0")]
    assert len(tasks) == 2
    assert {task.data["run"]["data"] for task in tasks} == {listing.fingerprint()}


def test_a_subset_listing_is_replaced_atomically(comparison: PaperConfig, tmp_path: Path) -> None:
    with Registry.open(tmp_path / "tasks.db") as registry:
        run = paper_grid._Run(comparison, Learner(comparison.backbone, registry), tmp_path)
        with run._subset("warm", 0).open() as reader:
            listing = Path(reader.name).read_text()
            Path(reader.name).write_text("half done")
            run._subset("warm", 0)
            assert reader.read() == "half done"  # the open file is unchanged: a new one took its place
            assert Path(reader.name).read_text() == listing
    assert [file.suffix for file in (tmp_path / "subsets").iterdir()] == [".csv"]


def test_rows_are_drawn_by_the_seed_and_balanced_over_classes() -> None:
    targets = torch.tensor([0] * 30 + [1] * 4 + [2] * 30)
    drawn = balanced_rows(targets, 24, seed=0)
    assert targets[drawn].bincount().tolist() == [10, 4, 10]
    assert drawn == balanced_rows(targets, 24, seed=0)
    assert drawn != balanced_rows(targets, 24, seed=1)
    assert set(drawn) < set(balanced_rows(targets, 40, seed=0))
    assert balanced_rows(targets, 1000, seed=3) == list(range(64))


@pytest.mark.slow
def test_the_test_accuracy_is_that_of_the_learner(tiny: FrozenBackbone, tmp_path: Path) -> None:
    comparison = quick(tiny, two_sets(tmp_path / "sets"), limit=None)
    (cell,) = run_paper(comparison, ["cold"], 1, ["memory-5"], tmp_path / "out")
    with Registry.open(tmp_path / "tasks.db") as registry:
        config = method_config("memory-5", comparison.ours)
        task = Learner(tiny, registry).learn("cold", comparison.data / "cold", config=config)
    assert cell["test"] == task.metrics["test"]["accuracy"]
    assert cell["validation"] == task.metrics["validation"]["accuracy"]


def test_under_the_mask_a_pair_predicts_as_each_task_alone(out: Path) -> None:
    (pair,) = [cell for cell in cells(out) if cell["method"] == PAIRS]
    alone = [cell["test"] for cell in cells(out) if cell["method"] == "memory-5"]
    assert pair["alone"] == pair["together"] == alone
    assert pair["identical"]
    with Registry.open(out / "tasks.db") as registry:
        assert registry.get("cold-on-warm-seed0-memory-5").extends == ("warm-seed0-memory-5:1",)


@pytest.mark.slow
def test_changed_logits_are_detected(comparison: PaperConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = paper_grid._Run._predict

    def changed(run: Any, tasks: Sequence[Any], test: Any) -> dict[str, torch.Tensor]:
        return {name: logits + 1e-6 * (len(tasks) > 1) for name, logits in predict(run, tasks, test).items()}

    monkeypatch.setattr(paper_grid._Run, "_predict", changed)
    (pair,) = run_paper(comparison, tuple(CLASSES), 1, [PAIRS], tmp_path)
    assert not pair["identical"]
    assert "| **NO** |" in (tmp_path / "paper.md").read_text()


def test_the_report_includes_the_papers_results(out: Path) -> None:
    text = (out / "paper.md").read_text()
    assert "18 training images, drawn by the seed, of each dataset" in text
    assert "| dataset | head | memory-5 | unmasked-5 |" in text
    assert "| *iNaturalist* (paper) | 46.3 | 50.1 |  |" in text
    assert "cannot be registered" in text
    assert "| warm + cold | warm |" in text
    assert "| (paper) | *iNaturalist* and 3 more | 50.0 | 17.3 | -32.7 |" in text
    assert (out / "paper.png").read_bytes().startswith(b"\x89PNG")
    rows = (out / "paper.csv").read_text().splitlines()
    assert rows[0] == "set,seed,method,what,accuracy,seconds"
    assert len(rows) == 1 + 6 * 2 + (2 + 2 + 1 + 2) + (2 + 2)


def test_accuracies_are_means_and_standard_deviations_over_seeds(tiny: FrozenBackbone, tmp_path: Path) -> None:
    results = [
        scored(method, "", name, seed, test=test, chosen={"epoch": seed})
        for name, seed, method, test in (
            ("a", 0, "head", 0.5), ("a", 1, "head", 0.7), ("b", 0, "head", 0.8), ("b", 1, "head", 0.8),
            ("a", 0, "full", 0.9), ("a", 1, "full", 0.9),
        )
    ]  # fmt: skip
    write_report(results, tiny, tmp_path, None, tmp_path)
    text = (tmp_path / "paper.md").read_text()
    assert "| dataset | full | head |\n" in text
    assert "| a | 90.0 ± 0.0 | 60.0 ± 14.1 |\n| b | – | 80.0 ± 0.0 |\n| **mean** | – | **70.0** |\n" in text
    assert "| head | 50.0 | 2 | 4 | epoch 0 (2); epoch 1 (2) |" in text  # ties in order of appearance


def scored(method: str, right: str, name: str = "a", seed: int = 0, **more: Any) -> dict[str, Any]:
    """A cell with a 0 or 1 for each of four test images."""
    return {
        "set": name, "seed": seed, "method": method, "validation": 0.5, "seconds": 2.0, "num_images": 8,
        "test": right.count("1") / 4, "right": right, "chosen": {"epoch": 1}, **more,
    }  # fmt: skip


def test_methods_as_shipped_are_compared_with_the_strongest_baseline(tiny: FrozenBackbone, tmp_path: Path) -> None:
    results = [
        cell
        for name in ("a", "b")
        for cell in (
            scored("full", "1000", name, rate="adamw 1e-05", validation_loss=1.0, last_validation=0.4, last_test=0.25,
                   last_right="0001"),
            scored("full", "0000", name, rate="sgd 0.01", validation_loss=2.0, last_validation=0.6, last_test=0.5,
                   last_right="1100"),
            scored("attentive", "0000", name, rate="adamw 0.001", validation_loss=1.0, last_validation=0.4,
                   last_test=0.0, last_right="0000"),
            scored("linear-probe", "1000", name), scored("default", "1110", name),
        )
    ]  # fmt: skip
    write_report(results, tiny, tmp_path, 100, tmp_path)
    text = (tmp_path / "paper.md").read_text()
    # Equal validation accuracy, so the lower loss wins: 1e-05 at its best epoch, and 0.01 after the last one.
    columns = "| dataset | full | full (last) | attentive | attentive (last) | linear-probe | default |"
    assert f"{columns} linear-probe minus full (last) | default minus full (last) |" in text
    assert "| a | 25.0 | 50.0 | 0.0 | 0.0 | 25.0 | 75.0 | -25.0 ±" in text
    assert "| **mean** | 25.0 | 50.0 | 0.0 | 0.0 | 25.0 | 75.0 | -25.0 ±" in text


def test_a_paired_gain_compares_the_same_images_and_has_a_standard_error() -> None:
    half = "1100" * 100
    cells = [scored("full", half), scored("default", half, seed=0), scored("default", "1" * 400, seed=1)]
    assert paired_gain(cells, ["a"], "default", "full") == (0.0, 0.0)  # only common seeds, image by image
    cells[1] = scored("default", "1110" * 100)
    gain, error = paired_gain(cells, ["a"], "default", "full") or (0, 0)
    assert gain == 25
    assert error == pytest.approx(100 * (0.25 * 0.75 / 400) ** 0.5, rel=0.1)
    cells += [scored("full", "0000" * 100, "b"), scored("default", "0000" * 100, "b")]
    gain, halved = paired_gain(cells, ["a", "b"], "default", "full") or (0, 0)
    assert (gain, halved) == (12.5, pytest.approx(error / 2, rel=0.1))
    assert paired_gain(cells, ["a", "c"], "default", "full") is None


def test_the_share_of_the_gap_from_head_to_full_follows_from_the_means(tiny: FrozenBackbone, tmp_path: Path) -> None:
    results = [
        scored(method, "", name, test=test)
        for name in ("a", "b")
        for method, test in (("full", 0.9), ("head", 0.6), ("adapters-8", 0.8))
    ]
    write_report(results, tiny, tmp_path, None, tmp_path)
    assert "| share of the gap from head to full | 100 % | 0 % | 67 % |" in (tmp_path / "paper.md").read_text()


def test_the_papers_results_are_complete() -> None:
    assert all(len(row) == 7 for row in PAPER.values())
    assert (PAPER["CIFAR-100"]["full"], PAPER["Places-365"]["memory-20"]) == (91.8, 54.1)


def test_unknown_methods_and_datasets_are_refused_before_anything_is_computed(
    comparison: PaperConfig, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"Unknown method 'memory'\. Known: full, .* pairs, collapse, with M"):
        run_paper(comparison, ["warm"], 1, ["head", "memory"], tmp_path / "out")
    with pytest.raises(DataError, match="has no dataset 'hot' with train/ and test/"):
        run_paper(comparison, ["warm", "hot"], 1, ["head"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_registrable_methods_are_trained_like_the_baselines() -> None:
    baselines = BaselineConfig()
    assert (OURS.batch_size, OURS.refit, OURS.fall_back) == (baselines.batch_size, False, False)
    assert (OURS.clip_norm, OURS.warmup_steps, OURS.validation_fraction) == (
        baselines.clip_norm, baselines.warmup_steps, baselines.validation_fraction,
    )  # fmt: skip
    assert method_config("head", OURS) == LearnConfig(
        head_only=True, layer_head=False, batch_size=OURS.batch_size, refit=False, calibrate=False
    )
