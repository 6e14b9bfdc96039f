"""Killed and interrupted commands register no incomplete task, and a rerun ends in the same artifacts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from addenda import FrozenBackbone, Registry
from addenda.combined import verify
from addenda.learner.activation_cache import NAME
from addenda.registry import TaskFilter
from tests.support.images import colour_folder
from tests.support.kill import Commands
from tests.support.places import ROOT

pytestmark = pytest.mark.slow

BACKBONE = ("--backbone", "glyphs", "--device", "cpu")


def test_learn_killed_at_any_moment_resumes_to_the_same_artifact(tmp_path: Path, glyphs: FrozenBackbone) -> None:
    folder = colour_folder(tmp_path / "data", per_class=24)
    (tmp_path / "settings.yaml").write_text("fall_back: false\npatience: 6\n")
    learn = ("learn", "colours", folder, *BACKBONE, "--epochs", 6, "--batch-size", 4, "--optimizer", "sgd", "--lr", 0.1,
             "--views", 1, "--config", tmp_path / "settings.yaml")  # fmt: skip
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
        colour_folder(tmp_path / name, per_class=20, seed=seed)
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
    folder = colour_folder(tmp_path / "data", per_class=20)
    database = tmp_path / "tasks.db"
    command = [sys.executable, "-m", "addenda.cli", "learn", "colours", str(folder), "--backbone", "glyphs"]
    command += ["--registry", str(database), "--epochs", "3"]
    interrupted = 0
    for moment in range(8):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests run in the background ignore it
        )  # fmt: skip
        time.sleep(1.0 + 1.5 * moment)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        if process.returncode == -signal.SIGABRT:  # C++ code run by torch's import aborts on Python exceptions
            assert "pybind11::error_already_set" in errors
            assert "KeyboardInterrupt" in errors
            assert not database.exists()
        else:
            assert process.returncode in (130, -signal.SIGINT), errors
        if process.returncode == 130:
            assert "Interrupted" in errors
            assert "Traceback" not in errors
        interrupted += 1
        if database.exists():
            with Registry.open(database) as registry:
                if registry.tasks(TaskFilter(retired=True)):  # the moment came after the one transaction that registers
                    task = registry.get("colours")
                    assert all(verdict.ok for verdict in verify(glyphs, [(task, registry.goldens(task.ref))]))
                    break
    assert interrupted > 0
    finished = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(finished.stdout)["task"] == "colours:1"


RESUME = (
    "import os, signal, sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
    "from tests.support.tiny import tiny_vit\n"
    "from addenda import FrozenBackbone, LearnConfig, Learner, Registry\n"
    "from addenda.learner import ActivationCache, Augmentation\n"
    "backbone = FrozenBackbone(tiny_vit(), 'tiny', 'hub')\n"
    "seen = 0\n"
    "def on_epoch(epoch):\n"
    "    global seen\n"
    "    seen += 1\n"
    "    print(epoch.phase, epoch.epoch, flush=True)\n"
    "    if seen == int(sys.argv[5]):\n"
    "        os.kill(os.getpid(), signal.SIGKILL)\n"
    "config = LearnConfig(epochs=4, learning_rate=(0.03, 0.3), optimizer=sys.argv[6], batch_size=10, patience=2,\n"
    "                     adapter_rank=2, augmentation=Augmentation(views=1), fall_back=False)\n"
    "with Registry.open(sys.argv[3]) as registry:\n"
    "    learner = Learner(backbone, registry, ActivationCache(sys.argv[4]))\n"
    "    print(learner.learn('colours', sys.argv[2], config=config, on_epoch=on_epoch).sha256)\n"
)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_killed_again_and_again_ends_in_the_same_artifact(tmp_path: Path, optimizer: str) -> None:
    folder = colour_folder(tmp_path / "data")
    root = str(ROOT)

    def run(name: str, kill_after: int) -> list[str]:
        command = [sys.executable, "-c", RESUME, root, str(folder), str(tmp_path / f"{name}.db")]
        command += [str(tmp_path / f"{name}-cache"), str(kill_after), optimizer]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode in (0, -signal.SIGKILL), finished.stderr
        return finished.stdout.split("\n")[:-1]

    expected = run("whole", 0)
    killed, runs = [], 0
    while True:
        lines = run("killed", 2)
        runs += 1
        killed += lines
        if not lines[-1].startswith(("sweep", "refit")):
            break
    assert killed == expected
    assert runs > 2
    assert not list((tmp_path / "killed-cache" / NAME / "runs").iterdir())
