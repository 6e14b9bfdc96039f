"""Every example runs unchanged in an empty folder and prints what it should."""

from __future__ import annotations

import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from addenda import LearnConfig, Registry
from addenda.combined import verify
from addenda.learner import Epoch
from tests.support.places import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))

Example = Callable[[str], tuple[dict[str, Any], list[str]]]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Runs an example and returns its globals and the lines that it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")

    def run(script: str) -> tuple[dict[str, Any], list[str]]:
        monkeypatch.setattr(sys, "argv", [script])
        names = runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        return names, capsys.readouterr().out.splitlines()

    return run


def curves(epochs: list[dict[str, list[float]]], name: str, candidate: int) -> list[float]:
    """A candidate's curve as stored in the registry, up to its last epoch."""
    return [found for epoch in epochs if (found := epoch[name][candidate]) is not None]


def test_each_example_is_short_listed_and_run_by_a_test() -> None:
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\)", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE)
    run = re.findall(r'example\("([\w.]+)"\)', Path(__file__).read_text())
    assert len(SCRIPTS) >= 8
    assert sorted(listed) == sorted(set(run)) == [script.name for script in SCRIPTS]
    assert {script.name: count for script in SCRIPTS if (count := len(script.read_text().splitlines())) > 60} == {}


@pytest.mark.slow
def test_twenty_folders_become_tasks_of_one_server(example: Example, glyphs: Any) -> None:
    _, said = example("twenty_folders.py")
    assert said[:20] == [f"{folder.name}: learned" for folder in sorted(Path("photos").iterdir())]
    found = re.fullmatch(r"20 tasks predicted for each of 20 photos; .* (\d+) are correct\.", said[-1])
    assert found is not None
    assert int(found[1]) >= 16
    with Registry.open("photos.db") as registry:
        verdicts = verify(glyphs, [(task, registry.goldens(task.ref)) for task in registry.load(glyphs)])
    assert [verdict.identical for verdict in verdicts] == [True] * 20
    _, again = example("twenty_folders.py")
    assert again == [line.replace(": learned", ": learned before") for line in said]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Avalanche and its imports emit warnings
def test_addenda_drops_into_an_avalanche_script(example: Example) -> None:
    names, said = example("drop_into_avalanche.py")
    assert [line.partition(":")[0] for line in said] == ["naive", "addenda"]
    assert said[0].endswith("old logits changed")
    assert said[1].endswith("old logits are bitwise identical")
    naive, ours = (float(re.findall(r"([\d.]+) %", line)[0]) for line in said)
    assert naive < 50 < ours
    assert names["strategies"]["addenda"].learner.registry.location == str(Path("avalanche.db").resolve())


@pytest.mark.slow
def test_two_teams_registries_become_one(example: Example) -> None:
    _, said = example("merge_registries.py")
    assert said[0].startswith("Not merged: ")
    assert "'marks:1'" in said[0]
    assert said[1:3] == ["south's late:1 is late:1 here: added", "south's marks:1 is marks-south:1 here: added"]
    assert said[3:] == [
        "late, learned by south: logits bitwise identical",
        "marks-south, learned by south: logits bitwise identical",
    ]
    with Registry.open("north.db") as north, Registry.open("south.db") as south:
        assert [record.ref for record in north.tasks()] == ["early:1", "marks:1", "late:1", "marks-south:1"]
        assert [record.ref for record in south.tasks()] == ["late:1", "marks:1"]


@pytest.mark.slow
def test_a_task_extends_another_that_does_not_move(example: Example) -> None:
    _, said = example("extend_task.py")
    alone, extending = (float(re.findall(r"([\d.]+) %", line)[0]) for line in said[:2])
    assert min(alone, extending) > 60
    with Registry.open("extend.db") as registry:
        scored = [registry.record(name).metrics["test"] for name in ("parity", "parity-on-ten")]
    assert scored[0] != scored[1]
    assert [line.partition(":1 extends ")[0] for line in said[:2]] == ["parity", "parity-on-ten"]
    assert said[2:] == ["ten:1 is extended by parity-on-ten:1", "ten:1's logits are bitwise identical"]


@pytest.mark.slow
def test_tritons_client_calls_a_server_that_takes_in_a_task(example: Example) -> None:
    _, said = example("serve_and_call.py")
    label, outputs, bits = said
    assert re.fullmatch(r"labels:( [01]){8}", label)
    assert outputs == "outputs of one request: " + " ".join(
        f"{task}.{kind}" for task in ("high", "low") for kind in ("label", "logits", "probs")
    )
    assert bits == "low's logits: bitwise identical"


@pytest.mark.slow
def test_the_papers_table_is_made_in_small(example: Example) -> None:
    names, said = example("paper_table.py")
    plain = {(cell["set"], cell["method"]) for cell in names["cells"]}
    of_one_set = names["methods"][:-2]
    assert plain == {(name, method) for name in ("high", "low") for method in of_one_set} | {
        ("high+low", "pairs"), ("high+low", "collapse"),
    }  # fmt: skip
    assert all(cell["identical"] for cell in names["cells"] if cell["method"] == "pairs")
    report = Path("paper-table/paper.md").read_text()
    assert report.startswith("`paper_table.py`\n")
    assert "| dataset | full | full (last) | head | head+class | memory-1 | memory-5 |" in report
    assert "*SUN-397* (paper)" in "\n".join(said)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by tensorboard
def test_curves_are_written_for_tensorboard(example: Example) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    names, said = example("log_to_tensorboard.py")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    epochs, rates = names["task"].metrics["curves"], ("0_lr_0.001", "1_lr_0.003")
    assert said == [f"three-or-eight:1: {len(epochs)} epochs of the sweep are in curves/"]
    for name in ("train_loss", "validation_loss"):
        for candidate, line in enumerate(rates):
            read = EventAccumulator(str(Path("curves") / f"sweep_{name}_{line}")).Reload()
            events = read.Scalars(f"sweep/{name}")
            assert [event.value for event in events] == pytest.approx(curves(epochs, name, candidate))
            assert [event.step for event in events] == list(range(1, len(events) + 1))
    with SummaryWriter("refit") as writer:
        names["write"](writer, Epoch("refit", 3, 4, (0.5, math.nan), (), (), LearnConfig().candidates))
    assert [each.name for each in Path("refit").iterdir() if each.is_dir()] == ["refit_train_loss_0_lr_0.001"]


@pytest.mark.slow  # MLflow creates its database in about a hundred migrations
@pytest.mark.filterwarnings("ignore")  # MLflow uses deprecated functions of SQLAlchemy
def test_a_run_is_logged_to_mlflow(example: Example) -> None:
    import mlflow

    names, _ = example("log_to_mlflow.py")
    task = names["task"]
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (run.data.tags["task"], run.data.tags["sha256"]) == ("three-or-eight:1", task.sha256)
    assert run.data.params["epochs"] == "4"
    assert run.data.metrics["test/accuracy"] == task.metrics["test"]["accuracy"]
    for name in ("train_loss", "validation_loss"):
        for candidate in range(len(task.metrics["candidates"])):
            logged = client.get_metric_history(run.info.run_id, f"sweep/{name}/{candidate}")
            assert [point.value for point in logged] == curves(task.metrics["curves"], name, candidate)
            assert [point.step for point in logged] == list(range(1, len(logged) + 1))
