"""Commands that are killed: nothing half done is registered, and the same command ends in the same artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest

from addenda import FrozenBackbone, Registry
from addenda.combined import verify
from addenda.registry import TaskFilter
from tests.images import colour_folder
from tests.kill import Commands

pytestmark = pytest.mark.slow

BACKBONE = ("--backbone", "glyphs", "--device", "cpu")


def test_learn_killed_at_any_moment_goes_on_to_the_same_artifact(tmp_path: Path, glyphs: FrozenBackbone) -> None:
    folder = colour_folder(tmp_path / "data", per_class=24)
    learn = (
        "learn",
        "colours",
        folder,
        *BACKBONE,
        "--epochs",
        6,
        "--batch-size",
        4,
        "--optimizer",
        "sgd",
        "--lr",
        0.1,
        "--views",
        1,
    )
    (tmp_path / "settings.yaml").write_text("fall_back: false\npatience: 6\n")
    learn = (*learn, "--config", tmp_path / "settings.yaml")
    whole = Commands(tmp_path / "whole").run(*learn)
    killed = Commands(tmp_path / "killed")
    moments = [
        killed.registry.exists,
        killed.seen("*/meta.json"),  # activations are being kept
        killed.seen("runs/*/*/sweep.safetensors"),
        killed.seen("runs/*/*/*.unfinished"),
        killed.seen("runs/*/*/refit.safetensors"),
    ]
    for moment in moments:
        killed.kill(moment, *learn)
        with Registry.open(killed.registry) as registry:
            assert registry.tasks(TaskFilter(retired=True)) == []
    again = killed.run(*learn)
    assert (again["sha256"], again["metrics"]) == (whole["sha256"], whole["metrics"])
    assert not again["already"]
    assert list((killed.cache / "runs").iterdir()) == []
    with Registry.open(killed.registry) as registry:
        stored = [(registry.get("colours"), registry.goldens("colours"))]
    assert all(verdict.ok for verdict in verify(glyphs, stored))


def test_learn_many_killed_at_any_moment_goes_on_to_the_same_artifacts(tmp_path: Path) -> None:
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
    whole = Commands(tmp_path / "whole").run(*many)
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
    assert [row["sha256"] for row in again] == [row["sha256"] for row in whole]
    assert [row["metrics"] for row in again] == [row["metrics"] for row in whole]
