"""A repeated `learn`: the same task, new test images, retired versions and reserved names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from addenda import LearnConfig, Learner, Registry
from addenda.exceptions import NameTakenError, RegistryError, RetiredError
from addenda.learner import LearnRow, learn_many
from tests.support.commands import Run
from tests.support.messy import HEAD_ONLY, LEARN, with_splits


def test_a_repeated_run_keeps_the_probes_scores_beside_files_that_were_left_out(tmp_path: Path, run: Run) -> None:
    data = with_splits(tmp_path / "data", "train", "test")
    (data / "test" / "red" / "notes.txt").write_text("no image")
    before = json.loads(run("learn", "any", data, *LEARN, "--json").out)["metrics"]
    run("evaluate", "any", data)
    again = json.loads(run("learn", "any", data, *LEARN, "--json").out)["metrics"]
    assert again["linear_probe"] == before["linear_probe"]
    assert "test" in again["linear_probe"]


# --- learning again ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_new_test_images_are_evaluated_though_the_task_was_learned_before(tmp_path: Path, run: Run) -> None:
    data = with_splits(tmp_path / "data", "train", "test", "other")
    train, test, other = (data / split for split in ("train", "test", "other"))
    for red, blue in zip((other / "red").iterdir(), (other / "blue").iterdir(), strict=True):
        content = red.read_bytes()
        red.write_bytes(blue.read_bytes())
        blue.write_bytes(content)
    before = run("learn", "any", train, *LEARN, "--test", test, "--json")
    again = run("learn", "any", train, *LEARN, "--test", other)
    assert "already learned from these images with these settings; it was now evaluated on this test split" in again.out
    accuracy = json.loads(run("evaluate", "any", other, "--json").out)["metrics"]["accuracy"]
    repeated = json.loads(run("learn", "any", train, *LEARN, "--test", other, "--json").out)
    assert repeated["metrics"]["test"]["accuracy"] == accuracy
    assert repeated["metrics"]["test"]["confusion"] != json.loads(before.out)["metrics"]["test"]["confusion"]
    assert not any("test" in repeated["metrics"][probe] for probe in ("linear_probe", "layer_probe"))
    assert repeated["already"]
    assert "nothing was done" in run("learn", "any", train, *LEARN, "--test", test).out
    assert "nothing was done" in run("learn", "any", train, *LEARN, "--test", other).out
    with Registry.open(tmp_path / "tasks.db") as registry:
        assert len({record.data_fingerprint for record in registry.evaluations("any")}) == 2
        assert registry.record("any").metrics == json.loads(before.out)["metrics"]
    many = tmp_path / "many.yaml"
    many.write_text(
        f"config: {{head_only: true}}\ntasks: [{{name: any, data: {str(train)!r}, test: {str(other)!r}}}]\n"
    )
    (row,) = json.loads(run("learn-many", many, "--backbone", "glyphs", "--json").out)
    assert (row["state"], row["metrics"]["test"]["accuracy"]) == ("learned before", accuracy)


def test_a_test_split_added_later_is_evaluated(learner: Learner, tmp_path: Path) -> None:
    data = with_splits(tmp_path / "data", "train")
    assert "test" not in learner.learn("any", data, config=HEAD_ONLY).metrics
    with_splits(data, "test")
    task = learner.learn("any", data, config=HEAD_ONLY)
    assert task.metrics["test"]["num_images"] == 8
    assert task.sha256 == learner.registry.get("any").sha256
    assert len(learner.registry.evaluations("any")) == 1


def test_a_retired_version_is_refused_and_can_be_added_again(learner: Learner, folder: Path) -> None:
    first = learner.learn("any", folder, config=HEAD_ONLY)
    probe = learner.registry.goldens("any")[0]
    learner.registry.retire("any", "it was wrong")
    message = r"'any:1' is the same task and was retired \(it was wrong\)\. To reactivate it, .* --new-version"
    with pytest.raises(RetiredError, match=message):
        learner.learn("any", folder, config=HEAD_ONLY)
    with pytest.raises(RetiredError, match=message):
        learner.registry.register(first, probe)
    (outcome,) = learn_many(learner, [LearnRow("any", folder, None, HEAD_ONLY)])
    assert outcome.state == "failed"
    with pytest.raises(NameTakenError):
        learner.learn("any", folder, config=LearnConfig(head_only=True, seed=1))
    revived = learner.learn("any", folder, config=HEAD_ONLY, new_version=True)
    assert (revived.ref, revived.sha256) == ("any:2", first.sha256)
    assert learner.learn("any", folder, config=HEAD_ONLY).ref == "any:2"
    assert learner.registry.register(first, probe).ref == "any:2"
    assert learner.registry.check_integrity().ok


@pytest.mark.parametrize("name", ["auto", "combined", "features", "none"])
def test_reserved_words_cannot_name_a_task(learner: Learner, folder: Path, run: Run, name: str) -> None:
    with pytest.raises(RegistryError, match=f"The name '{name}' is reserved"):
        learner.learn(name, folder, config=HEAD_ONLY)
    assert f"The name '{name}' is reserved" in run("learn", name, folder, *LEARN).err
    task = learner.learn("any", folder, config=HEAD_ONLY)
    renamed = replace(task, name=name, version=None)
    with pytest.raises(RegistryError, match=f"The name '{name}' is reserved"):
        learner.registry.register(renamed, learner.registry.goldens("any")[0])


@pytest.mark.slow
def test_test_images_with_a_bad_one_are_evaluated_once_and_it_is_reported(tmp_path: Path, run: Run) -> None:
    data = with_splits(tmp_path / "data", "train", "other")
    (data / "other" / "red" / "junk.png").write_bytes(b"junk")
    run("learn", "any", data / "train", *LEARN, "--test", data / "train")
    words = ("learn", "any", data / "train", *LEARN, "--test", data / "other", "--skip-bad")
    first, second = (json.loads(run(*words, "--json").out) for _ in range(2))
    assert first == second
    assert len(first["test"]["skipped"]) == 1
    assert "skipped: " in run(*words).out
    with Registry.open(tmp_path / "tasks.db") as registry:
        assert len(registry.evaluations("any")) == 2


def test_under_other_numerics_the_error_says_so(learner: Learner, folder: Path) -> None:
    learner.learn("any", folder, config=HEAD_ONLY)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(NameTakenError, match=r"\(version 1\) with other numerics, from these images with these"):
            learner.learn("any", folder, config=HEAD_ONLY)
        with pytest.raises(NameTakenError, match="with other content"):
            learner.learn("any", folder, config=LearnConfig(head_only=True, seed=1))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_test_split_given_later_is_compared_with_the_training_images(run: Run, folder: Path, tmp_path: Path) -> None:
    run("learn", "any", folder, *LEARN)
    again = run("learn", "any", folder, *LEARN, "--test", folder)
    assert "8 of 8 test images are also training images" in again.err
    assert "test" in again.out
    repeated = json.loads(run("learn", "any", folder, *LEARN, "--test", folder, "--json").out)
    assert repeated["repeated"]["test"] == 8
    assert "any:1 was learned from 8 of the test images" in run("evaluate", "any", folder).err


@pytest.mark.slow
def test_the_files_that_cannot_be_read_are_named_where_they_are_now(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "junk.png").write_bytes(b"junk")
    assert run("learn", "any", folder, *LEARN, "--skip-bad").code == 0
    moved = folder.rename(tmp_path / "moved")
    refused = run("learn", "any", moved, *LEARN)
    assert refused.code == 2
    assert f"{moved!s}/red/junk.png" in refused.err
    assert str(folder) not in refused.err
    assert "skipped when it was learned: " in run("learn", "any", moved, *LEARN, "--skip-bad").out
