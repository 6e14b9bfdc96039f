"""`bench continual`: what it measures, that an interrupted run resumes, and that changed logits are detected."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from addenda import FrozenBackbone, Registry, __version__, cli, load_backbone
from addenda.benchmarks.baselines.method import Scores
from addenda.benchmarks.continual.config import StreamConfig, build_stream, read_config
from addenda.benchmarks.continual.experiment import CELLS, REGISTRIES, MethodRun, _Matrices, run_continual
from addenda.benchmarks.continual.results import Results, measure, read_results
from addenda.benchmarks.strategy import NEVER
from addenda.combined import numerics
from addenda.exceptions import AddendaError
from addenda.files import output_folder
from tests.benchmarks.test_strategy import break_the_mask
from tests.support.commands import Run as Command
from tests.support.commands import addenda
from tests.support.images import colour_folder
from tests.support.kill import Commands

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche and what it imports warn while they load

QUICK = {"epochs": 1, "fall_back": False, "num_memory_tokens": 2, "optimizer": "sgd", "learning_rate": 0.1}


def quick(**settings: Any) -> StreamConfig:
    defaults = {
        "seeds": 1, "jobs": 1, "limit": 20, "test_limit": 10, "learn": {**QUICK, "augmentation": {"views": 0}},
        "baselines": {"epochs": 1, "augment": False, "finetuning_rate": 1e-3},
    }  # fmt: skip
    return read_config("digits", defaults | settings)


def run(config: StreamConfig, backbone: FrozenBackbone, out: Path) -> Results:
    return run_continual(config, backbone, out, None, lambda what, done, total: None)


@pytest.mark.slow
def test_a_run_measures_every_method_on_the_same_images(tiny: FrozenBackbone, tmp_path: Path) -> None:
    results = run(quick(methods=["addenda", "naive", "nearest-mean", "joint"], seeds=2), tiny, tmp_path)
    assert [(cell.method, cell.seed) for cell in results.cells] == [
        (name, seed) for seed in (0, 1) for name in ("addenda", "naive", "nearest-mean", "joint")
    ]
    assert [(note.num_train, note.num_test) for note in results.experiences] == [(20, 10)] * 5
    for cell in results.of("addenda"):
        assert cell.identical
        assert (cell.comparisons, cell.max_difference) == (10, 0)
        assert cell.task_incremental_metrics.forgetting == 0
        assert all(cell.task_incremental[i][j] == cell.task_incremental[j][j] for i in range(5) for j in range(i + 1))
        assert all(cell.class_incremental[i][j] is None for i in range(5) for j in range(i + 1, 5))  # unseen classes
        assert cell.task_incremental_metrics.forward_transfer is cell.class_incremental_metrics.forward_transfer is None
        assert set(cell.extra["routers"]) == {
            "max softmax", "energy", "the router", "nearest mean", "mahalanobis", "ridge", "layers",
        }  # fmt: skip
        assert cell.class_incremental_metrics.average_accuracy == pytest.approx(
            cell.extra["routers"]["the router"], abs=0.1
        )
        assert 0 <= cell.extra["auroc"] <= 1
    for cell in results.of("naive"):
        assert cell.identical is False
        assert cell.max_difference > 0
    for cell in results.of("joint"):
        assert cell.identical is None
        assert all(value is None for row in cell.task_incremental[:-1] for value in row)
        assert None not in cell.task_incremental[-1]
        assert cell.class_incremental_metrics.average_incremental_accuracy is None
    assert read_results(tmp_path) == results
    assert (tmp_path / "report.html").exists()


def test_accuracy_before_learning_is_measured_if_classes_recur(tiny: FrozenBackbone, tmp_path: Path) -> None:
    for number, name in enumerate(("day", "night")):
        colour_folder(tmp_path / name / "train", 8, ("red", "blue"), number)
        colour_folder(tmp_path / name / "test", 4, ("red", "blue"), number + 10)
    file = tmp_path / "light.yaml"
    file.write_text("name: light\ndata: {source: folders, sets: [day, night], shared_labels: true}\nmethods: [slda]\n")
    (cell,) = run(read_config(file, {"seeds": 1}), tiny, tmp_path / "out").cells
    assert cell.class_incremental[0][1] is not None
    assert cell.class_incremental_metrics.forward_transfer == cell.class_incremental[0][1]


@pytest.mark.slow
def test_a_report_states_its_own_command_and_machine(run: Command, tmp_path: Path) -> None:
    arguments = ("bench", "continual", "digits", "--limit", "20", "--methods", "slda", "--seeds", "1", "--jobs", "1")
    first = run(*arguments, "--device", "cpu", "--out", tmp_path / "a b")
    assert first.code == 0, first.err
    results = read_results(tmp_path / "a b")
    assert results.command == f"addenda {' '.join(arguments)} --device cpu --out '{tmp_path}/a b'"
    fingerprint = numerics(load_backbone("glyphs", device="cpu"))
    count = fingerprint["threads"]
    machine = f"{fingerprint['device']}, {count} thread{'' if count == 1 else 's'}"
    assert results.hardware == f"{machine}, torch {fingerprint['torch']}, Addenda {__version__}"
    assert results.expected == {}
    assert not {"command", "hardware", "minutes", "expected"} & set(results.config)
    assert first.err.splitlines()[-1] == "seed 0: slda, done"  # standard error is not a terminal here
    again = run(*arguments, "--device", "cpu", "--out", tmp_path / "a b", "--json")
    assert (again.code, again.err) == (0, "")


def test_missing_data_and_unknown_methods_are_reported_before_weights_are_loaded(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addenda.load_backbone", lambda *args, **more: pytest.fail("weights were loaded"))
    for arguments, message in (
        (("continual", "split-cifar10", "--data", tmp_path), f"There is no folder {str(tmp_path / 'cifar10')!r}."),
        (("continual", "digits", "--split", "3"), "'digits' has fixed experiences; omit --split"),
        (("continual", "digits", "--methods", "addenda,foo"), "Unknown method 'foo'. Known: addenda, addenda-"),
        (("paper", tmp_path, "--out", tmp_path / "out", "--sets", "a"), "has no dataset 'a' with train/ and test/"),
    ):
        result = run("bench", *arguments)
        assert result.code == 2
        assert message in result.err


@pytest.mark.slow
def test_parallel_processes_compute_the_same_results(
    glyphs: FrozenBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["nearest-mean", "slda"]
    sequential = run(quick(methods=methods, seeds=2), glyphs, tmp_path / "sequential")
    monkeypatch.setattr(MethodRun, "_compute", None)  # nothing is left for this process to compute
    parallel = run(quick(methods=methods, seeds=2, jobs=2), glyphs, tmp_path / "parallel")
    untimed = [[replace(cell, train_seconds=[0.0] * 5) for cell in runs.cells] for runs in (sequential, parallel)]
    assert untimed[0] == untimed[1]


@pytest.mark.slow
def test_an_error_in_a_process_is_raised(glyphs: FrozenBackbone, tmp_path: Path) -> None:
    output_folder(tmp_path)
    (tmp_path / CELLS).mkdir()
    with pytest.raises(IsADirectoryError):
        run(quick(methods=["nearest-mean"], jobs=2), glyphs, tmp_path)


@pytest.mark.slow
def test_a_finished_run_is_not_computed_again(tiny: FrozenBackbone, tmp_path: Path) -> None:
    config = quick(methods=["addenda", "nearest-mean"])
    first = run(config, tiny, tmp_path)
    cells = (tmp_path / CELLS).read_bytes()
    assert run(config, tiny, tmp_path) == first
    assert (tmp_path / CELLS).read_bytes() == cells
    other = run(quick(methods=["addenda", "nearest-mean"], limit=24), tiny, tmp_path)  # other images, so other cells
    assert len((tmp_path / CELLS).read_text().splitlines()) == 4
    assert other.experiences[0].num_train == 24


@pytest.mark.slow
def test_each_cell_keeps_the_hardware_that_it_was_computed_on(tiny: FrozenBackbone, tmp_path: Path) -> None:
    first = run(quick(methods=["nearest-mean"]), tiny, tmp_path)
    torch.set_num_threads(2)
    try:
        assert run(quick(methods=["nearest-mean"]), tiny, tmp_path).hardware == first.hardware
        both = run(quick(methods=["nearest-mean", "slda"]), tiny, tmp_path).hardware
    finally:
        torch.set_num_threads(1)
    assert both == f"{first.hardware}; {first.hardware.replace('1 thread', '2 threads')}"


@pytest.mark.slow
def test_a_truncated_cell_is_computed_again(tiny: FrozenBackbone, tmp_path: Path) -> None:
    config = quick(methods=["nearest-mean"])
    first = run(config, tiny, tmp_path)
    file = tmp_path / CELLS
    file.write_text(file.read_text()[:200])
    again = run(config, tiny, tmp_path)
    assert again.cells[0].task_incremental == first.cells[0].task_incremental
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_run_resumes_with_the_registered_tasks(
    tiny: FrozenBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from addenda.benchmarks.continual import ours

    config, learn = quick(methods=["addenda"]), ours.Masked.learn

    def stop(self: ours.Masked, number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt
        learn(self, number)

    monkeypatch.setattr(ours.Masked, "learn", stop)
    with pytest.raises(KeyboardInterrupt):
        run(config, tiny, tmp_path / "stopped")
    monkeypatch.setattr(ours.Masked, "learn", learn)
    (database,) = (tmp_path / "stopped" / REGISTRIES).glob("*.db")
    with Registry.open(database) as registry:
        before = [(record.ref, record.sha256, record.created_at) for record in registry.tasks()]
    assert len(before) == 3
    resumed = run(config, tiny, tmp_path / "stopped").cells[0]
    with Registry.open(database) as registry:
        assert [(r.ref, r.sha256, r.created_at) for r in registry.tasks()][:3] == before
    expected = run(config, tiny, tmp_path / "uninterrupted").cells[0]
    assert (resumed.task_incremental, resumed.class_incremental, resumed.extra) == (
        expected.task_incremental,
        expected.class_incremental,
        expected.extra,
    )
    assert resumed.train_seconds[0] > 0.01  # from the run that learned the task


@pytest.mark.slow
def test_a_broken_mask_gives_a_verdict_and_exit_code_1(
    tiny: FrozenBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_the_mask(monkeypatch)
    results = run(quick(methods=["addenda"]), tiny, tmp_path)
    assert results.cells[0].identical is False
    assert results.cells[0].max_difference > 0
    monkeypatch.setattr("addenda.benchmarks.continual.experiment.run_continual", lambda *args: results)
    monkeypatch.setattr("sys.argv", ["addenda", "bench", "continual", "digits", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "CHANGED in 1 of 1 seeds" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["addenda", "magic"]}, "Unknown method 'magic'. Known: addenda, addenda-adapters, naive, "),
        ({"methods": ["naive", "naive"]}, "Method 'naive' is given twice"),
        ({"baselines": {"epoch": 1}}, "baselines.epoch: "),
        ({"learn": {"epochs": 0}}, "epochs"),
    ],
)
def test_unknown_methods_and_settings_are_refused_before_anything_runs(
    tiny: FrozenBackbone, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AddendaError, match=re.escape(message)):
        run(quick(**settings), tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metrics_follow_from_the_accuracy_matrix() -> None:
    metrics = measure([[1.0, 0.2, None], [0.8, 0.9, 0.1], [0.7, 0.5, 0.6]])
    assert metrics.average_accuracy == pytest.approx(0.6)
    assert metrics.average_incremental_accuracy == pytest.approx((1.0 + 0.85 + 0.6) / 3)
    assert metrics.forgetting == pytest.approx((0.3 + 0.4) / 2)
    assert metrics.backward_transfer == pytest.approx(-0.35)
    assert metrics.forward_transfer == pytest.approx(0.15)
    single = measure([[0.5]])
    assert (single.forgetting, single.backward_transfer, single.forward_transfer) == (None, None, None)
    late = measure([[None, None], [0.5, 0.7]])
    assert (late.average_accuracy, late.average_incremental_accuracy) == (pytest.approx(0.6), None)


def test_a_change_of_one_bit_is_detected(tmp_path: Path) -> None:
    experience = build_stream(quick(), None, 0).experiences[0]
    task_incremental = torch.full((10, 10), NEVER)
    task_incremental[:, list(experience.classes)] = torch.randn(10, 2)
    changed = task_incremental.clone()
    changed[3, experience.classes[0]] = changed[3, experience.classes[0]].nextafter(torch.tensor(9.0))
    for again, same in ((task_incremental.clone(), True), (changed, False)):
        matrices = _Matrices(2)
        matrices.add(0, 0, experience, Scores(task_incremental, task_incremental))
        matrices.add(1, 0, experience, Scores(again, again))
        assert matrices.comparisons == 1
        assert matrices.identical is same
        assert (matrices.max_difference > 0) is not same
        assert matrices.changed_decisions == 0


def test_scores_that_become_nan_differ_and_scores_that_stay_nan_do_not() -> None:
    experience = build_stream(quick(), None, 0).experiences[0]
    task_incremental, nan = torch.zeros(10, 10), torch.full((10, 10), torch.nan)
    for first, again, same in ((task_incremental, nan, False), (nan, nan, True)):
        matrices = _Matrices(2)
        matrices.add(0, 0, experience, Scores(first, task_incremental))
        matrices.add(1, 0, experience, Scores(again, task_incremental))
        assert matrices.identical is same
        assert math.isnan(matrices.max_difference) is not same


@pytest.mark.slow
def test_a_stream_killed_at_any_moment_resumes_to_the_same_results(tmp_path: Path) -> None:
    settings = tmp_path / "stream.yaml"
    settings.write_text(json.dumps({
        "name": "digits", "data": {"source": "digits"}, "backbone": {"name": "glyphs"}, "seeds": 1, "limit": 20,
        "test_limit": 10, "methods": ["addenda"], "learn": {**QUICK, "epochs": 3},
    }))  # fmt: skip

    def command(out: Path) -> tuple[object, ...]:
        return ("bench", "continual", settings, "--out", out, "--device", "cpu")

    whole = addenda(*command(tmp_path / "uninterrupted"), "--json")
    assert whole.code == 0, whole.err
    expected = json.loads(whole.out)
    killed, out = Commands(tmp_path / "b", registry=False), tmp_path / "killed"

    def registered(count: int) -> bool:
        databases = list((out / REGISTRIES).glob("*.db"))
        if not databases:
            return False
        with Registry.open(databases[0]) as registry:
            return len(registry.tasks()) >= count

    for count in (0, 2):
        killed.kill(lambda count=count: registered(count), *command(out))
    again = killed.run(*command(out))
    keys = ("task_incremental", "class_incremental", "comparisons", "identical", "extra")
    assert [again["cells"][0][key] for key in keys] == [expected["cells"][0][key] for key in keys]
