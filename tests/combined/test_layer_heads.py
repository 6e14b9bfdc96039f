"""Layer heads: the features of every block, their bits, and the detection of planted faults."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.backbones import FrozenBackbone, frozen_stream
from addenda.backbones.arithmetic import layer_statistics
from addenda.combined import CombinedModel, forward_pass, golden
from addenda.combined.golden import verify
from addenda.exceptions import IntegrityError, RegistryError
from addenda.exporting.export import export_model
from addenda.registry import Registry, Task
from addenda.registry.store import artifact
from addenda.registry.store.digests import digest
from addenda.registry.store.header import parse_header
from tests.support.models import (
    VARIANTS,
    alone,
    assert_company_moves_no_bit,
    backbone,
    bits,
    family,
    fresh_backbone,
    head_only,
    images,
    in_both_precisions,
    lively_vit,
)
from tests.support.tasks import random_task
from tests.support.tiny import tiny_vit


def expected_features(variant: str, pictures: Tensor) -> Tensor:
    """An independent float64 implementation over timm's own blocks."""
    model = lively_vit(variant).double()
    start, rope = model.num_prefix_tokens, {}
    with torch.no_grad():
        if variant in VARIANTS and hasattr(model, "rope"):
            tokens, rotation = model._pos_embed(model.patch_embed(pictures.double()))
            rope = {"rope": rotation}
        else:
            tokens = model._pos_embed(model.patch_embed(pictures.double()))
        tokens = model.norm_pre(tokens)
        statistics = []
        for i, (block, after) in enumerate(zip(model.blocks, model.blocks[1:], strict=False)):
            layer_rope = {"rope": rope["rope"][i]} if rope and getattr(model, "rope_mixed", False) else rope
            tokens = block(tokens, **layer_rope)
            normed = after.norm1(tokens)
            patches = normed[:, start:]
            statistics += [] if model.cls_token is None else [normed[:, 0]]
            statistics += [patches.mean(1), patches.std(1, correction=0)]
    return torch.cat(statistics, dim=1)


def features(on: FrozenBackbone, pictures: Tensor) -> Tensor:
    layers = forward_pass(on, pictures, layers=True).layers
    assert layers is not None
    return layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_features_are_statistics_of_every_block_but_the_last(variant: str) -> None:
    on, pictures = backbone(variant), images(4)
    layers = features(on, pictures)
    of_a_block = 2 if variant in ("gap", "gap-registers", "siglip", "rope-gap") else 3
    assert layers.shape == (4, on.num_layer_features) == (4, of_a_block * on.embed_dim * (on.depth - 1))
    torch.testing.assert_close(layers.double(), expected_features(variant, pictures), rtol=1e-4, atol=1e-4)


def test_a_backbone_of_one_block_has_no_layer_features_and_runs_its_tasks() -> None:
    on = FrozenBackbone(tiny_vit(depth=1), "one block", "hub")
    assert features(on, images(3)).shape == (3, 0)
    assert_company_moves_no_bit(on, random_task(on, "task"), [random_task(on, "other", seed=1)])


def without_a_patch(normed: Tensor, num_patches: int, class_token: bool) -> Tensor:
    return layer_statistics(normed, num_patches - 1, class_token)


def of_the_neighbour(normed: Tensor, num_patches: int, class_token: bool) -> Tensor:
    return layer_statistics(normed, num_patches, class_token).roll(1, 0)


def not_normalised(normed: Tensor, num_patches: int, class_token: bool) -> Tensor:
    return layer_statistics(3 * normed, num_patches, class_token)


@pytest.mark.parametrize("fault", [without_a_patch, of_the_neighbour, not_normalised])
def test_a_planted_fault_is_detected(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    on, pictures = fresh_backbone(), images(4)
    monkeypatch.setattr(frozen_stream, "layer_statistics", fault)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(
            features(on, pictures).double(), expected_features("plain", pictures), rtol=1e-4, atol=1e-4
        )


def test_a_neighbours_row_is_detected_by_the_exactness_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("addenda.combined.selftest._equal", lambda one, other: True)
    monkeypatch.setattr(frozen_stream, "layer_statistics", of_the_neighbour)
    on = fresh_backbone()
    task = head_only(random_task(on, "layers-only", layers=0))
    with pytest.raises(AssertionError):
        assert_company_moves_no_bit(on, task, [])


def test_a_neighbours_row_is_refused_by_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_first(normed: Tensor, num_patches: int, class_token: bool) -> Tensor:
        return layer_statistics(normed, num_patches, class_token)[:1].expand(len(normed), -1)

    monkeypatch.setattr(frozen_stream, "layer_statistics", of_the_first)
    on = fresh_backbone()
    with pytest.raises(Exception, match="Exact mode is refused"):
        CombinedModel(on, [random_task(on, "any")])


@in_both_precisions(["plain", "dinov2", "average", "dinov3"])
def test_a_layer_head_keeps_its_bits_and_moves_no_others(variant: str, precision: torch.dtype) -> None:
    on = backbone(variant, precision)
    tasks = family(on)
    layered = [task for task in tasks.values() if task.num_layer_features]
    assert len(layered) == 3
    others = [task for task in tasks.values() if not task.num_layer_features]
    for task in layered:
        assert_company_moves_no_bit(on, task, [other for other in tasks.values() if other is not task])
    pictures = images(5)
    before, after = CombinedModel(on, others)(pictures), CombinedModel(on, [*layered, *others])(pictures)
    for task in others:
        assert bits(after[task.name]) == bits(before[task.name]) == alone(on, task, pictures)


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("layers", [0, 5])
def test_logits_are_those_of_token_pooled_feature_and_layers_added(token: bool, layers: int) -> None:
    on, pictures = backbone(), images(9)
    layered = random_task(on, "layered", layers=layers)
    layered = layered if token else head_only(layered)
    without = dataclasses.replace(layered, name="without", layer_weight=None, layer_down=None)
    logits = CombinedModel(on, [layered, without])(pictures)
    inputs = features(on, pictures)
    inputs = inputs if layered.layer_down is None else inputs @ layered.layer_down.T
    expected = logits["without"] + F.linear(inputs, layered.layer_weight)
    torch.testing.assert_close(logits["layered"], expected, rtol=0, atol=1e-4)


def test_layer_features_are_computed_only_for_requested_tasks_with_layer_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone()
    model = CombinedModel(on, [random_task(on, "layers", layers=0), random_task(on, "token")])
    calls: list[int] = []
    monkeypatch.setattr(frozen_stream, "layer_statistics", lambda *inputs: calls.append(1) or layer_statistics(*inputs))
    model(images(2), ["token"])
    assert not calls
    model(images(2), ["layers"])
    assert len(calls) == on.depth - 1


def test_a_task_with_another_number_of_layer_features_is_refused_by_name() -> None:
    on = backbone()
    task = random_task(on, "layers", layers=0)
    short = dataclasses.replace(task, layer_weight=task.layer_weight[:, 1:])
    with pytest.raises(RegistryError, match=r"'layers' does not fit .*'plain': it reads 287 layer features, not 288"):
        CombinedModel(on, [short])


# --- storage ----------------------------------------------------------------------------------------------------------


def manifest(task: Task) -> dict[str, object]:
    size = 8 + int.from_bytes(task.artifact[:8], "little")
    return parse_header(task.artifact[:size])[0]


def test_only_an_artifact_with_a_layer_head_has_the_newer_format() -> None:
    formats = {name: manifest(task)["format"] for name, task in family(backbone()).items()}
    assert {name for name, number in formats.items() if number == 2} == {"layers", "low-rank-layers", "layers-only"}
    assert set(formats.values()) == {1, 2}


@pytest.mark.parametrize("format", [1, 3])
def test_an_artifact_of_a_layer_head_with_another_format_is_refused(format: int) -> None:
    task = random_task(backbone(), "layers", layers=0)
    data = task.artifact.replace(b'\\"format\\":2', b'\\"format\\":%d' % format)
    assert data != task.artifact
    with pytest.raises(IntegrityError, match=f"format {format}"):
        artifact.read(data, digest(data))


@pytest.mark.parametrize(
    "broken",
    [
        {"layer_weight": torch.ones(2, 288)},  # two labels instead of three
        {"layer_weight": torch.ones(3, 4), "layer_down": torch.ones(5, 288)},
        {"layer_weight": torch.full((3, 288), float("nan"))},
    ],
)
def test_a_layer_head_of_a_wrong_shape_is_refused(broken: dict[str, Tensor]) -> None:
    task = random_task(backbone(), "layers", layers=0)
    described = {"backbone": task.backbone, "labels": task.labels, "objective": task.objective, "extends": []}
    with pytest.raises(IntegrityError, match=r"do not fit|NaN"):
        artifact.pack(described, {**task.tensors, **broken}, None)


@pytest.mark.parametrize("name", ["layers", "low-rank-layers", "layers-only"])
def test_a_layer_head_is_registered_verified_sent_and_exported(name: str, tmp_path: Path) -> None:
    on = backbone()
    task = family(on)[name]
    with Registry.open(tmp_path / "tasks.db") as registry, Registry.open(tmp_path / "other.db") as other:
        registry.add_backbone(on.record())
        for member in (*task.closure, task):
            registry.register(member, golden(on, member))
        registry.export([name], tmp_path / "tasks.addenda")
        other.import_bundle(tmp_path / "tasks.addenda")
        (imported,) = [task for task in other.load(on) if task.name == name]
        assert imported.sha256 == task.sha256
        assert [verdict.identical for verdict in verify(on, [(imported, other.goldens(imported.ref))])] == [True]
        assert not registry.check_integrity().faults
        exported = export_model(registry, on, [registry.get(name)], tmp_path / "model.pt2")
        assert exported.deviation <= exported.tolerance
    logits = torch.export.load(tmp_path / "model.pt2").module()(images(3))
    torch.testing.assert_close(logits[name], CombinedModel(on, [task])(images(3))[name], rtol=0, atol=1e-3)
    assert json.dumps(manifest(task))
