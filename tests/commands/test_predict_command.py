"""`addenda predict`: predictions of all tasks or of a routed one, and images that cannot be read."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from addenda.benchmarks.demo import digits
from tests.support.commands import Result, Run


def test_predict_prints_files_and_folders_as_table_json_and_csv(run: Run, learned: Result, digits_folder: Path) -> None:
    images = sorted((digits_folder / "test").rglob("*.png"))
    assert str(images[0]) in run("predict", images[0]).out
    predictions = json.loads(run("predict", digits_folder / "test", "--json").out)["images"]
    assert set(predictions) == set(map(str, images))
    hits = [predictions[str(path)]["ones"][0]["label"] == path.parent.name for path in images]
    assert sum(hits) > 20
    assert sum(entry["probability"] for entry in predictions[str(images[0])]["ones"]) == pytest.approx(1, abs=1e-5)
    rows = list(csv.DictReader(io.StringIO(run("predict", digits_folder / "test", "--csv", "--top", "1").out)))
    assert {row["image"]: row["label"] for row in rows} == {
        path: tasks["ones"][0]["label"] for path, tasks in predictions.items()
    }


@pytest.mark.slow
def test_multi_label_predictions_are_all_likely_labels(run: Run, learned: Result, tagged: Path) -> None:
    assert run("learn", "tags", tagged, "--head-only").code == 0
    digits = sorted(map(str, (tagged.parent / "tagged").glob("test-*.png")))
    predictions = json.loads(run("predict", *digits, "--task", "tags", "--json").out)["images"]
    labels = {path: [entry["label"] for entry in predictions[path]["tags"]] for path in digits}
    assert all(entry["probability"] >= 0.5 for tasks in predictions.values() for entry in tasks["tags"])
    assert {0, 1, 2} == set(map(len, labels.values()))
    rows = csv.DictReader(io.StringIO(run("predict", *digits, "--task", "tags", "--csv").out))
    assert [(row["image"], row["label"]) for row in rows] == [
        (path, label) for path, predicted in labels.items() for label in predicted
    ]
    table = run("predict", *digits, "--task", "tags").out
    assert table.count(" none ") == list(labels.values()).count([])


@pytest.fixture
def two_tasks(run: Run, learned: Result, tmp_path: Path) -> Path:
    """Learns a second task of sevens and eights; gives a folder with images of both tasks and one of noise."""
    data = digits((7, 8), test=False)
    for number in range(40):
        class_folder = tmp_path / "more" / data.classes[data.targets[number]]
        class_folder.mkdir(parents=True, exist_ok=True)
        data.images[number].save(class_folder / f"{number}.png")
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


@pytest.mark.slow
def test_predict_selects_tasks_by_pattern_and_tag_and_labels_by_probability(
    run: Run, two_tasks: Path, tmp_path: Path
) -> None:
    def predicted(*options: str) -> dict[str, list[dict[str, float]]]:
        result = run("predict", two_tasks / "ones-0.png", "--json", *options)
        assert result.code == 0, result.err
        return json.loads(result.out)["images"][str(two_tasks / "ones-0.png")]

    assert run("tasks", "tag", "eights", "beta").code == 0
    assert list(predicted("--task", "on*")) == list(predicted("--task", "ones", "--task", "on*")) == ["ones"]
    assert list(predicted("--task", "*")) == ["ones", "eights"]
    assert list(predicted("--tag", "beta")) == list(predicted("--tag", "beta", "--task", "*")) == ["eights"]
    every = predicted("--min-probability", "0")["ones"]
    assert len(every) == 2
    assert predicted("--min-probability", repr(every[0]["probability"]))["ones"] == every[:1]
    for options, message in (
        (("--task", "tw*"), "No available task matches 'tw*'"),
        (("--tag", "beta", "--task", "ones"), "No selected task has the tag 'beta'"),
        (("--tag", "beta", "--task", "auto"), "--task auto chooses among all tasks"),
        (("--tag", "beta", "--ray", "local", "--out", str(tmp_path / "out")), "cannot be used with --ray"),
    ):
        result = run("predict", two_tasks / "ones-0.png", *options)
        assert (result.code, message in result.err) == (2, True), result.err


def test_predict_chooses_the_task_for_each_image(run: Run, two_tasks: Path) -> None:
    result = json.loads(run("predict", two_tasks, "--task", "auto", "--json").out)
    routed = {Path(path).stem: choice for path, choice in result["images"].items()}
    assert len(routed) == 21
    hits = [choice["task"] == name.partition("-")[0] for name, choice in routed.items() if name != "noise"]
    assert sum(hits) >= 18
    assert all(0.5 <= choice["probability"] <= 1 for choice in routed.values())
    assert {label["label"] for label in routed["eights-0"]["labels"]} == {"7", "8"}
    assert not routed["noise"]["familiar"]
    rows = list(csv.DictReader(io.StringIO(run("predict", two_tasks, "--task", "auto", "--csv", "--top", "1").out)))
    assert {Path(row["image"]).stem: row["task"] for row in rows} == {
        name: choice["task"] for name, choice in routed.items()
    }
    table = run("predict", two_tasks, "--task", "auto").out
    assert "21 images, task chosen from 2" in table
    assert f"none; nearest {routed['noise']['task']}" in table


def test_predict_names_tasks_without_routing_statistics(run: Run, two_tasks: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "tasks.db")) as connection, connection:
        connection.execute("DROP TRIGGER statistics_no_delete")
        connection.execute("DELETE FROM statistics WHERE task_id = (SELECT id FROM task WHERE name = 'ones')")
    result = run("predict", two_tasks, "--task", "auto", "--json")
    assert "without routing statistics: ones." in result.err
    assert {choice["task"] for choice in json.loads(result.out)["images"].values()} == {"eights"}
    with closing(sqlite3.connect(tmp_path / "tasks.db")) as connection, connection:
        connection.execute("DELETE FROM statistics")
    refused = run("predict", two_tasks, "--task", "auto")
    assert refused.code == 2
    assert "No registered task has routing statistics, so none can be chosen; name tasks with --task." in refused.err


def test_what_many_images_will_take_is_said_after_the_first_batch(
    run: Run, learned: Result, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = digits_folder / "test", re.compile(r"^(\d+) images at \S+ per second: about \d+ s\.$", re.MULTILINE)
    assert not said.search(run("predict", folder).err)  # soon done
    monkeypatch.setattr("addenda.text.NOTABLE_S", 0)
    csv_run = run("predict", folder, "--csv")
    assert said.findall(csv_run.err) == [str(len(list(folder.rglob("*.png"))))]
    assert not said.search(csv_run.out)
    assert run("predict", folder, "--json").err == ""


def test_a_bad_image_is_an_error_or_skipped_on_request(run: Run, learned: Result, digits_folder: Path) -> None:
    bad = digits_folder / "test" / "0" / "bad.png"
    bad.write_bytes(b"no image")
    refused = run("predict", digits_folder / "test")
    assert refused.code == 2
    assert str(bad) in refused.err
    assert ". Pass --skip-bad to skip unreadable images." in refused.err
    skipped = run("predict", digits_folder / "test", "--skip-bad", "--json")
    assert skipped.code == 0
    assert str(bad) in skipped.err
    assert str(bad) not in json.loads(skipped.out)["images"]


def test_exif_orientation_is_applied(run: Run, learned: Result, digits_folder: Path) -> None:
    path = next((digits_folder / "test").rglob("*.png"))
    upright = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    upright.save(digits_folder / "upright.bmp")
    upright.rotate(90, expand=True).save(digits_folder / "turned.png", exif=exif)
    result = run("predict", digits_folder / "upright.bmp", digits_folder / "turned.png", "--json")
    first, second = json.loads(result.out)["images"].values()
    assert first == second
