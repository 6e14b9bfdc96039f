"""`addenda learn`, `learn-many` and `evaluate`: their options, output and records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from addenda import Registry
from tests.support.commands import Result, Run
from tests.support.images import colour_folder


def test_learn_prints_the_scores_of_the_task_and_both_probes(learned: Result) -> None:
    assert "ones:1" in learned.out
    for split in (r"validation \(\d+\)", r"test \(24\)"):
        for model in ("linear probe", "layer probe", "task"):
            assert re.search(rf"{split} +{model} ", learned.out)


@pytest.mark.slow
def test_what_learning_will_take_is_said_beforehand(
    run: Run, learned: Result, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addenda.text.NOTABLE_S", 0)
    again = run("learn", "zeros", digits_folder, "--epochs", "2", "--views", "5")
    assert again.code == 0, again.err
    for said in (
        r"take 0\.0[1-9] GB, and fits to them up to 0\.1\d GB of memory; all are cached in ",
        r"^\d+ views at \S+ per second: about \d+ s\.$",
        r"^\d+ steps of the sweep at \S+ per second: about \d+ s\.$",
    ):
        assert len(re.findall(said, again.err, re.MULTILINE)) == 1, said
    assert "per second" not in run("learn", "more", digits_folder, "--epochs", "2", "--seed", "1", "--json").err


def test_learning_the_same_task_again_reports_that_and_does_nothing(
    run: Run, learned: Result, digits_folder: Path
) -> None:
    again = run("learn", "ones", digits_folder, "--epochs", "2", "--lr", "0.3")
    assert again.code == 0
    assert "already learned" in again.out
    result = json.loads(run("learn", "ones", digits_folder, "--epochs", "2", "--lr", "0.3", "--json").out)
    assert (result["task"], result["already"]) == ("ones:1", True)


def test_a_taken_name_is_one_line_and_exit_code_2(run: Run, learned: Result, digits_folder: Path) -> None:
    result = run("learn", "ones", digits_folder, "--epochs", "1")
    assert result.code == 2
    assert result.err.startswith("Error: Task 'ones' is already registered (version 1)")
    assert "--new-version" in result.err


def test_a_task_grows_by_a_class_and_says_from_what(run: Run, tmp_path: Path) -> None:
    first, more = (colour_folder(tmp_path / part, classes=c) for part, c in (("a", ("blue", "red")), ("b", ("green",))))
    assert run("learn", "colours", first, "--backbone", "glyphs", "--head-only").code == 0
    refused = run("learn", "colours", more, "--grow", "--lr", "0.1", "--head-only")
    assert refused.code == 2
    assert refused.err.startswith("Error: --grow takes no --head-only or --lr: it fits a head in closed form")
    test = colour_folder(tmp_path / "test", seed=1)
    grown = run("learn", "colours", more, "--grow", "--test", test)
    assert grown.out.startswith("colours:2 was grown from colours:1 by 8 images.\n")
    assert re.search(r"grown from +colours:1 ", grown.out)
    assert re.search(r"test \(24\) +task ", grown.out)
    assert "colours:2 was grown from colours:1." in run("tasks", "history", "colours").out
    assert "grown from colours:1" in run("tasks", "list").out
    assert json.loads(run("tasks", "show", "colours", "--json").out)["grown_from"] == "colours:1"
    again = run("learn", "colours:1", more, "--grow", "--json")
    assert [json.loads(again.out)[key] for key in ("task", "already", "grown_from")] == ["colours:2", True, "colours:1"]
    nothing_new = run("learn", "colours", first, "--grow")
    assert (nothing_new.code, "has nothing new" in nothing_new.err) == (2, True)
    assert run("verify").code == 0


def test_settings_come_from_defaults_then_file_then_options(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("epochs: 1\nlearning_rate: [0.2]\nnum_memory_tokens: 2\n")
    result = run(
        "learn",
        "ones",
        digits_folder,
        "--backbone",
        "glyphs",
        "--config",
        tmp_path / "settings.yaml",
        "--memory",
        "3",
        "--json",
    )
    assert result.code == 0, result.err
    with Registry.open(tmp_path / "tasks.db") as registry:
        config = registry.record("ones").config
    assert (config["epochs"], config["learning_rate"], config["num_memory_tokens"]) == (1, [0.2], 3)
    assert config["momentum"] == 0.9


def test_every_invalid_setting_of_a_file_is_reported(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("epoch: 1\nmomentum: 2\n")
    result = run("learn", "ones", digits_folder, "--backbone", "glyphs", "--config", tmp_path / "settings.yaml")
    assert result.code == 2
    assert "epoch" in result.err
    assert "momentum" in result.err


def test_a_multi_label_task_is_shown_with_its_own_metrics(run: Run, learned: Result, tagged: Path) -> None:
    created = run("learn", "tags", tagged, "--epochs", "1", "--lr", "0.3", "--class-weights", "balanced")
    assert created.code == 0, created.err
    for text in (created.out, run("tasks", "show", "tags").out):
        assert "multi-label" in text
        assert "mAP" in text
        assert "exact match" in text
        assert "temperature" in text
        assert "test (12)" in text
    evaluated = run("evaluate", "tags", tagged)
    assert evaluated.code == 0, evaluated.err
    assert "12 images: mAP" in evaluated.out
    assert "Average precision by label" in evaluated.out
    assert "mAP %" in run("tasks", "show", "tags").out
    metrics = json.loads(run("evaluate", "tags", tagged, "--json").out)["metrics"]
    assert set(metrics["per_class"]) == {"even", "high", "odd"}
    listed = [line for line in run("tasks", "list").out.splitlines() if ":1" in line]
    score = f"{100 * metrics['mean_average_precision']:.1f}"
    assert [word in listed[0] for word in ("ones:1", "accuracy")] == [True, True]
    assert [word in listed[1] for word in ("tags:1", "mAP", score)] == [True, True, True]
    with Registry.open(tagged.parent / "tasks.db") as registry:
        temperature = registry.get("tags").temperature
    assert json.loads(run("tasks", "show", "tags", "--json").out)["temperature"] == temperature


@pytest.mark.slow
def test_every_setting_of_a_run_can_be_given_as_an_option(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("fall_back: false\n")
    given = ("--adapter-rank", "1", "--adapter-rank", "2", "--adapter-lr", "0.05", "--label-smoothing", "0.1",
             "--config", tmp_path / "own.yaml")  # fmt: skip
    result = run(
        "learn", "ones", digits_folder, "--backbone", "glyphs", "--epochs", "1", "--lr", "0.3", *given,
        "--class-weights", "balanced",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "Adapters of rank 2 add" in result.err
    with Registry.open(tmp_path / "tasks.db") as registry:
        config, rank = registry.record("ones").config, registry.get("ones").adapter_rank
    assert (config["adapter_rank"], config["adapter_learning_rate"]) == ([1, 2], 0.05)
    assert (config["label_smoothing"], config["class_weights"]) == (0.1, "balanced")
    assert f"of rank {rank}" in result.out
    child = run("learn", "child", digits_folder, "--extends", "ones", "--epochs", "1", "--lr", "0.3")
    assert child.code == 0, child.err
    assert "Adapters" not in child.err
    assert "ones:1" in run("tasks", "list").out.splitlines()[-2]
    assert json.loads(run("tasks", "show", "ones", "--json").out)["adapter_rank"] == rank


@pytest.mark.slow
def test_many_tasks_are_learned_from_one_file(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    (digits_folder.parent / "few" / "a").mkdir(parents=True)
    (digits_folder.parent / "few" / "b").mkdir()
    for name in ("a", "b"):
        for number in range(3):
            (digits_folder.parent / "few" / name / f"{number}.png").write_bytes(b"no image")
    file = tmp_path / "tasks.yaml"
    file.write_text(
        "config: {epochs: 1, learning_rate: 0.3, fall_back: false}\n"
        "tasks:\n"
        "  - {name: ones, data: digits}\n"
        "  - {name: few, data: few}\n"
        "  - {name: after-few, data: digits, extends: few}\n"
        "  - {name: child, data: digits, extends: ones}\n"
    )
    first = run("learn-many", file, "--backbone", "glyphs")
    assert first.code == 1
    assert "2 of 4 tasks of" in first.out
    lines = [line.split() for line in reversed(first.out.splitlines())]  # the table precedes the failures
    states = {words[0]: words[-1] for words in lines if len(words) == 8}
    assert [states[name] for name in ("ones:1", "few", "after-few", "child:1")] == [
        "learned", "failed", "skipped", "learned",
    ]  # fmt: skip
    assert "few failed: 6 of 6 images in" in first.out
    assert "after-few skipped: it extends 'few', which failed" in first.out
    skipping = tmp_path / "skipping.yaml"
    bad = next((digits_folder / "train").glob("*/*.png")).with_name("bad.png")
    bad.write_bytes(b"no image")
    skipping.write_text("tasks: [{name: with-bad, data: digits, config: {head_only: true}}]")
    skipped = run("learn-many", skipping, "--skip-bad").out.replace("\n", "")
    assert "with-bad, skipped: " in skipped
    assert str(bad) in skipped
    bad.unlink()
    again = run("learn-many", file, "--json")
    assert again.code == 1
    outcomes = json.loads(again.out)
    assert [row["state"] for row in outcomes] == ["learned before", "failed", "skipped", "learned before"]
    assert outcomes[0]["metrics"]["test"]["num_images"] == 24
    assert len(outcomes[3]["sha256"]) == 64
    file.write_text("tasks: [{name: ones, data: digits, config: {epochs: 1, learning_rate: 0.3, fall_back: false}}]")
    assert run("learn-many", file).code == 0
    file.write_text("tasks: [{name: ones, data: nowhere}, {nam: x}]")
    refused = run("learn-many", file)
    assert refused.code == 2
    assert refused.err.startswith("Error: Nothing was learned.")
    file.write_text("tasks: [{name: ones, data: digits, extends: other}]")
    refused = run("learn-many", file, "--registry", "new.db")
    assert refused.code == 2
    assert "there is no registry yet that could have 'other'" in refused.err
    assert not Path("new.db").exists()


@pytest.mark.slow
def test_an_evaluation_is_shown_with_its_task(run: Run, learned: Result, digits_folder: Path) -> None:
    result = run("evaluate", "ones", digits_folder)
    assert result.code == 0
    assert "24 images: accuracy" in result.out
    assert "Accuracy by class" in result.out
    assert "Evaluations" in run("tasks", "show", "ones").out
    assert json.loads(run("evaluate", "ones", digits_folder, "--json").out)["metrics"]["num_images"] == 24
