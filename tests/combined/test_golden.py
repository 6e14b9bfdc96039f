"""Golden probes: numerics fingerprints, tolerances, and the detection of planted faults."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from addenda.backbones import Adapter, FrozenBackbone
from addenda.backbones.family import Family
from addenda.combined import golden, numerics, numerics_fingerprint, tensor_digest, verify
from addenda.combined.heads import Head
from addenda.combined.shapes import TILE
from addenda.exceptions import BackboneError, IntegrityError
from addenda.registry import Golden
from tests.support.models import PRECISIONS, backbone, family, lively_vit, threads
from tests.support.places import ROOT
from tests.support.tasks import random_task

# The package exports a function of the same name, which hides the module.
NUMERICS = importlib.import_module("addenda.combined.numerics")


@pytest.mark.slow
@PRECISIONS
def test_tasks_recorded_alone_verify_together(precision: torch.dtype) -> None:
    on = backbone("plain", precision)
    recorded = [(task, [golden(on, task)]) for task in family(on).values()]
    verdicts = verify(on, recorded)
    assert [verdict.task for verdict in verdicts] == list(family(on))
    for verdict, (task, (probe,)) in zip(verdicts, recorded, strict=True):
        assert probe.digest == tensor_digest(probe.logits)
        assert probe.numerics_fingerprint == numerics_fingerprint(probe.numerics)
        assert (verdict.ok, verdict.same_numerics, verdict.identical) == (True, True, True)
        assert verdict.max_difference == 0
        assert verdict.detail == "identical, byte for byte"
        assert verdict.compared == f"4 probe images x {len(task.labels)} logits"
        assert verdict.numerics_fingerprint == verdict.recorded_under == probe.numerics_fingerprint


def test_versions_of_one_name_verify_side_by_side() -> None:
    on = backbone()
    versions = [dataclasses.replace(random_task(on, "twice", seed=v), version=v) for v in (1, 2)]
    verdicts = verify(on, [(task, [golden(on, task)]) for task in versions])
    assert [(verdict.task, verdict.identical) for verdict in verdicts] == [("twice:1", True), ("twice:2", True)]


@pytest.mark.parametrize("site", ["q", "proj", "fc1", "fc2"])
@pytest.mark.parametrize("whose", ["own", "a parent's"])
def test_a_changed_adapter_fails_under_the_same_numerics(site: str, whose: str) -> None:
    on = backbone()
    task = family(on)["adapted" if whose == "own" else "sees-adapted"]
    (adapted,) = (task,) if whose == "own" else task.parents
    assert adapted.adapters is not None
    update = adapted.adapters[site]
    changed = dataclasses.replace(adapted, adapters={**adapted.adapters, site: update._replace(up=update.up + 1e-2)})
    if whose != "own":
        changed = dataclasses.replace(task, parents=(changed,))
    (verdict,) = verify(on, [(changed, [golden(on, task)])])
    assert (verdict.same_numerics, verdict.ok, verdict.identical) == (True, False, False)


@pytest.mark.parametrize("field", ["class_token", "memory", "head_weight", "head_bias", "pooled_weight", "parents"])
def test_a_changed_tensor_fails_under_the_same_numerics(field: str) -> None:
    on = backbone()
    task = family(on)["child"]
    if field == "parents":
        (parent,) = task.parents
        changed = dataclasses.replace(task, parents=(dataclasses.replace(parent, memory=parent.memory + 1e-3),))
    else:
        changed = dataclasses.replace(task, **{field: getattr(task, field) + 1e-3})
    (verdict,) = verify(on, [(changed, [golden(on, task)])])
    assert verdict.same_numerics
    assert not verdict.ok
    assert not verdict.identical
    assert verdict.max_difference > 0
    assert verdict.detail.startswith("DIFFERS under the same numerics fingerprint, by up to ")


def of_another_machine(recorded: Golden, shift: float = 0.0) -> Golden:
    """A golden probe as another machine would have recorded it; `shift` is relative to the largest logit."""
    described = {**recorded.numerics, "device": "another CPU", "probe": "0" * 64}
    logits = recorded.logits.clone()
    logits[0, 0] += shift * logits.abs().max()
    return Golden(described, numerics_fingerprint(described), logits, tensor_digest(logits))


@pytest.mark.parametrize(
    ("precision", "within", "beyond"),
    [(torch.float32, 5e-5, 3e-4), (torch.bfloat16, 2e-2, 1.5e-1)],
    ids=["float32", "bfloat16"],
)
def test_another_numerics_fingerprint_is_a_numerics_change_within_the_tolerance(
    precision: torch.dtype, within: float, beyond: float
) -> None:
    on = backbone("plain", precision)
    task = family(on)["five"]
    for shift in (within, -within, beyond, -beyond):
        (verdict,) = verify(on, [(task, [of_another_machine(golden(on, task), shift)])])
        assert verdict.ok is (abs(shift) == within)
        assert not verdict.same_numerics
        assert not verdict.identical
        assert verdict.detail.startswith("numerics change (now ")


def test_identical_logits_under_another_fingerprint_are_reported_as_identical() -> None:
    on = backbone()
    task = family(on)["five"]
    (verdict,) = verify(on, [(task, [of_another_machine(golden(on, task))])])
    assert (verdict.ok, verdict.same_numerics, verdict.identical) == (True, False, True)
    assert verdict.detail == "identical, byte for byte, under another numerics fingerprint"


def test_a_golden_probe_of_another_backbones_task_is_refused() -> None:
    with pytest.raises(BackboneError, match="was learned on the backbone"):
        golden(backbone(), family(backbone("clip"))["five"])


def test_the_probe_of_the_current_numerics_is_compared() -> None:
    on = backbone()
    task = family(on)["five"]
    here, elsewhere = golden(on, task), of_another_machine(golden(on, task), 5e-5)
    for probes in ([here, elsewhere], [elsewhere, here]):
        (verdict,) = verify(on, [(task, probes)])
        assert (verdict.same_numerics, verdict.identical) == (True, True)


def test_a_probe_whose_logits_changed_fails_and_the_others_are_still_compared() -> None:
    on = backbone()
    task, other = family(on)["five"], family(on)["nine"]
    good = golden(on, task)
    bad = dataclasses.replace(good, logits=good.logits + 1)
    verdicts = verify(on, [(task, [bad]), (other, [golden(on, other)])])
    assert [verdict.ok for verdict in verdicts] == [False, True]
    assert verdicts[0].detail == "the golden probe has another shape or does not match its digest"
    assert verdicts[0].max_difference is None


def test_a_task_without_a_probe_fails() -> None:
    on = backbone()
    (verdict,) = verify(on, [(family(on)["five"], [])])
    assert (verdict.ok, verdict.detail) == (False, "no golden probe is recorded")


def test_weights_changed_in_memory_are_caught_before_anything_is_compared() -> None:
    on = FrozenBackbone(lively_vit(), "fresh", "hub")
    task = random_task(on, "task")
    recorded = golden(on, task)
    on.blocks[1].mlp.fc1.weight.data[0, 0] += 1e-6
    for check in (lambda: verify(on, [(task, [recorded])]), lambda: golden(on, task)):
        with pytest.raises(IntegrityError, match="weights of backbone 'fresh' in memory have changed"):
            check()


@pytest.mark.parametrize("kind", ["gate-last", "eva02", "eva02-small"])
def test_gated_backbones_keep_the_numerics_that_they_had_without_adapters(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = backbone(kind)
    before = numerics_fingerprint(numerics(on))
    monkeypatch.setattr(FrozenBackbone, "adapter_obstacle", lambda self: "its MLPs are gated")
    monkeypatch.setattr(on, "memo", {})
    assert numerics_fingerprint(numerics(on)) == before
    monkeypatch.setattr(backbone("plain"), "memo", {})
    plain = numerics_fingerprint(numerics(backbone("plain")))
    monkeypatch.undo()
    assert numerics_fingerprint(numerics(backbone("plain"))) != plain, "a probe with adapters has other numerics"


def test_another_tile_size_is_a_numerics_change(monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone()
    task = family(on)["five"]
    recorded = golden(on, task)
    monkeypatch.setattr(NUMERICS, "TILE", 2 * TILE)
    (verdict,) = verify(on, [(task, [recorded])])
    assert (verdict.ok, verdict.same_numerics) == (True, False)
    assert verdict.numerics_fingerprint != verdict.recorded_under == recorded.numerics_fingerprint


def test_the_numerics_fingerprint_changes_with_everything_that_can_change_a_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on = backbone()
    fingerprints = {"unchanged": numerics_fingerprint(numerics(on))}
    assert numerics_fingerprint(numerics(on)) == fingerprints["unchanged"]
    with threads(torch.get_num_threads() + 1):
        fingerprints["threads"] = numerics_fingerprint(numerics(on))
    for name, value in (("TILE", 2 * TILE), ("micro_batch", lambda device: 2), ("_timm_version", lambda: "0")):
        with monkeypatch.context() as patch:
            patch.setattr(NUMERICS, name, value)
            fingerprints[name] = numerics_fingerprint(numerics(on))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        fingerprints["matmul precision"] = numerics_fingerprint(numerics(on))
    fingerprints["precision"] = numerics_fingerprint(numerics(backbone("plain", torch.bfloat16)))
    fingerprints["backbone"] = numerics_fingerprint(numerics(backbone("clip")))
    assert len(set(fingerprints.values())) == len(fingerprints), fingerprints


@pytest.mark.parametrize("part", ["frozen", "stream", "adapter", "head"])
def test_the_probe_detects_arithmetic_changes_without_a_setting(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an older libm or another BLAS: the same settings, different bits."""
    before = numerics(FrozenBackbone(lively_vit(), "fresh", "hub"))
    owner, name = {
        "frozen": (FrozenBackbone, "embed"),
        "stream": (Family, "finish"),
        "adapter": (Adapter, "__call__"),
        "head": (Head, "__call__"),
    }[part]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: original(*arguments) * (1 + 2**-20))
    after = numerics(FrozenBackbone(lively_vit(), "fresh", "hub"))
    assert {key for key in before if before[key] != after[key]} == {"probe"}


PROGRAM = """
import json, sys
from addenda.combined import golden
from tests.support.models import backbone, family
from tests.support.places import ROOT

recorded = golden(backbone("dinov2"), family(backbone("dinov2"))["diamond"])
print(json.dumps([recorded.numerics, recorded.numerics_fingerprint, recorded.logits.tolist(), recorded.digest]))
"""


@pytest.mark.slow
def test_a_probe_made_by_other_kernels_is_a_numerics_change_within_the_tolerance() -> None:
    """Restricting this machine to its oldest instructions stands for another machine."""
    older = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    folder = ROOT
    command = [sys.executable, "-c", PROGRAM]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=older)
    described, fingerprint, logits, digest = json.loads(made.stdout.splitlines()[-1])
    on = backbone("dinov2")
    recorded = Golden(described, fingerprint, torch.tensor(logits), digest)
    (verdict,) = verify(on, [(family(on)["diamond"], [recorded])])
    assert verdict.ok, verdict.detail
    assert not verdict.same_numerics
