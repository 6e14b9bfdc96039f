"""Exported models: one file, without Addenda, that gives the same logits as the combined model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from addenda import CombinedModel, FrozenBackbone, Registry, Task
from addenda.combined import golden, tensor_digest
from addenda.exceptions import AddendaError, BackboneError, DataError, ExactnessError
from addenda.exporting import FORMATS, export_model
from tests.support.commands import Run
from tests.support.places import ROOT
from tests.support.tasks import random_task
from tests.support.tiny import tiny_eva, tiny_vit

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # torch warns about itself
]


def register_all(registry: Registry, backbone: FrozenBackbone, tasks: list[Task]) -> list[Task]:
    registry.add_backbone(backbone.record())
    return [registry.register(task, golden(backbone, task)) for task in tasks]


def of_every_kind(backbone: FrozenBackbone) -> list[Task]:
    """Tasks of several size classes, a chain of extensions and a head-only task, some named like inner nodes."""
    first = random_task(backbone, "linear", memory=5, seed=1)
    second = random_task(backbone, "add", memory=0, classes=2, seed=2, parents=(first,), pooled=False)
    third = random_task(backbone, "softmax_1", memory=20, classes=40, seed=3, parents=(second,), rank=3)
    last = random_task(backbone, "9-lives", memory=6, seed=5, rank=5)
    last = replace(last, objective="multi-label", temperature=2.5)
    return [first, second, third, head_only(backbone, "val_0"), last]


def head_only(backbone: FrozenBackbone, name: str, classes: int = 3) -> Task:
    task = random_task(backbone, name, classes=classes, seed=4)
    return replace(task, class_token=None, memory=None, pooled_weight=None)


def images(backbone: FrozenBackbone, count: int) -> Tensor:
    shape = (count, *backbone.preprocessing["input_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(count))


def assert_close(outputs: Any, expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert list(outputs) == list(expected)
    for name, logits in expected.items():
        assert outputs[name].shape == logits.shape
        assert (outputs[name] - logits).abs().max() <= tolerance * logits.abs().max(), name


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FrozenBackbone, list[Task], Registry, Path]]:
    """Tasks of every kind, exported in each format."""
    backbone, folder = FrozenBackbone(tiny_vit(depth=2), "tiny", "hub"), tmp_path_factory.mktemp("exported")
    with Registry.open(tmp_path_factory.mktemp("registry") / "tasks.db") as registry:
        tasks = register_all(registry, backbone, of_every_kind(backbone))
        for format, (suffix, *_) in FORMATS.items():
            made = export_model(registry, backbone, tasks, folder / f"all{suffix}", format)
            assert made.tasks == ("linear:1", "add:1", "softmax_1:1", "val_0:1", "9-lives:1")
            assert 0 <= made.deviation <= made.tolerance == 1e-4
            assert made.size_bytes == (folder / f"all{suffix}").stat().st_size
        yield backbone, tasks, registry, folder


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_gives_the_combined_models_logits_for_any_number_of_images(
    written: tuple[FrozenBackbone, list[Task], Registry, Path], format: str
) -> None:
    backbone, tasks, _, folder = written
    run = FORMATS[format].load(folder / f"all{FORMATS[format].suffix}")
    model = CombinedModel(backbone, tasks)
    for count in (1, 2, 3, 9):
        batch = images(backbone, count)
        assert_close(run(batch), model(batch))
    assert sorted(path.name for path in folder.iterdir()) == ["all.onnx", "all.pt2"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "model",
    [
        partial(tiny_vit, reg_tokens=2, init_values=0.1, qk_norm=True),
        partial(tiny_vit, global_pool="avg", pre_norm=True),
        partial(tiny_vit, no_embed_class=True, num_classes=0),
        partial(tiny_eva, "dinov3"),
        partial(tiny_eva, "eva02"),
    ],
    ids=("registers", "pooled by average", "no position of the class token", "dinov3", "eva02"),
)
def test_backbones_of_several_kinds_can_be_exported(
    registry: Registry, tmp_path: Path, format: str, model: Callable[..., Any]
) -> None:
    backbone = FrozenBackbone(model(seed=1, depth=2), "other", "hub")
    child = random_task(backbone, "child", parents=(first := random_task(backbone, "first", rank=2),), seed=1, rank=4)
    tasks = register_all(registry, backbone, [first, child])
    path = tmp_path / f"model{FORMATS[format].suffix}"
    export_model(registry, backbone, tasks[1:], path, format)  # the parent is computed, but is not an output
    batch = images(backbone, 5)
    assert_close(FORMATS[format].load(path)(batch), CombinedModel(backbone, tasks[1:])(batch))


def test_a_file_does_not_contain_the_backbones_head(registry: Registry, tmp_path: Path) -> None:
    sizes = []
    for classes in (0, 10_000):
        backbone = FrozenBackbone(tiny_vit(depth=1, num_classes=classes), "tiny", "hub")
        tasks = register_all(registry, backbone, [head_only(backbone, f"of-{classes}")])
        sizes.append(export_model(registry, backbone, tasks, tmp_path / f"{classes}.pt2").size_bytes)
        assert backbone.model.head is not None
        assert backbone.backbone_logits(images(backbone, 1)).shape == (1, classes or 48)
    assert abs(sizes[1] - sizes[0]) < 10_000


@pytest.mark.parametrize("format", FORMATS)
def test_equal_tasks_with_two_names_give_two_outputs(registry: Registry, tmp_path: Path, format: str) -> None:
    backbone = FrozenBackbone(tiny_vit(depth=1), "tiny", "hub")
    task = head_only(backbone, "one")
    tasks = register_all(registry, backbone, [task, replace(task, name="other")])
    path = tmp_path / f"twins{FORMATS[format].suffix}"
    export_model(registry, backbone, tasks, path, format)
    logits = FORMATS[format].load(path)(images(backbone, 2))
    assert list(logits) == ["one", "other"]
    assert torch.equal(logits["one"], logits["other"])


def test_nothing_in_a_file_is_pickled(written: tuple[FrozenBackbone, list[Task], Registry, Path]) -> None:
    with zipfile.ZipFile(written[-1] / "all.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    configs = [json.loads(data) for name, data in members.items() if name.endswith("_config.json")]
    assert len(members) > 20
    assert len(configs) == 2
    assert not any(entry["use_pickle"] for config in configs for entry in config["config"].values())
    assert not [name for name, data in members.items() if data[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]


@pytest.mark.parametrize("format", FORMATS)
def test_deviating_logits_are_refused_and_no_file_is_left(registry: Registry, tmp_path: Path, format: str) -> None:
    backbone = FrozenBackbone(tiny_vit(depth=1), "tiny", "hub")
    task = head_only(backbone, "one")
    registry.add_backbone(backbone.record())
    probe = golden(backbone, task)
    logits = probe.logits.clone()
    logits[3, 0] += 2e-4 * logits.abs().max()
    task = registry.register(task, replace(probe, logits=logits, digest=tensor_digest(logits)))
    path = tmp_path / f"one{FORMATS[format].suffix}"
    with pytest.raises(ExactnessError, match=r"was not written: .* deviate by 0\.0002 of the largest logit, allowed"):
        export_model(registry, backbone, [task], path, format)
    assert not list(tmp_path.glob("one*"))


def test_a_bfloat16_backbone_is_exported_for_torch_within_its_own_tolerance(registry: Registry, tmp_path: Path) -> None:
    backbone = FrozenBackbone(tiny_vit(depth=1), "tiny", "hub", precision=torch.bfloat16)
    tasks = register_all(registry, backbone, [random_task(backbone, "one")])
    made = export_model(registry, backbone, tasks, tmp_path / "one.pt2")
    assert made.deviation <= made.tolerance == 1e-1
    with pytest.raises(
        AddendaError, match=r"computes in bfloat16, which ONNX runtimes do not support\. Use --format torch-export"
    ):
        export_model(registry, backbone, tasks, tmp_path / "one.onnx", "onnx")


def test_export_errors_say_what_to_do(registry: Registry, tiny: FrozenBackbone, tmp_path: Path) -> None:
    tasks = register_all(registry, tiny, [random_task(tiny, "one"), random_task(tiny, "images", seed=1)])
    (tmp_path / "existing.pt2").write_bytes(b"")
    other = FrozenBackbone(tiny_vit(2), "other", "hub")
    refused: list[tuple[str, str, type[Exception], str]] = [
        ("a.pt2", "tflite", AddendaError, "Unknown format 'tflite'. Known: torch-export, onnx."),
        ("a.onnx", "torch-export", AddendaError, "torch-export requires a file name ending in .pt2; got 'a.onnx'."),
        ("existing.pt2", "torch-export", AddendaError, "already exists. Remove it, or choose another name"),
        ("nowhere/a.pt2", "torch-export", AddendaError, "nowhere' does not exist"),
        ("a.onnx", "onnx", AddendaError, "'images' has the name of the model's input"),
    ]
    for name, format, kind, message in refused:
        with pytest.raises(kind, match=re.escape(message)):
            export_model(registry, tiny, tasks, tmp_path / name, format)
    with pytest.raises(DataError, match="There is no task to export"):
        export_model(registry, tiny, [], tmp_path / "a.pt2")
    with pytest.raises(BackboneError, match="was learned on the backbone with fingerprint"):
        export_model(registry, other, tasks, tmp_path / "a.pt2")
    assert (tmp_path / "existing.pt2").read_bytes() == b""
    assert not (tmp_path / "a.pt2").exists()


@pytest.fixture
def on_glyphs(glyphs: FrozenBackbone, tmp_path: Path) -> list[Task]:
    """Two tasks in the registry of the commands."""
    with Registry.open(tmp_path / "tasks.db") as opened:
        return register_all(opened, glyphs, [head_only(glyphs, "textures"), head_only(glyphs, "rubbish", classes=5)])


def test_the_command_exports_chosen_tasks_or_all(run: Run, on_glyphs: list[Task], tmp_path: Path) -> None:
    made = run("export-model", "--out", tmp_path / "all.pt2")
    assert made.code == 0, made.err
    assert f"{tmp_path / 'all.pt2'}: textures:1, rubbish:1; torch-export, " in made.out
    assert re.search(r"at most \d\.\de-\d\d of the largest logit \(tolerance 0\.0001\)\.", made.out)
    one = run("export-model", "--tasks", "rubbish:1", "--format", "onnx", "-o", tmp_path / "one.onnx", "--json")
    assert json.loads(one.out)["tasks"] == ["rubbish:1"], one.err
    again = run("export-model", "--out", tmp_path / "all.pt2")
    assert (again.code, "already exists" in again.err) == (2, True)
    unknown = run("export-model", "--tasks", "textures,rubish", "--out", tmp_path / "b.pt2")
    assert (unknown.code, "Task 'rubish' is not registered" in unknown.err) == (2, True)


def test_the_page_runs_as_it_is_without_addenda(run: Run, on_glyphs: list[Task], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "export.md").read_text()
    for line in re.findall(r"^addenda (export-model [^#\n]*)", text, re.MULTILINE):
        made = run(*(tmp_path / word if word.endswith((".pt2", ".onnx")) else word for word in line.split()))
        assert made.code == 0, made.err
    scripts = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(scripts) == 2
    script = "import sys\n" + "\n".join(scripts) + "\nassert not {'addenda', 'timm'} & set(sys.modules)\n"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["textures", "rubbish"] * 2
    assert all(
        label.startswith("class ")
        for line in lines[:2]
        for label in json.loads(line.split(" ", 1)[1].replace("'", '"'))
    )


def test_a_files_metadata_describes_its_tasks(written: tuple[FrozenBackbone, list[Task], Registry, Path]) -> None:
    import onnx

    backbone, tasks, registry, folder = written
    model = onnx.load(folder / "all.onnx")
    onnx.checker.check_model(model, full_check=True)
    batch, *size = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert [dim.dim_value for dim in size] == backbone.preprocessing["input_size"]
    files = {"addenda.json": ""}
    torch.export.load(folder / "all.pt2", extra_files=files)
    about = json.loads(files["addenda.json"])
    assert about == json.loads({entry.key: entry.value for entry in model.metadata_props}["addenda.json"])
    assert about["backbone"] == {"name": "tiny", "fingerprint": backbone.fingerprint, "precision": "float32"}
    assert about["preprocessing"] == backbone.preprocessing
    assert about["generation"] == registry.generation
    assert list(about["tasks"]) == [task.name for task in tasks]
    assert about["tasks"]["9-lives"] == {
        "ref": "9-lives:1",
        "sha256": tasks[4].sha256,
        "labels": ["class 0", "class 1", "class 2"],
        "objective": "multi-label",
        "exclusive": False,
        "temperature": 2.5,
        "extends": [],
    }
    assert about["tasks"]["add"]["extends"] == ["linear:1"]
