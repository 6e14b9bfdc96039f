"""`addenda doctor`: the checks, their states, and the exit code."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from addenda import FrozenBackbone, Registry, load_backbone
from addenda.backbones import cached_weights
from addenda.backbones.family import Family
from addenda.combined import golden
from addenda.commands.checkup import package_findings
from tests.support.commands import Run
from tests.support.tasks import random_task

INSTALLED = """Metadata-Version: 2.1
Name: addenda
Version: 0.1.0
Requires-Dist: torch>=2.6
Requires-Dist: {wanted}
Requires-Dist: no-such-package>=1; extra == "serve"
Requires-Dist: timm>=1; extra == "bench"
Requires-Dist: no-such-package; extra == "dev"
Provides-Extra: bench
Provides-Extra: dev
Provides-Extra: serve
"""


def states(out: str) -> dict[str, tuple[str, str]]:
    return {finding["subject"]: (finding["state"], finding["detail"]) for finding in json.loads(out)}


@pytest.fixture
def registered(glyphs: FrozenBackbone, tmp_path: Path) -> Path:
    with Registry.open(tmp_path / "tasks.db") as opened:
        opened.add_backbone(glyphs.record())
        task = random_task(glyphs, "ones")
        opened.register(task, golden(glyphs, task))
    return tmp_path / "tasks.db"


@pytest.mark.slow
def test_without_a_registry_nothing_is_broken_and_nothing_is_made(run: Run, tmp_path: Path) -> None:
    result = run("doctor", "--json")
    assert result.code == 0, result.err
    findings = states(result.out)
    assert findings["registry"][0] == "absent"
    assert "`addenda learn` creates one" in findings["registry"][1]
    assert findings["exactness of glyphs"][0] == "works"
    assert f"torch {version('torch')}" in findings["addenda"][1]
    assert findings["weights of vit_base_patch16_224.augreg_in21k"][0] == "absent"
    assert not (tmp_path / "tasks.db").exists()
    text = run("doctor").out
    assert all(subject in text for subject in findings)


@pytest.mark.slow
def test_the_tasks_of_a_registry_are_tested(run: Run, registered: Path) -> None:
    findings = states(run("doctor", "--json").out)
    assert findings["registry"] == ("works", f"{registered}: 1 active task, generation 2")
    assert findings["weights of glyphs"] == ("works", "bundled with the package")
    assert findings["exactness of glyphs with the registry's tasks"][0] == "works"


@pytest.mark.slow
def test_a_task_with_altered_bytes_is_broken(run: Run, registered: Path) -> None:
    with closing(sqlite3.connect(registered)) as connection, connection:
        (trigger,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'artifact_no_update'").fetchone()
        connection.execute("DROP TRIGGER artifact_no_update")
        connection.execute("UPDATE artifact SET data = zeroblob(length(data))")
        connection.execute(trigger)
    result = run("doctor")
    assert "Broken: tasks on glyphs." in result.err
    assert "ones:1" in result.out


@pytest.mark.slow
def test_a_damaged_registry_is_broken_and_the_exit_code_says_so(run: Run, registered: Path) -> None:
    with closing(sqlite3.connect(registered)) as connection, connection:
        connection.execute("DROP TRIGGER task_no_update")
    result = run("doctor")
    assert result.code == 1
    assert "addenda db check" in result.out
    assert "Broken: registry." in result.err
    registered.write_bytes(b"no database" * 1000)
    assert states(run("doctor", "--json").out)["registry"][0] == "BROKEN"


def test_inexact_arithmetic_is_broken(run: Run, registered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Family.finish

    def biased(self: Family, block: object, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        done = honest(self, block, tokens, *rest)
        return done + 1e-6 * done.roll(1, 0)

    monkeypatch.setattr(Family, "finish", biased)
    result = run("doctor", "--json")
    assert result.code == 1
    assert [finding["subject"] for finding in json.loads(result.out) if finding["state"] == "BROKEN"] == [
        "exactness of glyphs",
        "exactness of glyphs with the registry's tasks",
    ]
    assert "Exact mode is refused on this machine" in states(result.out)["exactness of glyphs"][1]


@pytest.mark.slow
def test_downloaded_weights_are_found_in_the_hub_cache(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert cached_weights("vit_base_patch16_224.augreg_in21k") is None
    model = tmp_path / "hub" / "models--timm--vit_base_patch16_224.augreg_in21k"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    (model / "snapshots" / "abc").mkdir(parents=True)
    file = model / "snapshots" / "abc" / "model.safetensors"
    file.write_bytes(b"weights")
    assert cached_weights("vit_base_patch16_224.augreg_in21k") == file
    assert cached_weights("no_such_model") is None
    weights = states(run("doctor", "--json").out)["weights of vit_base_patch16_224.augreg_in21k"]
    assert weights == ("works", str(file))


@pytest.mark.slow
def test_missing_weights_are_reported_with_their_old_path(run: Run, registered: Path, tmp_path: Path) -> None:
    record = load_backbone("glyphs", device="cpu").record()
    with Registry.open(registered) as opened:
        opened.add_backbone(record | {"fingerprint": "f" * 64, "name": "moved", "source": str(tmp_path / "gone.pth")})
    state, detail = states(run("doctor", "--json").out)["weights of moved"]
    assert state == "absent"
    assert detail == f"not found at {str(tmp_path / 'gone.pth')!r}: pass --weights FILE"


@pytest.mark.slow
def test_an_unwritable_cache_is_broken(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "file" / "cache"))
    result = run("doctor", "--json")
    assert result.code == 1
    assert "set ADDENDA_CACHE to another folder" in states(result.out)["activation cache"][1]


def test_requirements_are_compared_with_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "addenda-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    metadata.write_text(INSTALLED.format(wanted="timm>=1"))
    findings = {finding.subject: finding for finding in package_findings()}
    assert list(findings) == ["addenda", "extra bench", "extra serve"]
    assert [finding.state for finding in findings.values()] == ["works", "works", "absent"]
    assert findings["extra serve"].detail == "no-such-package is missing: pip install 'addenda[serve]'"
    metadata.write_text(INSTALLED.format(wanted="timm>=999"))
    broken = next(package_findings())
    assert broken.state == "BROKEN"
    assert "required >=999: pip install 'addenda'" in broken.detail


def shell(folder: Path, *arguments: str, **environment: str) -> str:
    """The output of `addenda` in a new process, as a shell calls it."""
    script = f"import sys; sys.argv = {['addenda', *arguments]!r}; from addenda.cli import main; main()"
    settings = os.environ | {"HOME": str(folder), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=True
    ).stdout


def test_completion_is_installed_and_completes_commands(tmp_path: Path) -> None:
    assert "bash completion installed in" in shell(tmp_path, "--install-completion", "bash")
    script = tmp_path / ".bash_completions" / "addenda.sh"
    assert "_ADDENDA_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()
    typed = {"_ADDENDA_COMPLETE": "complete_bash", "COMP_WORDS": "addenda tasks li", "COMP_CWORD": "2"}
    assert shell(tmp_path, **typed).splitlines() == ["list", "lineage"]
