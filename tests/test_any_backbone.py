"""A whole run on every kind of backbone: learn, verify, predict, route, serve, export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from addenda import CombinedModel, FrozenBackbone, LearnConfig, Learner, Registry, Task
from addenda.combined import Router, verify
from addenda.exceptions import BackboneError, RegistryError
from addenda.exporting import export_model
from addenda.learner.augmentation import Augmentation
from tests.support.commands import Run
from tests.support.images import colour_folder
from tests.support.models import backbone
from tests.support.servers import client_of
from tests.support.tasks import random_task
from tests.support.tiny import STAGED

WITH_TOKENS = ("gap", "gap-registers", "siglip", "pe-core", "rope-gap")
QUICK_KINDS = ("gap-registers", "resnet")
QUICK = LearnConfig(epochs=1, learning_rate=0.003, batch_size=8, augmentation=Augmentation(views=0))


def slow(kind: str) -> object:
    return pytest.param(kind, marks=pytest.mark.slow)


def learned(on: FrozenBackbone, registry: Registry, folder: Path) -> list[Task]:
    """Two tasks of two colours each; on a backbone that can carry tokens, the first has one."""
    learner, tasks = Learner(on, registry), []
    for number, classes in enumerate((("red", "green"), ("blue", "green"))):
        data = colour_folder(folder / f"colours-{number}", 12, classes, seed=number)
        config = replace(QUICK, fall_back=False) if on.blocks and not number else QUICK
        tasks.append(learner.learn(f"colours-{number}", data, config=config))
    return tasks


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's export warns about itself
@pytest.mark.parametrize("kind", [kind if kind in QUICK_KINDS else slow(kind) for kind in (*WITH_TOKENS, *STAGED)])
def test_a_task_is_learned_verified_predicted_routed_served_and_exported(
    kind: str, registry: Registry, tmp_path: Path
) -> None:
    on = backbone(kind)
    tasks = learned(on, registry, tmp_path)
    assert (tasks[0].class_token is not None) == (kind in WITH_TOKENS)
    assert all(task.metrics["layer_probe"]["validation"]["accuracy"] >= 0.5 for task in tasks)
    verdicts = verify(on, [(task, registry.goldens(task.ref)) for task in tasks])
    assert [verdict.identical for verdict in verdicts] == [True, True]
    assert not registry.check_integrity().faults
    (record,) = registry.backbones()
    assert (record["embed_dim"], record["depth"]) == (on.embed_dim, on.depth)

    files = [tmp_path / "colours-0" / "red" / "0.png", tmp_path / "colours-1" / "blue" / "0.png"]
    model = CombinedModel(on, registry.load(on))
    predictions = model.predict(files)
    router = Router({task.name: registry.statistics(task.ref) for task in tasks})
    assert "layers" in router._classifiers
    choices = model.route(files, router)
    assert [prediction for _, prediction in choices] == [
        predictions[choice.task][number] for number, (choice, _) in enumerate(choices)
    ]
    with client_of(on, registry) as client:
        answer = client.post("/api/v1/predict", content=files[0].read_bytes()).json()
    assert answer["exact"]
    for name, rows in predictions.items():
        served = [(label["label"], label["probability"]) for label in answer["tasks"][name]["labels"]]
        assert [label for label, _ in served] == [label for label, _ in rows[0]]

    exported = export_model(registry, on, tasks, tmp_path / "model.pt2")
    assert exported.deviation <= exported.tolerance
    pictures = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = torch.export.load(tmp_path / "model.pt2").module()(pictures)
    for name, logits in model(pictures).items():
        torch.testing.assert_close(outputs[name], logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["siglip", "pe-core", *STAGED])
def test_a_backbone_of_every_kind_is_exported_to_onnx(kind: str, registry: Registry, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    on = backbone(kind)
    tasks = learned(on, registry, tmp_path)
    exported = export_model(registry, on, tasks, tmp_path / "model.onnx", "onnx")
    assert exported.deviation <= exported.tolerance


ASKED = [
    ({"num_memory_tokens": 3}, "num_memory_tokens"), ({"adapter_rank": 4}, "adapter_rank"),
    ({"adapter_rank": "auto"}, "adapter_rank"), ({"extends": ("other",)}, "extends"),
    ({"extends": "auto"}, "extends"), ({"fall_back": False}, "fall_back"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "name"), ASKED)
def test_what_needs_tokens_is_refused_by_name_where_there_are_none(
    settings: dict[str, object], name: str, registry: Registry, tmp_path: Path
) -> None:
    learner = Learner(backbone("resnet"), registry)
    with pytest.raises(
        BackboneError, match=rf"^The setting {name} requires task tokens, which backbone 'resnet' cannot"
    ):
        learner.learn("colours", colour_folder(tmp_path / "colours"), config=replace(QUICK, **settings))
    assert not registry.tasks()


def test_a_task_with_tokens_on_a_backbone_without_is_refused() -> None:
    on, vit = backbone("resnet"), backbone("plain")
    task = replace(random_task(vit, "token"), backbone=on.fingerprint)
    with pytest.raises((BackboneError, RegistryError), match=r"'token' requires task tokens|does not fit"):
        CombinedModel(on, [task])


def test_learning_again_without_tokens_does_nothing(registry: Registry, tmp_path: Path) -> None:
    on, data = backbone("convnext"), colour_folder(tmp_path / "colours")
    first = Learner(on, registry).learn("colours", data, config=QUICK)
    generation = registry.generation
    assert Learner(on, registry).learn("colours", data, config=QUICK).sha256 == first.sha256
    assert registry.generation == generation
    assert first.config["head_only"]
    assert first.num_layer_features == on.num_layer_features


def test_memory_tokens_are_refused_by_option_on_a_backbone_from_a_weights_file(run: Run, tmp_path: Path) -> None:
    data, file = colour_folder(tmp_path / "colours", 4), tmp_path / "resnet.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), file)
    options = ("--backbone", "test_resnet", "--weights", file, "--registry", tmp_path / "tasks.db", "--views", 0)
    result = run("learn", "colours", data, "--memory", 5, *options)
    assert result.code == 2
    assert "--memory requires task tokens, which backbone 'test_resnet' cannot carry" in result.err
