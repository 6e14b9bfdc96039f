"""The command line: output, exit codes, and one line for bad input."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from addenda import Registry, cli
from tests.support.commands import Result, Run
from tests.support.images import colour_folder


def test_tasks_are_listed_and_shown(run: Run, learned: Result) -> None:
    listed = run("tasks", "list")
    assert "1 task in" in listed.out
    assert "ones:1" in listed.out
    record = json.loads(run("tasks", "show", "ones", "--json").out)
    assert record["ref"] == "ones:1"
    assert record["labels"] == ["0", "1"]
    assert [t["ref"] for t in json.loads(run("tasks", "list", "--json").out)] == ["ones:1"]


def test_a_registry_is_a_path_or_a_url(run: Run, learned: Result, tmp_path: Path) -> None:
    listed = run("tasks", "list", "--registry", f"sqlite:///{tmp_path / 'tasks.db'}", "--json")
    assert listed.code == 0, listed.err
    assert [t["ref"] for t in json.loads(listed.out)] == ["ones:1"]


def test_the_total_size_of_a_task_includes_its_routing_statistics(run: Run, learned: Result, tmp_path: Path) -> None:
    with Registry.open(tmp_path / "tasks.db") as opened:
        record = opened.record("ones")
    assert record.statistics_bytes > 10_000
    lines = [" ".join(line.split()) for line in run("tasks", "show", "ones").out.splitlines()]
    assert f"total size {(record.size_bytes + record.statistics_bytes) / 1e6:.1f} MB" in lines
    assert f"routing statistics {record.statistics_bytes / 1e6:.1f} MB" in lines


def test_verify_passes_and_names_a_task_whose_bytes_changed(
    run: Run, learned: Result, digits_folder: Path, tmp_path: Path
) -> None:
    other = run("learn", "twos", digits_folder, "--epochs", "1", "--lr", "0.1", "--memory", "1", "--no-layer-head")
    assert other.code == 0
    good = run("verify")
    assert good.code == 0
    assert good.out.count("identical, byte for byte") == 2
    connection = sqlite3.connect(tmp_path / "tasks.db")
    connection.execute("DROP TRIGGER artifact_no_update")
    sha256, data = connection.execute(
        "SELECT sha256, artifact.data FROM artifact JOIN task ON task.artifact = sha256 WHERE name = 'ones'"
    ).fetchone()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    connection.execute("UPDATE artifact SET data = ? WHERE sha256 = ?", (flipped, sha256))
    connection.commit()
    connection.close()
    bad = run("verify", "--json")
    assert bad.code == 1
    assert {v["task"]: v["ok"] for v in json.loads(bad.out)} == {"ones:1": False, "twos:1": True}
    assert "Failed: ones:1" in bad.err
    served = run("predict", digits_folder / "test", "--task", "twos")
    assert served.code == 0
    assert "'ones:1' cannot be trusted" in run("predict", digits_folder / "test").err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("mean", [0.4] * 3, "has fingerprint"), ("interpolation", "nearest", "has preprocessing")],
)
def test_verify_names_the_tasks_of_a_backbone_whose_preprocessing_changed(
    run: Run, learned: Result, tmp_path: Path, key: str, value: object, message: str
) -> None:
    connection = sqlite3.connect(tmp_path / "tasks.db")
    connection.execute("DROP TRIGGER backbone_no_update")
    (stored,) = connection.execute("SELECT preprocessing FROM backbone").fetchone()
    connection.execute("UPDATE backbone SET preprocessing = ?", (json.dumps({**json.loads(stored), key: value}),))
    connection.commit()
    connection.close()
    changed = run("verify")
    assert changed.code == 1
    assert message in changed.out
    assert "Failed: ones:1." in changed.err


def test_verify_record_stores_a_probe_for_changed_numerics(
    run: Run, learned: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        first = run("verify")
        assert first.code == 0
        assert "under another numerics fingerprint" in first.out or "numerics change" in first.out
        assert "--record" in first.out
        assert run("verify", "--record").code == 0
        (again,) = json.loads(run("verify", "--json").out)
        assert (again["same_numerics"], again["identical"]) == (True, True)
    finally:
        torch.set_num_threads(before)


def test_aliases_and_retirement(run: Run, learned: Result, digits_folder: Path) -> None:
    assert "ones@production points at ones:1" in run("tasks", "alias", "ones", "production").out
    assert run("evaluate", "ones@production", digits_folder).code == 0
    assert "'ones@production' points at 'ones:1', which would be retired" in run("tasks", "retire", "ones").err
    assert run("tasks", "alias", "ones", "production", "--remove").code == 0
    assert run("tasks", "retire", "ones").code == 0
    assert "0 tasks in" in run("tasks", "list").out
    assert "(retired)" in run("tasks", "list", "--retired").out
    gone = run("predict", digits_folder / "test")
    assert gone.code == 2
    assert "holds no active task" in gone.err


DATA = "the folder to learn from"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tasks", "list"), "There is no registry at"),
        (("predict", "x.png"), "There is no registry at"),
        (("learn", "Bad Name", "."), "'Bad Name' is not a valid name"),
        (("learn", "a", "nowhere", "--backbone", "glyphs"), "There is no folder 'nowhere'"),
        (("learn", "a", DATA, "--backbone", "resnet50", "--memory", "5"), "No weights for 'resnet50'"),
        (("learn", "a", DATA, "--backbone", "glyphs", "--mean", "x"), "'x' must be one number"),
        (("learn", "a", DATA, "--backbone", "glyphs", "--device", "nonsense"), "Device 'nonsense'"),
        (("learn", "a", "x" * 300, "--backbone", "glyphs"), "File name too long"),
        (("learn", "a", DATA, "--backbone", "glyphs", "--cache-gb", "nan"), "A cache budget of nan GB is invalid"),
        (
            ("learn", "a", ".", "--adapter-rank", "auto", "--adapter-rank", "4"),
            "--adapter-rank must be whole numbers or 'auto' alone, not 'auto 4'.",
        ),
        (("learn", "a", ".", "--adapter-rank", "-1"), "or 'auto' alone, not '-1'."),
        (("learn", "a", ".", "--class-weights", "some"), "class_weights: Input should be 'none' or 'balanced'"),
        (("learn", "a", ".", "--label-smoothing", "1"), "label_smoothing: Input should be less than 1"),
        (("learn", "a", ".", "--config", "none.yaml"), "The file 'none.yaml' cannot be read: No such file"),
        (("learn-many", "none.yaml"), "The file 'none.yaml' cannot be read: No such file"),
        (("bench", "continual", "nothing"), "There is no stream 'nothing'. Known: "),
        (("bench", "continual", "digits", "--methods", "magic"), "Unknown method 'magic'. Known: addenda, "),
        (("bench", "compare", "none", "none"), "There is no report at 'none'. "),
        (("backbones", "show", "vit_tiny_patch16_224", "--weights", "none.pth"), "'none.pth' does not exist"),
        (("tasks", "list", "--registry", "."), "is a folder; give a file, such as"),
        (("predict", "x.png", "--json", "--csv"), "give one of them"),
        (("verify", "a", "--all"), "--all verifies every version, retired ones included; give it without task names."),
        (("predict", "x.png", "--task", "auto", "--task", "a"), "--task auto chooses among all tasks; give it alone"),
        (("serve", "--metrics-port", "65536"), "Invalid value for '--metrics-port'"),
        (("learn", "a", ".", "--seed", "4294967296"), "seed: Input should be less than or equal to 4294967295"),
        (("export-model", "--out", "a.pt2"), "There is no registry at"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, digits_folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*(digits_folder if argument == DATA else argument for argument in arguments))
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_missing_folder_is_reported_before_weights_are_loaded_or_a_registry_is_created(
    run: Run, tmp_path: Path
) -> None:
    registry = tmp_path / "tasks.db"
    for data in ([tmp_path / "gone"], [colour_folder(tmp_path / "data"), "--test", tmp_path / "gone"]):
        result = run("learn", "a", *data, "--registry", registry)
        assert result.code == 2
        assert f"There is no folder '{tmp_path / 'gone'}'" in result.err
        assert not registry.exists()


def test_an_unknown_task_is_reported_with_the_known_ones(run: Run, learned: Result, digits_folder: Path) -> None:
    result = run("evaluate", "one", digits_folder)
    assert result.code == 2
    assert "Task 'one' is not registered. Known: 'ones'. See: addenda tasks list" in result.err


def test_without_weights_and_network_the_error_names_the_option_for_a_file(run: Run, tmp_path: Path) -> None:
    result = run("learn", "a", colour_folder(tmp_path / "data"))
    assert result.code == 2
    assert "vit_base_patch16_224.augreg_in21k" in result.err
    assert "--weights" in result.err


@pytest.mark.slow
def test_backbones_are_listed_and_shown_with_the_cost_of_a_task(run: Run, learned: Result) -> None:
    listed = run("backbones", "list", "vit_tiny*")
    assert "in this registry" in listed.out
    assert "vit_tiny_patch16_224" in listed.out
    *_, swin = json.loads(run("backbones", "list", "swin_tiny*", "--json").out)
    assert (swin["layer heads"], swin["tokens"]) == ("yes", "no")
    assert swin["detail"] == "it is a SwinTransformer, not timm's VisionTransformer or Eva"
    assert "No timm model matches 'vit_huuge*'" in run("backbones", "list", "vit_huuge*").err
    plain = json.loads(run("backbones", "show", "glyphs", "--json").out)["task_cost"]
    assert plain["token_bytes"] == 4 * 128 * (1 + 5 * 5)
    adapted = json.loads(run("backbones", "show", "glyphs", "--adapter-rank", "8", "--json").out)["task_cost"]
    assert adapted["token_bytes"] > 10 * plain["token_bytes"]
    assert "5 memory tokens and adapters of rank 8" in run("backbones", "show", "glyphs", "--adapter-rank", "8").out


@pytest.mark.slow
def test_moved_weights_are_required_and_checked(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import load_file, save_file

    model = timm.create_model("test_vit", num_classes=3)
    weights = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), weights)
    first = run(
        "learn", "ones", digits_folder, "--backbone", "test_vit", "--weights", weights, "--epochs", "1", "--lr", "0.1"
    )
    assert first.code == 0, first.err
    weights.rename(tmp_path / "moved.safetensors")
    lost = run("verify")
    assert lost.code == 2
    assert "no longer at" in lost.err
    assert run("verify", "--weights", tmp_path / "moved.safetensors").code == 0
    changed = load_file(tmp_path / "moved.safetensors")
    changed["norm.bias"] = changed["norm.bias"] + 1
    save_file(changed, tmp_path / "other.safetensors")
    wrong = run("verify", "--weights", tmp_path / "other.safetensors")
    assert wrong.code == 1
    assert "The weights differ" in " ".join(wrong.out.split())
    assert "Failed: ones:1." in wrong.err
    refused = run("predict", digits_folder / "test", "--weights", tmp_path / "other.safetensors")
    assert refused.code == 2
    assert "The weights differ" in refused.err


def test_help_imports_no_framework() -> None:
    script = (
        "import sys; sys.argv = ['addenda', '--help']\n"
        "from addenda.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'timm', 'sqlalchemy', 'avalanche', 'sklearn', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.slow
def test_ctrl_c_while_a_connection_closes_prints_one_line(run: Run, learned: Result) -> None:
    script = (
        "import sys; sys.argv = ['addenda', 'tasks', 'list']\n"
        "from sqlalchemy.engine.default import DefaultDialect\n"
        "from addenda.cli import main\n"
        "def interrupted(*_):\n    raise KeyboardInterrupt\n"
        "DefaultDialect.do_close = interrupted\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == cli.INTERRUPTED
    assert done.stderr == "Interrupted. No incomplete task was registered; run the same command again to continue.\n"


def test_every_command_and_option_has_help(run: Run) -> None:
    groups: list[tuple[str, ...]] = [()]
    seen = 0
    for group in groups:
        out = run(*group, "--help").out
        assert "Usage" in out
    import typer.main

    def walk(command: object, path: tuple[str, ...]) -> None:
        nonlocal seen
        for name, child in getattr(command, "commands", {}).items():
            assert child.help, (*path, name)
            for parameter in child.params:
                assert getattr(parameter, "help", None) or parameter.name in ("help",), (*path, name, parameter.name)
            seen += 1
            walk(child, (*path, name))

    walk(typer.main.get_command(cli.app), ())
    assert seen >= 15


@pytest.mark.parametrize("position", ["first", "last", "none"])
def test_an_unexpected_error_is_one_line_unless_a_traceback_is_requested(
    run: Run, learned: Result, monkeypatch: pytest.MonkeyPatch, position: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("two\x1b[1A words")

    monkeypatch.setattr(Registry, "tasks", fail)
    words = {"first": ("--traceback", "tasks", "list"), "last": ("tasks", "list", "--traceback")}
    if position != "none":
        with pytest.raises(RuntimeError, match="two"):
            run(*words[position])
        return
    result = run("tasks", "list")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(r"Error: RuntimeError: two\x1b[1A words. This is a bug in Addenda ")
    assert "Run the same command with --traceback to see where the error was raised." in result.err
    assert result.err.count("\n") == 1


@pytest.mark.slow
def test_characters_outside_the_terminal_encoding_are_escaped_and_json_stays_valid(
    learned: Result, tmp_path: Path
) -> None:
    image = tmp_path / "кот.png"
    Image.new("RGB", (8, 8)).save(image)
    for output in ("--csv", "--json"):
        done = subprocess.run(
            [sys.executable, "-m", "addenda.cli", "predict", image, output, "--registry", tmp_path / "tasks.db"],
            env=os.environ | {"PYTHONIOENCODING": "latin-1:strict"}, capture_output=True, check=True,
        )  # fmt: skip
        assert rb"\u043a\u043e\u0442.png" in done.stdout
    assert list(json.loads(done.stdout)["images"]) == [str(image)]
