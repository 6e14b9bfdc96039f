"""The documentation is correct: examples run, and the commands, options, files and names in it exist."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main

import addenda
from addenda import Registry, cli
from addenda.backbones.loader import GLYPHS
from addenda.benchmarks.demo import digits
from addenda.learner import read_rows
from tests.support.commands import Run
from tests.support.images import colour_folder
from tests.support.places import ROOT
from tests.support.scripts import script

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
COMMANDS: Any = typer.main.get_command(cli.app)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OTHERS = {"--node-ip-address", "--include-dashboard"}
"""Options of other programs that pages mention without the program's name."""


def command_lines(page: Path) -> list[list[str]]:
    """The arguments of each complete `addenda` command line in a page's code blocks."""
    lines = []
    for language, block in BLOCK.findall(page.read_text()):
        if language == "":
            joined = block.replace("\\\n", " ").splitlines()
            lines += [line.removeprefix("$ ") for line in joined]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("addenda ")]


def found(words: list[str]) -> tuple[Any, list[str]]:
    """Splits arguments into the command that they start with and its own arguments."""
    command = COMMANDS
    while words and not words[0].startswith("-") and getattr(command, "commands", {}):
        assert words[0] in command.commands, f"There is no command {' '.join(words)!r}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def options(command: Any) -> set[str]:
    """The options of one command."""
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def all_options(command: Any) -> set[str]:
    """The options of a command and of all its subcommands."""
    below = getattr(command, "commands", {}).values()
    return options(command).union({"--help"}, *(all_options(child) for child in below))


@pytest.mark.slow
def test_the_readmes_example_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text()
    match = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    assert match is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(match[1], "README.md", "exec"), {})
    assert capsys.readouterr().out == match[2]


def test_the_engineers_file_of_many_tasks_is_one(tmp_path: Path, registry: Registry) -> None:
    match = re.search(r"```yaml\n(.*?)```", (DOCS / "engineer.md").read_text(), re.DOTALL)
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


def digit_benchmark(eval_transform: Callable[[Any], Any], train_transform: Callable[[Any], Any] | None = None) -> Any:
    """A user's benchmark: Avalanche's nc_benchmark on PIL images."""
    from avalanche.benchmarks import nc_benchmark

    data = [digits(tuple(range(10)), test, limit=100) for test in (False, True)]
    return nc_benchmark(
        *data,
        n_experiences=5,
        task_labels=True,
        shuffle=False,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Avalanche and its imports emit warnings
def test_the_researchers_examples_print_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = BLOCK.findall((DOCS / "researcher.md").read_text())
    examples = [
        (code, printed if kind == "" and not printed.startswith("addenda ") else "")
        for (language, code), (kind, printed) in pairwise(blocks) if language == "python"
    ]  # fmt: skip
    assert [bool(printed) for _, printed in examples] == [True, True, False]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"make_benchmark": digit_benchmark}
    for code, printed in examples:
        capsys.readouterr()
        exec(compile(code, "researcher.md", "exec"), names)
        assert capsys.readouterr().out.endswith(printed)
    identical = {key: value for key, value in names["results"].items() if key.startswith("LogitsIdentical")}
    assert identical == {f"LogitsIdentical/Exp00{i}": 1.0 for i in range(4)}
    accuracies = [value for key, value in names["results"].items() if key.startswith("Top1_Acc_Exp")]
    assert len(accuracies) == 5
    assert min(accuracies) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("page", ["index.md", "engineer.md", "operator.md"])
def test_a_walk_through_a_page_works_as_written(
    page: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("textures", "rubbish"):
        colour_folder(tmp_path / "photos" / name)
    if page == "operator.md":
        for seed in ("0", "1"):
            learned = run(
                "learn", "birds", "photos/textures", "--backbone", "glyphs", "--head-only", "--new-version",
                "--seed", seed,
            )  # fmt: skip
            assert learned.code == 0, learned.err
        assert run("tasks", "alias", "birds:1", "production").code == 0
    for language, block in BLOCK.findall((DOCS / page).read_text()):
        if language == "sh":
            subprocess.run(["bash", "-c", block], check=True)
    walked = 0
    for words in command_lines(DOCS / page):
        here = [
            w.replace("/backups/", f"{tmp_path}/").replace("vit_base_patch16_224.augreg_in21k", "glyphs") for w in words
        ]
        if here[0] != "serve":  # runs until stopped; tested in tests/serving
            result = run(*here)
            assert result.code == 0, (words, result.err)
            walked += 1
    assert walked >= 5


@pytest.mark.slow
def test_the_tutorial_prints_what_it_says_but_for_digits(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def masked(text: str) -> list[list[str]]:
        return [re.sub(r"\d+", "0", re.sub("─+", "─", line)).split() for line in text.splitlines()]

    monkeypatch.chdir(tmp_path)
    printed, compared = list[list[str]](), 0
    for language, block in BLOCK.findall((DOCS / "tutorial.md").read_text()):
        if language == "python":
            exec(compile(block, "tutorial.md", "exec"), {})
        elif block.startswith("addenda "):
            lines = [shlex.split(line)[1:] for line in block.splitlines()]
            results = [run(*words) for words in lines if words != ["serve"]]  # tested in tests/serving
            assert [result.code for result in results] == [0] * len(results), results
            printed = [line for result in results for line in masked(result.out)]
        elif not block.startswith("curl "):
            expected = masked(block)
            start = printed.index(expected[0])
            assert printed[start : start + len(expected)] == expected
            compared += 1
    assert compared == 5


def test_every_command_line_in_the_documents_is_one() -> None:
    lines = [(page, words) for page in PAGES for words in command_lines(page)]
    assert len(lines) > 50
    for page, words in lines:
        command, rest = found(words)
        command.make_context(page.name, rest)  # raises an error if the command rejects the arguments


def test_every_command_and_option_that_a_sentence_names_exists() -> None:
    known, seen = all_options(COMMANDS) | OTHERS, 0
    for page in PAGES:
        for span in re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text())):
            words = span.split()
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", span))
            if words[0] == "addenda" or words[0] in COMMANDS.commands:
                command, _ = found([word for word in words if word != "addenda"])
                known_here = all_options(command)
            elif words[0].startswith("--"):
                known_here = known
            else:
                continue
            assert named <= known_here, f"{page.name}: `{span}`"
            seen += len(named)
    assert seen > 50


def test_the_page_of_all_commands_is_what_they_say_of_themselves() -> None:
    assert (DOCS / "commands.md").read_text() == script("write_commands").page(), "run scripts/write_commands.py"


def test_required_options_are_marked() -> None:
    text = (DOCS / "commands.md").read_text()
    assert "\naddenda bench paper DATA --out VALUE --sets VALUE [OPTIONS]\n" in text
    assert (
        "| `--sets VALUE` | Datasets in DATA, separated by commas, in the order for pairs and collapse. Required. |"
        in text
    )


@pytest.mark.filterwarnings("ignore")  # Avalanche and its imports emit warnings
def test_the_names_of_methods_are_those_that_the_commands_take() -> None:
    from addenda.benchmarks.baselines.methods import BASELINES
    from addenda.benchmarks.continual.experiment import OURS
    from addenda.benchmarks.paper import paper_grid
    from addenda.commands.bench import PAPER_METHODS, STREAM_METHODS

    methods = [*OURS, *(name.replace("lora-8", "lora-R") for name in BASELINES)]
    listed = re.findall(r"^\| `([\w+-]+)` \|", (DOCS / "avalanche.md").read_text(), re.MULTILINE)
    assert listed == [*methods, *paper_grid.KNOWN]
    offered = STREAM_METHODS.partition(": ")[2].partition(" of any rank")[0].split(", ")
    assert sorted(offered) == sorted(methods)
    kinds, _, rest = PAPER_METHODS.partition(": ")[2].partition("; with M memory tokens per layer and rank R ")
    assert sorted(kinds.split(", ")) == sorted(paper_grid.KNOWN)
    sized = rest.partition("Default: all, with ")[2].rstrip(".").split(", ")
    assert sorted(sized) == sorted(name for name in paper_grid.METHODS if re.search(r"-\d+$", name))
    assert {name for name in paper_grid.KNOWN if not name.endswith(("-M", "-R"))} == set(paper_grid.METHODS) - {*sized}


def test_every_make_target_that_the_documents_name_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)}
    assert {"demo", "test"} <= named <= targets


def test_the_reference_has_every_public_name_and_what_the_pages_import() -> None:
    listed = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert {f"addenda.{name}" for name in addenda.__all__} <= listed
    for name in listed:
        home, _, attribute = name.rpartition(".")
        assert getattr(import_module(home), attribute), name
    for page in PAGES:
        for home, names in re.findall(r"^from (addenda[\w.]*) import (.+)$", page.read_text(), re.MULTILINE):
            for name in names.split(", "):
                assert f"{home}.{name}" in listed or home == "addenda.benchmarks.demo", f"{page.name}: {name}"


def test_every_dotted_name_in_the_documents_exists() -> None:
    seen = set()
    for page in PAGES:
        seen |= set(re.findall(r"`(addenda(?:\.\w+)+)(?:`|\()", page.read_text()))
    seen = {name for name in seen if not name.endswith((".db", ".json", ".service"))}
    assert len(seen) >= 3
    for name in seen:
        home, _, attribute = name.rpartition(".")
        assert hasattr(import_module(home), attribute) or importlib.util.find_spec(name), name


def test_every_name_in_the_recipes_exists() -> None:
    sources = [path for folder in ("addenda", "tests", "scripts") for path in (ROOT / folder).rglob("*.py")]
    words = set(re.findall(r"\w+", " ".join(path.read_text() for path in sources)))
    names = re.findall(r"`([A-Za-z_][\w.]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(names) > 40
    for name in names:
        if name.endswith(".py"):
            assert any(path.name == name for path in sources), name
        else:  # `MIN_` stands for the names that start with it
            assert all(part in words or any(word.startswith(part) for word in words) for part in name.split(".")), name


def test_the_drawings_are_what_their_script_draws() -> None:
    drawings = script("draw_method").drawings()
    assert len(drawings) == 6
    shown = "".join(page.read_text() for page in (DOCS / "method.md", DOCS / "exactness.md", ROOT / "README.md"))
    for name, drawing in drawings.items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == drawing, f"run scripts/draw_method.py: {name}"
        assert f"images/{name}" in shown


def test_every_figure_of_the_readme_and_the_limits_stands_on_another_page() -> None:
    for page in (ROOT / "README.md", DOCS / "limits.md"):
        figures = set(re.findall(r"(?<![\w.:])\d+\.\d+(?![\w.])", BLOCK.sub("", page.read_text())))
        figures -= {"3.11", "2203.15243", "2.0"}  # version of Python, number of a paper, version of a licence
        assert len(figures) >= 5
        others = " ".join(other.read_text() for other in PAGES if other.name not in ("README.md", "limits.md"))
        for figure in figures:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]\d|\d)", others), f"{page.name}: {figure}"


def test_every_file_that_the_documents_link_or_name_exists() -> None:
    found = 0
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
            found += 1
        for path in re.findall(r"`((?:addenda|scripts|tests|docs|deploy)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
            found += 1
    assert found > 10


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [one for name, extra in extras.items() if name != "all" for one in extra]
    wanted = [one for one in wanted if not one.startswith(("addenda", "types-"))]
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in wanted:
        assert re.match(r"[\w-]+", requirement)[0] in explained, requirement


def test_the_glyphs_report_is_of_the_weights_in_the_package() -> None:
    report = json.loads((ROOT / "scripts" / "glyphs_report.json").read_text())
    assert hashlib.sha256(GLYPHS.read_bytes()).hexdigest() == report["weights_sha256"]
    assert GLYPHS.stat().st_size <= 3_000_000
    assert not re.search(r"\d", report["letters"])
    assert f"{100 * report['held_out_fonts_top1']:.1f} % top-1" in (ROOT / "docs" / "glyphs.md").read_text()


def test_no_digits_are_drawn_for_glyphs_and_a_drawing_is_an_image() -> None:
    import torch

    drawing = script("train_glyphs")
    assert not any(letter.isdigit() for letter in drawing.LETTERS)
    assert len(set(drawing.LETTERS)) == len(drawing.LETTERS) == 89
    masks = torch.randint(0, 256, (16, 48, 48), dtype=torch.uint8)
    first = drawing.augment(masks, torch.Generator().manual_seed(1))
    assert first.shape == (16, 3, 32, 32)
    assert first.abs().max() <= 1
    assert torch.equal(first, drawing.augment(masks, torch.Generator().manual_seed(1)))


@pytest.mark.filterwarnings("ignore")  # Avalanche and its imports emit warnings
def test_the_figures_of_the_pages_are_those_on_record() -> None:
    written = script("write_results").pages()
    assert {"results.md", "performance.md"} <= {path.name for path in written}
    assert sum(text.count("<!-- results: ") for text in written.values()) >= 14
    for path, text in written.items():
        assert path.read_text() == text, f"{path.name}: run scripts/write_results.py"
