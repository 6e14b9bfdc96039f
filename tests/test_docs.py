"""What the documents say is so: examples run, commands and files exist."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from addenda import Registry, cli
from addenda.backbones import glyphs
from addenda.benchmarks.digits import digits
from addenda.learner import read_rows
from tests.images import colour_folder

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_the_readmes_example_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text()
    match = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    assert match is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(match[1], "README.md", "exec"), {})
    assert capsys.readouterr().out == match[2]


def test_the_readmes_file_of_many_tasks_is_one(tmp_path: Path, registry: Registry) -> None:
    match = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert match is not None
    (tmp_path / "tasks.yaml").write_text(match[1])
    colour_folder(tmp_path / "textures")
    colour_folder(tmp_path / "sketches")
    listing = [f"textures/{name}/{number}.png,{name}" for name in ("red", "blue") for number in range(4)]
    (tmp_path / "rubbish.csv").write_text("\n".join(["path,label", *listing]))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "rubbish.csv").write_text("\n".join(["path,label", *(f"../{line}" for line in listing)]))
    rows = read_rows(tmp_path / "tasks.yaml", registry)
    assert [(row.name, row.config.epochs) for row in rows] == [("textures", 20), ("rubbish", 20), ("sketches", 20)]


@pytest.mark.filterwarnings("ignore")  # Avalanche and what it imports warn while they load
def test_the_avalanche_page_runs_in_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    match = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "avalanche.md").read_text(), re.DOTALL)
    assert match is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"make_benchmark": digit_benchmark}
    exec(compile(match[1], "avalanche.md", "exec"), names)
    assert names["evaluator"].metrics[-1].identical
    found = {key: value for key, value in names["results"].items() if key.startswith("LogitsIdentical")}
    assert found == {f"LogitsIdentical/Exp00{i}": 1.0 for i in range(4)}
    accuracies = [value for key, value in names["results"].items() if key.startswith("Top1_Acc_Exp")]
    assert len(accuracies) == 5
    assert min(accuracies) > 0.8


def digit_benchmark(eval_transform: Callable[[Any], Any]) -> Any:
    """What a script of someone's own has: Avalanche's nc_benchmark on PIL images."""
    from avalanche.benchmarks import nc_benchmark

    data = [digits(tuple(range(10)), test, limit=100) for test in (False, True)]
    return nc_benchmark(
        *data, n_experiences=5, task_labels=True, shuffle=False, train_transform=None, eval_transform=eval_transform
    )


def test_every_command_that_the_documents_name_exists() -> None:
    named = set()
    for page in PAGES:
        named |= set(
            re.findall(
                r"(?:^|`)addenda ((?:(?:tasks|backbones|bench|db|cache|keys) )?[a-z]+(?:-[a-z]+)*)",
                page.read_text(),
                re.MULTILINE,
            )
        )
    assert len(named) >= 6
    for words in named:
        command = typer.main.get_command(cli.app)
        for word in words.split():
            commands = getattr(command, "commands", {})
            if commands:
                assert word in commands, f"addenda {words}"
                command = commands[word]


def test_every_file_that_the_documents_link_or_name_exists() -> None:
    found = 0
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
            found += 1
        for path in re.findall(r"`((?:addenda|scripts|tests|docs)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
            found += 1
    assert found > 10


def test_every_dependency_is_explained() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["bench"],
        *project["optional-dependencies"]["postgres"],
    ]
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in wanted:
        assert re.match(r"[\w-]+", requirement)[0] in explained, requirement


def test_the_glyphs_report_is_of_the_weights_in_the_package() -> None:
    report = json.loads((ROOT / "scripts" / "glyphs_report.json").read_text())
    assert hashlib.sha256(glyphs.WEIGHTS.read_bytes()).hexdigest() == report["weights_sha256"]
    assert glyphs.WEIGHTS.stat().st_size <= 3_000_000
    assert not re.search(r"\d", report["letters"])
    assert f"{100 * report['held_out_fonts_top1']:.1f} % top-1" in (ROOT / "docs" / "glyphs.md").read_text()


def test_no_digits_are_drawn_for_glyphs_and_a_drawing_is_an_image() -> None:
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("train_glyphs", ROOT / "scripts" / "train_glyphs.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert not any(letter.isdigit() for letter in script.LETTERS)
    assert len(set(script.LETTERS)) == len(script.LETTERS) == 89
    masks = torch.randint(0, 256, (16, 48, 48), dtype=torch.uint8)
    first = script.augment(masks, torch.Generator().manual_seed(1))
    assert first.shape == (16, 3, 32, 32)
    assert first.abs().max() <= 1
    assert torch.equal(first, script.augment(masks, torch.Generator().manual_seed(1)))
