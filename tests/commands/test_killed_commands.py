"""Killed and interrupted commands register no incomplete task, and a rerun ends in the same artifacts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.combined import verify
from addenda.learner import ActivationCache, Augmentation, Epoch
from addenda.learner.activation_cache import NAME
from addenda.registry import TaskFilter
from tests.support.images import colour_folder
from tests.support.kill import Commands
from tests.support.processes import KILLED, exit_code
from tests.support.tiny import tiny_vit

pytestmark = pytest.mark.slow

BACKBONE = ("--backbone", "glyphs", "--device", "cpu")


def slowly(tmp_path: Path, folder: Path) -> tuple[object, ...]:
    """A command that learns a token in many small steps."""
    (tmp_path / "settings.yaml").write_text("fall_back: false\npatience: 6\n")
    return ("learn", "colours", folder, *BACKBONE, "--epochs", 6, "--batch-size", 4, "--optimizer", "sgd", "--lr", 0.1,
            "--views", 1, "--config", tmp_path / "settings.yaml")  # fmt: skip


def test_learn_killed_at_any_moment_resumes_to_the_same_artifact(tmp_path: Path, glyphs: FrozenBackbone) -> None:
    folder = colour_folder(tmp_path / "data", per_class=12)
    learn = slowly(tmp_path, folder)
    expected = Commands(tmp_path / "whole").run(*learn)
    killed = Commands(tmp_path / "killed")
    moments = [
        killed.registry.exists,
        killed.seen("*/meta.json"),  # activations are being cached
        killed.seen("runs/*/*/sweep.safetensors"),
        killed.seen("runs/*/*/*.unfinished"),
        killed.seen("runs/*/*/refit.safetensors"),
    ]
    for moment in moments:
        killed.kill(moment, *learn)
        with Registry.open(killed.registry) as registry:
            assert registry.tasks(TaskFilter(retired=True)) == []
    again = killed.run(*learn)
    assert (again["sha256"], again["metrics"]) == (expected["sha256"], expected["metrics"])
    assert not again["already"]
    assert list((killed.cache / "runs").iterdir()) == []
    with Registry.open(killed.registry) as registry:
        stored = [(registry.get("colours"), registry.goldens("colours"))]
    assert all(verdict.ok for verdict in verify(glyphs, stored))


def test_learn_many_killed_at_any_moment_resumes_to_the_same_artifacts(tmp_path: Path) -> None:
    for seed, name in enumerate(("first", "second", "third")):
        colour_folder(tmp_path / name, per_class=10, seed=seed)
    file = tmp_path / "tasks.yaml"
    file.write_text(
        "config: {epochs: 4, batch_size: 4, optimizer: sgd, learning_rate: 0.1, fall_back: false}\n"
        "tasks:\n"
        "  - {name: first, data: first}\n"
        "  - {name: second, data: second, extends: first}\n"
        "  - {name: third, data: third, extends: [first, second]}\n"
    )
    many = ("learn-many", file, *BACKBONE)
    expected = Commands(tmp_path / "whole").run(*many)
    killed = Commands(tmp_path / "killed")

    def registered() -> list[str]:
        if not killed.registry.exists():
            return []
        with Registry.open(killed.registry) as registry:
            return [record.name for record in registry.tasks(TaskFilter(retired=True))]

    sweeping = killed.seen("runs/*/*/sweep.safetensors")
    killed.kill(sweeping, *many)
    assert registered() == []
    killed.kill(lambda: bool(registered()), *many)
    killed.kill(lambda: registered() == ["first", "second"] and sweeping(), *many)
    assert registered() == ["first", "second"]
    again = killed.run(*many)
    assert [row["state"] for row in again] == ["learned before", "learned before", "learned"]
    assert [row["sha256"] for row in again] == [row["sha256"] for row in expected]
    assert [row["metrics"] for row in again] == [row["metrics"] for row in expected]


def test_ctrl_c_at_any_moment_leaves_no_incomplete_task_and_the_next_run_completes(
    tmp_path: Path, glyphs: FrozenBackbone
) -> None:
    folder = colour_folder(tmp_path / "data", per_class=12)
    commands = Commands(tmp_path / "interrupted")
    learn = slowly(tmp_path, folder)
    moments = [
        commands.registry.exists,
        commands.seen("*/meta.json"),  # activations are being cached
        commands.seen("runs/*/*/sweep.safetensors"),
        commands.seen("runs/*/*/refit.safetensors"),
    ]
    for moment in moments:
        code, errors = commands.stop(moment, *learn, number=signal.SIGINT)
        assert code in (130, -signal.SIGINT), errors
        if code == 130:
            assert "Interrupted" in errors
            assert "Traceback" not in errors
        if commands.registry.exists():
            with Registry.open(commands.registry) as registry:
                if registry.tasks(TaskFilter(retired=True)):  # the moment came after the one transaction that registers
                    task = registry.get("colours")
                    assert all(verdict.ok for verdict in verify(glyphs, [(task, registry.goldens(task.ref))]))
    assert commands.run(*learn)["task"] == "colours:1"


def test_ctrl_c_while_a_package_is_imported_ends_the_command_at_once(tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    raise RecursionError('a package that is half imported calls itself')\n"
    )
    database = tmp_path / "tasks.db"
    done = subprocess.run(
        [sys.executable, "-m", "addenda.cli", "learn", "colours", colour_folder(tmp_path / "data"), *BACKBONE,
         "--registry", database],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests run in the background ignore it
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert done.stderr.startswith("Interrupted. No incomplete task was registered")
    assert not database.exists()


def test_ctrl_c_while_python_starts_leaves_nothing(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    database = tmp_path / "tasks.db"
    command = [sys.executable, "-m", "addenda.cli", "learn", "colours", str(folder), *BACKBONE]
    process = subprocess.Popen(
        [*command, "--registry", str(database)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests run in the background ignore it
    )  # fmt: skip
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGINT), errors
    if process.returncode == 130:
        assert "Interrupted" in errors
        assert "Traceback" not in errors
    if database.exists():
        with Registry.open(database) as registry:
            assert registry.tasks(TaskFilter(retired=True)) == []


def learn_and_die(folder: Path, root: Path, log: Path, kill_after: int, optimizer: str) -> None:
    """Learns a task, notes each epoch and the artifact, and ends with SIGKILL after that many epochs."""
    torch.set_num_threads(1)
    seen = count(1)

    def note(line: str) -> None:
        with log.open("a") as file:
            file.write(f"{line}\n")

    def on_epoch(epoch: Epoch) -> None:
        note(f"{epoch.phase} {epoch.epoch}")
        if next(seen) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    config = LearnConfig(
        epochs=4, learning_rate=(0.03, 0.3), optimizer=optimizer, batch_size=10, patience=2, adapter_rank=2,
        augmentation=Augmentation(views=1), fall_back=False,
    )  # fmt: skip
    with Registry.open(root / "tasks.db") as registry:
        learner = Learner(FrozenBackbone(tiny_vit(), "tiny", "hub"), registry, ActivationCache(root / "cache"))
        note(learner.learn("colours", folder, config=config, on_epoch=on_epoch).sha256)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.usefixtures("another_interpreter")
def test_a_run_killed_again_and_again_ends_in_the_same_artifact(tmp_path: Path, optimizer: str) -> None:
    folder = colour_folder(tmp_path / "data")
    roots, logs = [tmp_path / "whole", tmp_path / "killed"], [tmp_path / "whole.log", tmp_path / "killed.log"]
    for root in roots:
        root.mkdir()
    assert exit_code(learn_and_die, folder, roots[0], logs[0], 0, optimizer, timeout_s=300) == 0
    runs = 1
    while (code := exit_code(learn_and_die, folder, roots[1], logs[1], 2, optimizer, timeout_s=300)) == KILLED:
        runs += 1
    assert code == 0
    assert logs[1].read_text() == logs[0].read_text()
    assert runs > 2
    assert not list((roots[1] / "cache" / NAME / "runs").iterdir())
