"""Batch prediction gives the predictions of one machine, even if workers, nodes or the driver die."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from addenda.backbones import FrozenBackbone
from addenda.combined import CombinedModel, golden
from addenda.distributed.cluster import Workplace, connected
from addenda.distributed.prediction import (
    Manifest,
    PredictionJob,
    Summary,
    open_model,
    predict_many,
    read_manifest,
    resolve_tasks,
)
from addenda.exceptions import AddendaError, DataError, ExactnessError, IntegrityError
from addenda.learner.context import silent
from addenda.registry import Registry
from tests.distributed.conftest import NODE
from tests.support.commands import Run
from tests.support.images import colour_folder
from tests.support.models import threads
from tests.support.moments import until
from tests.support.processes import KILLED, Forked, exit_code
from tests.support.tasks import random_task

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")]

PART_SIZE, NUM_PARTS = 4, 15

Rows = list[tuple[str, str, str, str, float]]
Predict = Callable[..., Summary]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """58 images: fourteen parts of four, and one of two."""
    return sorted(colour_folder(tmp_path_factory.mktemp("images"), per_class=20).rglob("*.png"))[:-2]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, glyphs: FrozenBackbone) -> Iterator[Registry]:
    """A registry with a task, a task that extends it, and a multi-label task."""
    with Registry.open(tmp_path_factory.mktemp("registry") / "tasks.db") as opened:
        opened.add_backbone(glyphs.record())
        register(opened, glyphs, "colours")
        register(opened, glyphs, "shades", parents=(opened.get("colours"),), seed=1)
        register(opened, glyphs, "tags", seed=2, objective="multi-label")
        yield opened


def register(
    registry: Registry, on: FrozenBackbone, name: str, objective: str = "single-label", **options: Any
) -> None:
    task = dataclasses.replace(random_task(on, name, **options), objective=objective)
    registry.register(task, golden(on, task))


@pytest.fixture(scope="module")
def predict(cluster: tuple[Any, str], tasks: Registry) -> Iterator[Predict]:
    """Predicts into a folder on the cluster; its workers start together."""
    default = PredictionJob(Workplace(tasks.location, device="cpu"), part_size=PART_SIZE, workers=2)

    def run(images: Sequence[Path], folder: Path, report: Any = silent, **options: Any) -> Summary:
        return predict_many(dataclasses.replace(default, **options), images, folder, tasks, report)

    with connected(cluster[1]):
        from ray.data import DataContext

        DataContext.get_current().wait_for_min_actors_s = 300
        yield run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, predict: Predict, images: list[Path]) -> tuple[Path, Summary]:
    """The folder and the summary of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "parts"
    return folder, predict(images, folder)


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    return [row for path in sorted(folder.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def predictions_in(folder: Path) -> Rows:
    names = ("image", "task", "ref", "label", "probability")
    return [tuple(row[name] for name in names) for row in read(folder) if row["left_out"] is None]


def predicted(on: FrozenBackbone, registry: Registry, images: Sequence[Path], **options: Any) -> Rows:
    """The predictions of this process."""
    model = CombinedModel(on, registry.load(on))
    predictions = model.predict(images, **options)
    return [
        (str(image), name, model.tasks[name].ref, *pair)
        for number, image in enumerate(images)
        for name, labels in predictions.items()
        for pair in labels[number]
    ]


def predict_and_die(address: str, images: list[Path], folder: Path, location: str) -> None:
    """A driver that is killed when its first part is reported."""

    def die(*progress: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with Registry.open(location) as registry, connected(address):
        job = PredictionJob(Workplace(location, device="cpu"), part_size=PART_SIZE, workers=1)
        predict_many(job, images, folder, registry, die)


def workers(node: Any) -> list[psutil.Process]:
    """The prediction workers of a node."""
    (raylet,) = node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children(recursive=True)
    matches = []
    for child in children:
        with suppress(psutil.NoSuchProcess):  # it may be a zombie
            matches += [child] if "PartWriter" in " ".join(child.cmdline()) else []
    return matches


def test_predictions_are_those_of_one_machine_and_come_from_both_nodes(
    undisturbed: tuple[Path, Summary], images: list[Path], tasks: Registry, glyphs: FrozenBackbone
) -> None:
    from pyarrow import parquet

    folder, summary = undisturbed
    assert sorted(contents(folder)) == ["manifest.json", *(f"part-{number:05d}.parquet" for number in range(NUM_PARTS))]
    rows = predictions_in(folder)
    assert rows == predicted(glyphs, tasks, images)
    assert {name for _, name, *_ in rows} == {"colours", "shades", "tags"}
    assert (summary.images, summary.left_out, summary.tasks, summary.rows) == (58, 0, 3, len(rows))
    assert (summary.parts, summary.computed_parts, summary.nodes) == (NUM_PARTS, NUM_PARTS, 2)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.tasks == {task.ref: task.sha256 for task in tasks.load(glyphs)}
    about = json.loads(parquet.read_metadata(folder / "part-00014.parquet").metadata[b"addenda"])
    assert about == {
        "backbone": glyphs.fingerprint,
        "exact": True,
        "generation": tasks.generation,
        "images": 2,
        "left_out": 0,
        "numerics_fingerprint": manifest.numerics_fingerprint,
    }


def test_the_part_of_a_killed_worker_is_recomputed(
    undisturbed: tuple[Path, Summary], predict: Predict, cluster: tuple[Any, str], images: list[Path], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if not killed:
            worker = next(worker for node in cluster[0].list_all_nodes() for worker in workers(node))
            worker.kill()
            killed.append(worker.pid)

    summary = predict(images, tmp_path / "parts", report=kill)
    assert killed
    assert (summary.computed_parts, summary.computed_images) == (NUM_PARTS, 58)
    assert contents(tmp_path / "parts") == contents(undisturbed[0])


def test_the_parts_of_a_lost_node_are_recomputed_by_others(
    undisturbed: tuple[Path, Summary], predict: Predict, cluster: tuple[Any, str], images: list[Path], tmp_path: Path
) -> None:
    nodes, _ = cluster
    (second,) = nodes.worker_nodes
    lost: list[int] = []

    def remove(what: str, done: int, total: int) -> None:
        if not lost:
            lost.extend(worker.pid for worker in workers(second))
            nodes.remove_node(second, allow_graceful=False)

    try:
        summary = predict(images, tmp_path / "parts", report=remove)
    finally:
        nodes.add_node(**NODE)
    assert lost
    assert summary.computed_images == 58
    assert contents(tmp_path / "parts") == contents(undisturbed[0])


def test_an_interrupted_run_resumes_with_the_missing_parts_and_the_same_tasks(
    undisturbed: tuple[Path, Summary], predict: Predict, cluster: tuple[Any, str], images: list[Path], tmp_path: Path,
    tasks: Registry, glyphs: FrozenBackbone, another_interpreter: None,
) -> None:  # fmt: skip
    folder = tmp_path / "parts"
    assert exit_code(predict_and_die, cluster[1], images, folder, tasks.location, timeout_s=300) == KILLED
    until(lambda: not any(map(workers, cluster[0].list_all_nodes())), "its workers end with the driver", 120)
    before = {path.name: path.stat() for path in folder.glob("part-*.parquet")}
    assert 0 < len(before) < NUM_PARTS
    (folder / f".part-00000.parquet.{'0' * 16}.unfinished").write_bytes(b"left by a killed worker")
    (folder / "novel.unfinished").write_bytes(b"a user's file")
    register(tasks, glyphs, "newcomer", seed=3)
    try:
        options = f"--ray {cluster[1]} --out {folder} --part-size {PART_SIZE} --workers 2 --registry {tasks.location}"
        command = ("predict", *images, *options.split(), "--json")
        out, errors = tmp_path / "out", tmp_path / "errors"
        code = Forked(command, out, tmp_path, {**os.environ}, errors).wait(600)
    finally:
        tasks.retire("newcomer")
    assert code == 0, errors.read_text()
    assert json.loads(out.read_text())["computed_parts"] == NUM_PARTS - len(before)
    assert contents(folder) == contents(undisturbed[0]) | {"novel.unfinished": b"a user's file"}
    for name, stat in before.items():
        assert (folder / name).stat().st_ino == stat.st_ino
        assert (folder / name).stat().st_mtime_ns == stat.st_mtime_ns
    assert predict(images, folder).computed_parts == 0


def test_a_folder_with_predictions_of_another_run_is_refused(
    undisturbed: tuple[Path, Summary], predict: Predict, images: list[Path]
) -> None:
    folder = undisturbed[0]
    before = contents(folder)
    with pytest.raises(
        DataError,
        match=r"predictions of another run: images was 58, now 57; .*part_size was 4, now 5; top was none, now 1",
    ):
        predict(images[1:], folder, part_size=5, top=1)
    with pytest.raises(DataError, match=r"tasks shades:1 was [0-9a-f]{12}…, now none"):
        predict(images, folder, refs=["colours", "tags"])
    with pytest.raises(DataError, match="numerics threads was 1, now 2"):
        predict(images, folder, workers=None, cpus=2)
    assert contents(folder) == before


def test_an_unreadable_image_ends_the_run_or_is_skipped(
    predict: Predict, images: list[Path], tasks: Registry, glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    bad = images[0].with_name("9-bad.png")
    bad.write_bytes(images[0].read_bytes()[:100])
    try:
        paths = sorted([*images[:18], bad])
        with pytest.raises(AddendaError, match=r"9-bad\.png' cannot be read") as error:
            predict(paths, tmp_path / "parts", workers=1)
        assert "\n" not in str(error.value)
        before = parts(tmp_path / "parts")
        summary = predict(paths, tmp_path / "parts", skip_bad=True)
    finally:
        bad.unlink()
    assert 0 < len(before) < summary.parts
    assert before.items() <= parts(tmp_path / "parts").items()
    assert (summary.images, summary.left_out) == (19, 1)
    assert predictions_in(tmp_path / "parts") == predicted(glyphs, tasks, images[:18])
    (row,) = [row for row in read(tmp_path / "parts") if row["left_out"] is not None]
    assert row["image"] == str(bad)
    assert "cannot be read" in row["left_out"]
    assert row["task"] is row["label"] is row["probability"] is None


def test_a_worker_with_other_numerics_or_content_is_refused(tasks: Registry) -> None:
    job = PredictionJob(Workplace(tasks.location, device="cpu"))
    manifest = Manifest(images=1, images_sha256="", part_size=1, top=None, **resolve_tasks(job))
    open_model(job, manifest)
    with threads(1), pytest.raises(ExactnessError, match=r"differ from the manifest's.* threads was 1, now 2"):
        open_model(dataclasses.replace(job, cpus=2), manifest)
    other = dataclasses.replace(manifest, tasks={**manifest.tasks, "shades:1": "0" * 64})
    with pytest.raises(IntegrityError, match="'shades:1' in the registry is not the one in the manifest"):
        open_model(job, other)


def test_bad_input_is_one_line(run: Run) -> None:
    refused = {
        ("--ray", "auto"): "--ray requires --out FOLDER",
        ("--ray", "auto", "--out", "x", "--csv"): "--csv cannot be used with --ray",
        ("--ray", "auto", "--out", "x", "--task", "auto"): "--task auto cannot be used with --ray",
        ("--out", "x", "--gpus", "1"): "--out, --gpus require --ray.",
    }
    for options, message in refused.items():
        result = run("predict", "a.png", *options)
        assert result.code == 2
        assert message in result.err
        assert result.err.count("\n") == 1
