"""The commands as a person meets them: output, exit codes, and one line for bad input."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image

from addenda import Registry, cli
from addenda.benchmarks.digits import digits
from tests.commands import Result, Run, addenda
from tests.images import colour_folder


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Where the digits 0 and 1 are as a folder with train/ and test/, and the registry of a task learned from them."""
    place = tmp_path_factory.mktemp("first")
    for part, test in (("train", False), ("test", True)):
        data = digits((0, 1), test)
        for number in range(24):
            folder = place / "digits" / part / data.classes[data.targets[number]]
            folder.mkdir(parents=True, exist_ok=True)
            data.images[number].save(folder / f"{number}.png")
    quick = ("--backbone", "glyphs", "--epochs", "2", "--lr", "0.3")
    result = addenda("learn", "ones", place / "digits", *quick, "--registry", place / "tasks.db")
    assert result.code == 0, result.err
    return place, result


@pytest.fixture
def folder(first: tuple[Path, Result], tmp_path: Path) -> Path:
    """The digits 0 and 1, to be changed."""
    return shutil.copytree(first[0] / "digits", tmp_path / "digits")


@pytest.fixture
def learned(first: tuple[Path, Result], tmp_path: Path) -> Result:
    """What was said when the task was learned, which is in the test's own registry."""
    shutil.copy(first[0] / "tasks.db", tmp_path)
    return first[1]


def test_learn_prints_the_task_beside_its_rival(learned: Result) -> None:
    assert "ones:1" in learned.out
    assert "logistic regression" in learned.out
    assert "test (24)" in learned.out


def test_learning_the_same_again_says_so_and_does_nothing(run: Run, learned: Result, folder: Path) -> None:
    again = run("learn", "ones", folder, "--epochs", "2", "--lr", "0.3")
    assert again.code == 0
    assert "learned before" in again.out
    answer = json.loads(run("learn", "ones", folder, "--epochs", "2", "--lr", "0.3", "--json").out)
    assert (answer["task"], answer["already"]) == ("ones:1", True)


def test_a_name_taken_is_one_line_and_exit_code_2(run: Run, learned: Result, folder: Path) -> None:
    result = run("learn", "ones", folder, "--epochs", "1")
    assert result.code == 2
    assert result.err.startswith("Error: Task 'ones' is already registered (version 1)")
    assert "--new-version" in result.err


def test_settings_come_from_defaults_then_file_then_options(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("epochs: 1\nlearning_rate: [0.2]\nnum_memory_tokens: 2\n")
    result = run(
        "learn",
        "ones",
        folder,
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


def test_every_mistake_in_a_configuration_is_named(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("epoch: 1\nmomentum: 2\n")
    result = run("learn", "ones", folder, "--backbone", "glyphs", "--config", tmp_path / "settings.yaml")
    assert result.code == 2
    assert "epoch" in result.err
    assert "momentum" in result.err


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    """Digits as a listing with several labels: 0 has none, 1 is odd, 2 is even, 3 is odd and high."""
    lines = ["path,labels,split"]
    (tmp_path / "tagged").mkdir()
    for part, test in (("train", False), ("test", True)):
        data = digits((0, 1, 2, 3), test)
        for number in range(48 if part == "train" else 12):
            labels = ("", "odd", "even", "high|odd")[data.targets[number]]
            data.images[number].save(tmp_path / "tagged" / f"{part}-{number}.png")
            lines.append(f"tagged/{part}-{number}.png,{labels},{part}")
    (tmp_path / "tags.csv").write_text("\n".join(lines))
    return tmp_path / "tags.csv"


def test_a_task_of_several_labels_is_shown_by_its_own_figures(run: Run, learned: Result, tagged: Path) -> None:
    made = run("learn", "tags", tagged, "--epochs", "1", "--lr", "0.3", "--class-weights", "balanced")
    assert made.code == 0, made.err
    shown = run("tasks", "show", "tags").out
    for text in (made.out, shown):
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


def test_predictions_of_several_labels_are_all_that_are_likely(run: Run, learned: Result, tagged: Path) -> None:
    assert run("learn", "tags", tagged, "--head-only").code == 0
    digits = sorted(map(str, (tagged.parent / "tagged").glob("test-*.png")))
    answers = json.loads(run("predict", *digits, "--task", "tags", "--json").out)["images"]
    given = {path: [entry["label"] for entry in answers[path]["tags"]] for path in digits}
    assert all(entry["probability"] >= 0.5 for answer in answers.values() for entry in answer["tags"])
    assert {0, 1, 2} == set(map(len, given.values()))
    rows = csv.DictReader(io.StringIO(run("predict", *digits, "--task", "tags", "--csv").out))
    assert [(row["image"], row["label"]) for row in rows] == [
        (p, label) for p, found in given.items() for label in found
    ]
    shown = run("predict", *digits, "--task", "tags").out
    assert shown.count(" none ") == list(given.values()).count([])


def test_every_setting_of_a_run_can_be_given_as_an_option(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("fall_back: false\n")
    given = ("--adapter-rank", "1", "--adapter-rank", "2", "--adapter-lr", "0.05", "--label-smoothing", "0.1",
             "--config", tmp_path / "own.yaml")  # fmt: skip
    result = run(
        "learn", "ones", folder, "--backbone", "glyphs", "--epochs", "1", "--lr", "0.3", *given,
        "--class-weights", "balanced",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "Adapters of rank 2 weigh" in result.err
    with Registry.open(tmp_path / "tasks.db") as registry:
        config, rank = registry.record("ones").config, registry.get("ones").adapter_rank
    assert (config["adapter_rank"], config["adapter_learning_rate"]) == ([1, 2], 0.05)
    assert (config["label_smoothing"], config["class_weights"]) == (0.1, "balanced")
    assert f"of rank {rank}" in result.out
    child = run("learn", "child", folder, "--extends", "ones", "--epochs", "1", "--lr", "0.3")
    assert child.code == 0, child.err
    assert "Adapters" not in child.err
    assert "ones:1" in run("tasks", "list").out.splitlines()[-2]
    assert json.loads(run("tasks", "show", "ones", "--json").out)["adapter_rank"] == rank


def test_many_tasks_are_learned_from_one_file(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder.parent / "few" / "a").mkdir(parents=True)
    (folder.parent / "few" / "b").mkdir()
    for name in ("a", "b"):
        for number in range(3):
            (folder.parent / "few" / name / f"{number}.png").write_bytes(b"no image")
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
    lines = [line.split() for line in reversed(first.out.splitlines())]  # the table stands before what went wrong
    states = {words[0]: words[-1] for words in lines if len(words) == 8}
    assert [states[name] for name in ("ones:1", "few", "after-few", "child:1")] == [
        "learned", "failed", "skipped", "learned",
    ]  # fmt: skip
    assert "few failed: 6 of 6 images in" in first.out
    assert "after-few skipped: it extends 'few', which failed" in first.out
    again = run("learn-many", file, "--json")
    assert again.code == 1
    answer = json.loads(again.out)
    assert [row["state"] for row in answer] == ["learned before", "failed", "skipped", "learned before"]
    assert answer[0]["metrics"]["test"]["num_images"] == 24
    assert len(answer[3]["sha256"]) == 64
    file.write_text("tasks: [{name: ones, data: digits, config: {epochs: 1, learning_rate: 0.3, fall_back: false}}]")
    assert run("learn-many", file).code == 0
    file.write_text("tasks: [{name: ones, data: nowhere}, {nam: x}]")
    refused = run("learn-many", file)
    assert refused.code == 2
    assert refused.err.startswith("Error: Nothing was learned.")


def test_tasks_are_listed_and_shown(run: Run, learned: Result) -> None:
    listed = run("tasks", "list")
    assert "1 task in" in listed.out
    assert "ones:1" in listed.out
    shown = json.loads(run("tasks", "show", "ones", "--json").out)
    assert shown["ref"] == "ones:1"
    assert shown["labels"] == ["0", "1"]
    assert [t["ref"] for t in json.loads(run("tasks", "list", "--json").out)] == ["ones:1"]


def test_a_registry_is_a_path_or_a_url(run: Run, learned: Result, tmp_path: Path) -> None:
    listed = run("tasks", "list", "--registry", f"sqlite:///{tmp_path / 'tasks.db'}", "--json")
    assert listed.code == 0, listed.err
    assert [t["ref"] for t in json.loads(listed.out)] == ["ones:1"]


def test_an_evaluation_is_shown_with_its_task(run: Run, learned: Result, folder: Path) -> None:
    result = run("evaluate", "ones", folder)
    assert result.code == 0
    assert "24 images: accuracy" in result.out
    assert "Accuracy by class" in result.out
    assert "Evaluations" in run("tasks", "show", "ones").out
    assert json.loads(run("evaluate", "ones", folder, "--json").out)["metrics"]["num_images"] == 24


def test_predict_answers_files_and_folders_as_table_json_and_csv(run: Run, learned: Result, folder: Path) -> None:
    images = sorted((folder / "test").rglob("*.png"))
    assert str(images[0]) in run("predict", images[0]).out
    answers = json.loads(run("predict", folder / "test", "--json").out)["images"]
    assert set(answers) == set(map(str, images))
    hits = [answers[str(path)]["ones"][0]["label"] == path.parent.name for path in images]
    assert sum(hits) > 20
    assert sum(entry["probability"] for entry in answers[str(images[0])]["ones"]) == pytest.approx(1, abs=1e-5)
    rows = list(csv.DictReader(io.StringIO(run("predict", folder / "test", "--csv", "--top", "1").out)))
    assert {row["image"]: row["label"] for row in rows} == {p: a["ones"][0]["label"] for p, a in answers.items()}


@pytest.fixture
def two_tasks(run: Run, learned: Result, tmp_path: Path) -> Path:
    """Beside zeros and ones, sevens and eights; gives a folder with images of both, one of them in colour."""
    data = digits((7, 8), test=False)
    for number in range(40):
        place = tmp_path / "more" / data.classes[data.targets[number]]
        place.mkdir(parents=True, exist_ok=True)
        data.images[number].save(place / f"{number}.png")
    result = run("learn", "eights", tmp_path / "more", "--epochs", "1", "--lr", "0.3")
    assert result.code == 0, result.err
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, pair in (("ones", (0, 1)), ("eights", (7, 8))):
        test = digits(pair, test=True)
        for number in range(10):
            test.images[number].save(mixed / f"{name}-{number}.png")
    Image.effect_noise((64, 64), 90).convert("RGB").save(mixed / "noise.png")
    return mixed


def test_predict_chooses_the_task_for_each_image(run: Run, two_tasks: Path) -> None:
    found = json.loads(run("predict", two_tasks, "--task", "auto", "--json").out)
    answers = {Path(path).stem: answer for path, answer in found["images"].items()}
    assert len(answers) == 21
    right = [answer["task"] == name.partition("-")[0] for name, answer in answers.items() if name != "noise"]
    assert sum(right) >= 18
    assert all(0.5 <= answer["probability"] <= 1 for answer in answers.values())
    assert {label["label"] for label in answers["eights-0"]["labels"]} == {"7", "8"}
    assert not answers["noise"]["familiar"]
    rows = list(csv.DictReader(io.StringIO(run("predict", two_tasks, "--task", "auto", "--csv", "--top", "1").out)))
    assert {Path(row["image"]).stem: row["task"] for row in rows} == {n: a["task"] for n, a in answers.items()}
    shown = run("predict", two_tasks, "--task", "auto").out
    assert "21 images, the task chosen among 2" in shown
    assert f"none; nearest {answers['noise']['task']}" in shown


def test_predict_names_tasks_that_it_cannot_choose(run: Run, two_tasks: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "tasks.db")) as connection, connection:
        connection.execute("DROP TRIGGER statistics_no_delete")
        connection.execute("DELETE FROM statistics WHERE task_id = (SELECT id FROM task WHERE name = 'ones')")
    result = run("predict", two_tasks, "--task", "auto", "--json")
    assert "nothing was kept of their images: ones." in result.err
    assert {answer["task"] for answer in json.loads(result.out)["images"].values()} == {"eights"}
    with closing(sqlite3.connect(tmp_path / "tasks.db")) as connection, connection:
        connection.execute("DELETE FROM statistics")
    refused = run("predict", two_tasks, "--task", "auto")
    assert refused.code == 2
    assert "There is no task to choose from" in refused.err


def test_a_tasks_size_counts_what_a_router_knows(run: Run, learned: Result, tmp_path: Path) -> None:
    with Registry.open(tmp_path / "tasks.db") as opened:
        record = opened.record("ones")
    assert record.statistics_bytes > 10_000
    assert f"{(record.size_bytes + record.statistics_bytes) / 1000:.1f} kB" in run("tasks", "show", "ones").out
    assert f"{record.statistics_bytes / 1000:.1f} kB, for choosing the task" in run("tasks", "show", "ones").out


def test_a_bad_image_is_named_and_left_out_only_when_asked(run: Run, learned: Result, folder: Path) -> None:
    bad = folder / "test" / "0" / "bad.png"
    bad.write_bytes(b"no image")
    refused = run("predict", folder / "test")
    assert refused.code == 2
    assert str(bad) in refused.err
    assert "(--skip-bad leaves out what cannot be read.)" in refused.err
    skipped = run("predict", folder / "test", "--skip-bad", "--json")
    assert skipped.code == 0
    assert str(bad) in skipped.err
    assert str(bad) not in json.loads(skipped.out)["images"]


def test_verify_passes_and_names_a_task_whose_bytes_changed(
    run: Run, learned: Result, folder: Path, tmp_path: Path
) -> None:
    other = run("learn", "twos", folder, "--epochs", "1", "--lr", "0.1", "--memory", "1")
    assert other.code == 0
    good = run("verify")
    assert good.code == 0
    assert good.out.count("identical, byte for byte") == 2
    connection = sqlite3.connect(tmp_path / "tasks.db")
    connection.execute("DROP TRIGGER artifact_no_update")
    sha256, data = connection.execute(
        "SELECT sha256, artifact.data FROM artifact JOIN task ON task.artifact = sha256 WHERE name = 'ones'"
    ).fetchone()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    connection.execute("UPDATE artifact SET data = ? WHERE sha256 = ?", (flipped, sha256))
    connection.commit()
    connection.close()
    bad = run("verify", "--json")
    assert bad.code == 1
    assert {v["task"]: v["ok"] for v in json.loads(bad.out)} == {"ones:1": False, "twos:1": True}
    assert "Failed: ones:1" in bad.err
    served = run("predict", folder / "test", "--task", "twos")
    assert served.code == 0
    assert "'ones:1' cannot be trusted" in run("predict", folder / "test").err


@pytest.mark.parametrize(
    ("key", "value", "said"), [("mean", [0.4] * 3, "has fingerprint"), ("crop_pct", 0.5, "prepares images by")]
)
def test_verify_names_the_tasks_of_a_backbone_whose_preprocessing_changed(
    run: Run, learned: Result, tmp_path: Path, key: str, value: object, said: str
) -> None:
    connection = sqlite3.connect(tmp_path / "tasks.db")
    connection.execute("DROP TRIGGER backbone_no_update")
    (stored,) = connection.execute("SELECT preprocessing FROM backbone").fetchone()
    connection.execute("UPDATE backbone SET preprocessing = ?", (json.dumps({**json.loads(stored), key: value}),))
    connection.commit()
    connection.close()
    changed = run("verify")
    assert changed.code == 1
    assert said in changed.out
    assert "Failed: ones:1." in changed.err


def test_verify_record_keeps_the_probe_of_new_numerics(
    run: Run, learned: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        first = run("verify")
        assert first.code == 0
        assert "under another numerics fingerprint" in first.out or "new epoch" in first.out
        assert "--record" in first.out
        assert run("verify", "--record").code == 0
        (again,) = json.loads(run("verify", "--json").out)
        assert (again["same_numerics"], again["identical"]) == (True, True)
    finally:
        torch.set_num_threads(before)


def test_aliases_and_retirement(run: Run, learned: Result, folder: Path) -> None:
    assert "ones@production is ones:1" in run("tasks", "alias", "ones", "production").out
    assert run("evaluate", "ones@production", folder).code == 0
    assert "'ones@production' points at it" in run("tasks", "retire", "ones").err
    assert run("tasks", "alias", "ones", "production", "--remove").code == 0
    assert run("tasks", "retire", "ones").code == 0
    assert "0 tasks in" in run("tasks", "list").out
    assert "(retired)" in run("tasks", "list", "--retired").out
    gone = run("predict", folder / "test")
    assert gone.code == 2
    assert "holds no active task" in gone.err


DATA = "the folder to learn from"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tasks", "list"), "There is no registry at"),
        (("predict", "x.png"), "There is no registry at"),
        (("learn", "Bad Name", "."), "'Bad Name' is not a valid name"),
        (("learn", "a", "nowhere", "--backbone", "glyphs"), "There is no folder 'nowhere'"),
        (("learn", "a", DATA, "--backbone", "resnet50"), "is a ResNet"),
        (("learn", "a", DATA, "--backbone", "glyphs", "--mean", "x"), "'x' is not one number"),
        (("learn", "a", DATA, "--backbone", "glyphs", "--device", "nonsense"), "Device 'nonsense'"),
        (("learn", "a", "x" * 300, "--backbone", "glyphs"), "File name too long"),
        (("learn", "a", DATA, "--backbone", "glyphs", "--cache-gb", "nan"), "A cache cannot take nan GB"),
        (
            ("learn", "a", ".", "--adapter-rank", "auto", "--adapter-rank", "4"),
            "give whole numbers, or the one word auto",
        ),
        (("learn", "a", ".", "--adapter-rank", "-1"), "--adapter-rank is '-1'"),
        (("learn", "a", ".", "--class-weights", "some"), "class_weights: Input should be 'none' or 'balanced'"),
        (("learn", "a", ".", "--label-smoothing", "1"), "label_smoothing: Input should be less than 1"),
        (("learn", "a", ".", "--config", "none.yaml"), "The file 'none.yaml' cannot be read: No such file"),
        (("learn-many", "none.yaml"), "The file 'none.yaml' cannot be read: No such file"),
        (("bench", "continual", "nothing"), "There is no stream 'nothing'. Known: "),
        (
            ("bench", "continual", "digits", "--methods", "magic"),
            "Method 'magic' is not known. Known: addenda, ",
        ),
        (
            ("bench", "compare", "none", "none"),
            "There is no report at 'none'. ",
        ),
        (("backbones", "show", "vit_tiny_patch16_224", "--weights", "none.pth"), "'none.pth' does not exist"),
        (("tasks", "list", "--registry", "."), "is a folder, and a registry is a file"),
        (("predict", "x.png", "--json", "--csv"), "give one of them"),
        (("predict", "x.png", "--task", "auto", "--task", "a"), "--task auto chooses among all tasks: give it alone"),
        (("serve", "--metrics-port", "65536"), "Invalid value for '--metrics-port'"),
        (("learn", "a", ".", "--seed", "4294967296"), "seed: Input should be less than or equal to 4294967295"),
        (("export-model", "--out", "a.pt2"), "There is no registry at"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, folder: Path, arguments: tuple[str, ...], said: str) -> None:
    result = run(*(folder if argument == DATA else argument for argument in arguments))
    assert result.code == 2
    assert said in result.err
    assert "Traceback" not in result.err


def test_a_folder_that_is_not_there_is_told_before_weights_are_looked_for_or_a_registry_is_made(
    run: Run, tmp_path: Path
) -> None:
    registry = tmp_path / "tasks.db"
    for places in ([tmp_path / "gone"], [colour_folder(tmp_path / "data"), "--test", tmp_path / "gone"]):
        result = run("learn", "a", *places, "--registry", registry)
        assert result.code == 2
        assert f"There is no folder '{tmp_path / 'gone'}'" in result.err
        assert not registry.exists()


def test_an_unknown_task_is_told_with_what_is_known(run: Run, learned: Result, folder: Path) -> None:
    result = run("evaluate", "one", folder)
    assert result.code == 2
    assert "Task 'one' is not registered. Known: 'ones'. See: addenda tasks list" in result.err


def test_without_weights_and_network_the_default_backbone_says_how_to_give_a_file(run: Run, tmp_path: Path) -> None:
    result = run("learn", "a", colour_folder(tmp_path / "data"))
    assert result.code == 2
    assert "vit_base_patch16_224.augreg_in21k" in result.err
    assert "--weights" in result.err


def test_backbones_are_listed_and_shown_with_the_price_of_a_task(run: Run, learned: Result) -> None:
    listed = run("backbones", "list", "vit_tiny*")
    assert "in this registry" in listed.out
    assert "vit_tiny_patch16_224" in listed.out
    refused = json.loads(run("backbones", "list", "vit_base_patch16_gap*", "--json").out)
    assert any(row["status"] == "refused" and "class token" in row["detail"] for row in refused)
    assert "No model of timm's matches 'vit_huuge*'" in run("backbones", "list", "vit_huuge*").err
    shown = json.loads(run("backbones", "show", "glyphs", "--json").out)
    assert shown["task_cost"]["token_bytes"] == 4 * 128 * (1 + 5 * 5)
    adapted = json.loads(run("backbones", "show", "glyphs", "--adapter-rank", "8", "--json").out)["task_cost"]
    assert adapted["token_bytes"] > 10 * shown["task_cost"]["token_bytes"]
    assert "5 memory tokens and adapters of rank 8" in run("backbones", "show", "glyphs", "--adapter-rank", "8").out


def test_moved_weights_are_asked_for_and_checked(run: Run, folder: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import load_file, save_file

    model = timm.create_model("test_vit", num_classes=3)
    weights = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), weights)
    first = run("learn", "ones", folder, "--backbone", "test_vit", "--weights", weights, "--epochs", "1", "--lr", "0.1")
    assert first.code == 0, first.err
    weights.rename(tmp_path / "moved.safetensors")
    lost = run("verify")
    assert lost.code == 2
    assert "no longer at" in lost.err
    assert run("verify", "--weights", tmp_path / "moved.safetensors").code == 0
    changed = load_file(tmp_path / "moved.safetensors")
    changed["norm.bias"] = changed["norm.bias"] + 1
    save_file(changed, tmp_path / "other.safetensors")
    wrong = run("verify", "--weights", tmp_path / "other.safetensors")
    assert wrong.code == 1
    assert "These are other weights" in " ".join(wrong.out.split())
    assert "Failed: ones:1." in wrong.err
    refused = run("predict", folder / "test", "--weights", tmp_path / "other.safetensors")
    assert refused.code == 2
    assert "These are other weights" in refused.err


def test_phone_photos_are_turned_upright(run: Run, learned: Result, folder: Path) -> None:
    path = next((folder / "test").rglob("*.png"))
    upright = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    upright.save(folder / "upright.bmp")
    upright.rotate(90, expand=True).save(folder / "turned.png", exif=exif)
    answers = json.loads(run("predict", folder / "upright.bmp", folder / "turned.png", "--json").out)["images"]
    first, second = answers.values()
    assert first == second


@pytest.mark.slow
def test_help_answers_without_starting_a_framework() -> None:
    script = (
        "import sys; sys.argv = ['addenda', '--help']\n"
        "from addenda.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'timm', 'sqlalchemy', 'avalanche', 'sklearn', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.slow
def test_ctrl_c_while_a_connection_closes_is_told_in_one_line(run: Run, learned: Result) -> None:
    script = (
        "import sys; sys.argv = ['addenda', 'tasks', 'list']\n"
        "from sqlalchemy.engine.default import DefaultDialect\n"
        "from addenda.cli import main\n"
        "def interrupted(*_):\n    raise KeyboardInterrupt\n"
        "DefaultDialect.do_close = interrupted\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == cli.INTERRUPTED
    assert done.stderr == "Interrupted. Nothing half done was registered: give the same command again to go on.\n"


def test_every_command_says_what_it_does(run: Run) -> None:
    groups: list[tuple[str, ...]] = [()]
    seen = 0
    for group in groups:
        out = run(*group, "--help").out
        assert "Usage" in out
    import typer.main

    def walk(command: object, path: tuple[str, ...]) -> None:
        nonlocal seen
        for name, child in getattr(command, "commands", {}).items():
            assert child.help, (*path, name)
            for parameter in child.params:
                assert getattr(parameter, "help", None) or parameter.name in ("help",), (*path, name, parameter.name)
            seen += 1
            walk(child, (*path, name))

    walk(typer.main.get_command(cli.app), ())
    assert seen >= 15
