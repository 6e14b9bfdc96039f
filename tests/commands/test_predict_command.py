"""`addenda predict`: answers of all tasks or of the one that fits, and images that cannot be read."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from addenda.benchmarks.demo import digits
from tests.support.commands import Result, Run


def test_predict_answers_files_and_folders_as_table_json_and_csv(
    run: Run, learned: Result, digits_folder: Path
) -> None:
    images = sorted((digits_folder / "test").rglob("*.png"))
    assert str(images[0]) in run("predict", images[0]).out
    answers = json.loads(run("predict", digits_folder / "test", "--json").out)["images"]
    assert set(answers) == set(map(str, images))
    hits = [answers[str(path)]["ones"][0]["label"] == path.parent.name for path in images]
    assert sum(hits) > 20
    assert sum(entry["probability"] for entry in answers[str(images[0])]["ones"]) == pytest.approx(1, abs=1e-5)
    rows = list(csv.DictReader(io.StringIO(run("predict", digits_folder / "test", "--csv", "--top", "1").out)))
    assert {row["image"]: row["label"] for row in rows} == {p: a["ones"][0]["label"] for p, a in answers.items()}


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


def test_a_bad_image_is_named_and_left_out_only_when_asked(run: Run, learned: Result, digits_folder: Path) -> None:
    bad = digits_folder / "test" / "0" / "bad.png"
    bad.write_bytes(b"no image")
    refused = run("predict", digits_folder / "test")
    assert refused.code == 2
    assert str(bad) in refused.err
    assert "(--skip-bad leaves out what cannot be read.)" in refused.err
    skipped = run("predict", digits_folder / "test", "--skip-bad", "--json")
    assert skipped.code == 0
    assert str(bad) in skipped.err
    assert str(bad) not in json.loads(skipped.out)["images"]


def test_phone_photos_are_turned_upright(run: Run, learned: Result, digits_folder: Path) -> None:
    path = next((digits_folder / "test").rglob("*.png"))
    upright = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    upright.save(digits_folder / "upright.bmp")
    upright.rotate(90, expand=True).save(digits_folder / "turned.png", exif=exif)
    answers = json.loads(run("predict", digits_folder / "upright.bmp", digits_folder / "turned.png", "--json").out)[
        "images"
    ]
    first, second = answers.values()
    assert first == second
