"""Damaged, forged and other files: each is rejected with a message, and nothing is imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save

from addenda.exceptions import IntegrityError, RegistryError
from addenda.registry import Registry, Task, canonical_json, digest
from addenda.registry.store.registration import derived
from tests.support.databases import refused, rows
from tests.support.registries import BACKBONE, a_statistic, a_task, probe
from tests.support.travel import FULL, states


def test_a_file_that_is_not_a_bundle_is_refused(here, sent, tmp_path):
    (tmp_path / "text").write_text("not a bundle\n" * 100)
    (tmp_path / "empty").touch()
    (tmp_path / "task").write_bytes(a_task().artifact)
    (tmp_path / "vast").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    before = rows(here.location)
    for name, error, message in (
        ("text", IntegrityError, "truncated or not a bundle"),
        ("empty", IntegrityError, "truncated or not a bundle"),
        ("vast", IntegrityError, "truncated or not a bundle"),
        ("task", IntegrityError, "it is not a bundle; `addenda tasks export` writes bundles"),
        ("none", RegistryError, "No such file"),
        ("", RegistryError, "Bundle '.*' cannot be imported"),
    ):
        with pytest.raises(error, match=message):
            here.import_bundle(tmp_path / name)
    assert rows(here.location) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("small")
    with Registry.open(folder / "tasks.db") as registry:
        registry.add_backbone(BACKBONE)
        task = a_task(memory=torch.zeros(2, 0, 8), pooled_weight=None)
        registry.register(task, probe(task))
        registry.export(["digits"], folder / "a.addenda")
    return (folder / "a.addenda").read_bytes()


@pytest.mark.slow
def test_every_byte_matters(registry, small, tmp_path):
    path, before = tmp_path / "a.addenda", rows(registry.location)
    for index in range(len(small)):
        for flip in (0x01, 0x20, 0xFF):
            path.write_bytes(small[:index] + bytes([small[index] ^ flip]) + small[index + 1 :])
            with pytest.raises(IntegrityError, match=r"Bundle .* cannot be imported"):
                registry.import_bundle(path)
    assert index > 2000
    assert rows(registry.location) == before
    path.write_bytes(small)
    assert states(registry.import_bundle(path)) == {"digits:1": "added"}


@pytest.mark.slow
def test_a_truncated_or_extended_bundle_is_refused(registry, small, tmp_path):
    path = tmp_path / "a.addenda"
    for data in [*(small[:length] for length in range(0, len(small), 7)), small + b"\0", small + small]:
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match=r"Bundle .* cannot be imported"):
            registry.import_bundle(path)
    assert registry.generation == 0


# -- forged bundles: every hash in them is right -----------------------------------------------------------------------


def forge(path: Path, source: Path, change: Callable[[dict[str, Any], dict[str, bytes]], Any]) -> Path:
    """Writes a bundle with changed contents and correct hashes."""
    with safe_open(source, "numpy") as file:
        blobs = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    manifest = json.loads(blobs.pop("manifest"))
    changed = change(manifest, blobs)
    data = changed if isinstance(changed, bytes) else canonical_json(manifest).encode()
    tensors = {name: np.frombuffer(blob, np.uint8) for name, blob in (blobs | {"manifest": data}).items()}
    save_file(tensors, path, metadata={"addenda": digest(data)})
    return path


def of(manifest: dict[str, Any], ref: str) -> dict[str, Any]:
    return next(e for e in manifest["tasks"] if f"{e['task']['name']}:{e['task']['version']}" == ref)


def swap(manifest: dict[str, Any], blobs: dict[str, bytes], ref: str, data: bytes) -> None:
    """Replaces a task's artifact."""
    blobs.pop(of(manifest, ref)["task"]["artifact"])
    of(manifest, ref)["task"]["artifact"] = digest(data)
    blobs[digest(data)] = data


def probe_of(manifest: dict[str, Any], blobs: dict[str, bytes], data: bytes) -> None:
    of(manifest, "old:1")["goldens"][0]["digest"] = digest(data)
    blobs[digest(data)] = data


def statistics_of(manifest: dict[str, Any], blobs: dict[str, bytes], data: bytes) -> None:
    of(manifest, "old:1")["statistics"] = digest(data)
    blobs[digest(data)] = data


def retask(manifest: dict[str, Any], blobs: dict[str, bytes], ref: str, task: Task) -> None:
    """Replaces a task's artifact, with a matching row and golden probe."""
    swap(manifest, blobs, ref, task.artifact)
    entry = of(manifest, ref)
    entry["task"] |= derived(task)
    entry["statistics"] = None
    data = np.zeros(len(task.labels), np.float32).tobytes()
    for golden in entry["goldens"]:
        golden["digest"] = digest(data)
    blobs[digest(data)] = data
    used = {"manifest"} | {name for e in manifest["tasks"] for name in blobs_of(e)}
    for name in set(blobs) - used:
        del blobs[name]


def blobs_of(entry: dict[str, Any]) -> set[str]:
    names = {entry["task"]["artifact"], *(golden["digest"] for golden in entry["goldens"])}
    return names | ({entry["statistics"]} if entry["statistics"] else set())


def of_many_labels(count: int) -> Task:
    head = {key: torch.zeros(count, 8) for key in ("head_weight", "pooled_weight")}
    labels = tuple(str(number).rjust(1000, "x") for number in range(count))
    return a_task("old", 7, labels=labels, head_bias=torch.zeros(count), **head)


def deep(manifest: dict[str, Any], depth: int) -> bytes:
    of(manifest, "old:1")["task"]["config"] = {"deep": "HERE"}
    return canonical_json(manifest).replace('"HERE"', "[" * depth + "]" * depth).encode()


def artifact_of(**changes: Any) -> bytes:
    """An artifact with a changed manifest."""
    tensors = {"head_weight": torch.zeros(3, 8), "head_bias": torch.zeros(3)}
    manifest = {
        "format": 1,
        "backbone": "b" * 64,
        "labels": ["a", "b", "c"],
        "objective": "single-label",
        "extends": [],
    }
    return bytes(save(tensors, metadata={"addenda": canonical_json(manifest | changes)}))


def nested(depth: int) -> bytes:
    """An artifact whose manifest is a deeply nested list."""
    tensors = {"head_weight": torch.zeros(3, 8), "head_bias": torch.zeros(3)}
    return bytes(save(tensors, metadata={"addenda": "[" * depth + "]" * depth}))


FORGERIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, bytes]], Any], str]] = {
    "another format": (lambda m, b: m.update(format=2), "it has format 2; this version reads 1. Upgrade Addenda"),
    "no JSON": (lambda m, b: b"[" * 100_000, "its manifest: Invalid JSON"),
    "no number": (lambda m, b: m.update(format="x"), "format: Input should be a valid integer"),
    "an unknown key": (lambda m, b: m.update(path="/etc/passwd"), "path: Extra inputs are not permitted"),
    "a blob in excess": (lambda m, b: b.update({"../../escape": b"x"}), "it has an unexpected blob '../../escape'"),
    "a blob too few": (lambda m, b: b.pop(of(m, "bare:1")["task"]["artifact"]) and None, "it lacks the blob '"),
    "a path for a name": (lambda m, b: of(m, "tip:1")["task"].update(name="../tip"), "'../tip' is not a valid name"),
    "a path for a sha256": (lambda m, b: of(m, "tip:1")["task"].update(artifact="../x"), "tasks.6.task.artifact: St"),
    "an invalid tag": (lambda m, b: of(m, "tip:1")["tags"].append("\x1b[31m"), "is not a valid tag"),
    "an invalid version": (lambda m, b: of(m, "tip:1")["task"].update(version=0), "greater than or equal to 1"),
    "an invalid time": (lambda m, b: of(m, "tip:1")["task"].update(created_at="now"), "created_at: String should"),
    "no golden probe": (lambda m, b: of(m, "tip:1")["goldens"].clear(), "goldens: List should have at least 1 item"),
    "two alike": (lambda m, b: of(m, "tip:1")["tags"].extend(["a", "a"]), "Bundle .* was not imported: .*tag"),
    "NaN": (lambda m, b: of(m, "tip:1")["task"]["config"].update(x=1) or canonical_json(m).replace('"x":1', '"x":NaN')
            .encode(), "its manifest is not valid: .*not JSON compliant"),
    "spaces": (lambda m, b: json.dumps(m, sort_keys=True).encode(), "its manifest is not in canonical form"),
    "NaN for a score": (lambda m, b: canonical_json(m).replace('"score":null', '"score":NaN').encode(), "score: Input"),
    "a parent after its child": (lambda m, b: m["tasks"].reverse(), "'tip:1' was not imported: it extends 'digits:1'"),
    "a parent of other content": (lambda m, b: of(m, "tip:1")["parents"][0].update(sha256="0" * 64), "come before it"),
    "parents in another order": (lambda m, b: of(m, "tip:1")["parents"].reverse(), "disagree on its parents"),
    "a parent too few": (lambda m, b: of(m, "tip:1")["parents"].pop(), "has a parent that its row lacks"),
    "a parent too many": (
        lambda m, b: of(m, "tip:1")["parents"].append(of(m, "digits:1")["parents"][0]), "disagree on its parents"),
    "a parent without a token": (
        lambda m, b: swap(m, b, "tip:1", a_task("tip", 4, parents=(BARE,)).artifact) or of(m, "tip:1").update(
            parents=[{"name": "bare", "version": 1, "sha256": BARE.sha256}]), "or a parent has no class token"),
    "other labels": (lambda m, b: of(m, "tip:1")["task"].update(labels=["a", "b", "c"]), "does not match its .*labels"),
    "another objective": (lambda m, b: of(m, "tip:1")["task"].update(objective="multi-label"), "not match .*objective"),
    "another backbone": (lambda m, b: of(m, "tip:1")["task"].update(backbone="c" * 64), "does not match .*backbone"),
    "another score": (lambda m, b: of(m, "tip:1")["task"].update(score=1.0), "row does not match .*: score"),
    "another size": (lambda m, b: of(m, "tip:1")["task"].update(num_parameters=1), "does not match .*num_parameters"),
    "invalid metrics": (lambda m, b: of(m, "tip:1")["task"].update(metrics={"test": 1}), "metrics are not valid"),
    "a version grown from nothing": (
        lambda m, b: of(m, "tip:1")["task"]["data"].update(grown_from={"version": "1"}), "not valid: grown_from"),
    "datasets that are no list": (
        lambda m, b: of(m, "tip:1")["task"]["data"].update(datasets=5), "data are not valid: datasets"),
    "no backbone": (lambda m, b: m["backbones"].clear(), "do not fit its backbone, or its backbone is missing"),
    "a backbone of other sizes": (lambda m, b: m["backbones"][0].update(depth=3), "tensors do not fit its backbone"),
    "a number too large": (lambda m, b: m["backbones"][0].update(depth=2**31), "depth: Input should be less than"),
    "an invalid artifact": (lambda m, b: swap(m, b, "tip:1", b"\x80\x04."), "'tip:1' .*: its artifact is not val"),
    "a golden probe too short": (lambda m, b: probe_of(m, b, b"1234"), "its golden probe does not have 3 logits"),
    "an empty golden probe": (lambda m, b: probe_of(m, b, b""), "its golden probe does not have 3 logits"),
    "probes that are infinite": (
        lambda m, b: probe_of(m, b, np.full(3, np.inf, np.float32).tobytes()), "'old:1' .*probe .* NaN or infin"),
    "probes with NaN": (
        lambda m, b: probe_of(m, b, np.full(3, np.nan, np.float32).tobytes()), "golden probe has .* NaN or infinite"),
    "a temperature that makes infinities": (
        lambda m, b: retask(m, b, "old:1", a_task("old", 7, temperature=1e-300)), "it must be between 1e-06 and 1e"),
    "a label of 20 MB": (
        lambda m, b: retask(m, b, "old:1", a_task("old", 7, labels=("a" * 20_000_000, "b", "c"))),
        "labels.0: String should have at most 1000 characters"),
    "labels of 5 MB": (
        lambda m, b: retask(m, b, "old:1", of_many_labels(5000)), "5,000 labels have 5,000,000 bytes in total"),
    "a label with NUL": (
        lambda m, b: retask(m, b, "old:1", a_task("old", 7, labels=("a\0", "b", "c"))), "contains a NUL character"),
    "3,000 memory tokens": (
        lambda m, b: retask(m, b, "old:1", a_task("old", 7, memory=torch.zeros(2, 3000, 8))),
        "has 3,000 memory tokens per layer; the maximum is 1,024"),
    "a reason with NUL": (lambda m, b: of(m, "old:1")["retirement"].update(reason="a\0b"), "contains a NUL character"),
    "a reserved name": (lambda m, b: of(m, "old:1")["task"].update(name="auto"), "The name 'auto' is reserved"),
    "brackets": (lambda m, b: deep(m, 100_000), "recursion limit|nested too deeply"),
    "fewer brackets": (lambda m, b: deep(m, 5_000), "recursion limit|nested too deeply"),
    "brackets within an artifact": (
        lambda m, b: swap(m, b, "old:1", nested(100_000)), "'old:1' .*its manifest is nested too deeply"),
    "an invalid date": (
        lambda m, b: of(m, "old:1")["task"].update(created_at="2026-02-30T00:00:00+00:00"), "created_at: Value error"),
    "a score of text": (
        lambda m, b: of(m, "old:1")["task"].update(metrics={"test": {"f1_micro": "0.9"}}), "not valid: test.f1_micro"),
    "a score beyond one": (
        lambda m, b: of(m, "old:1")["task"].update(metrics={"test": {"exact_match": 1e300}}), "valid: test.exact_m"),
    "a score beyond all floats": (
        lambda m, b: of(m, "old:1")["task"].update(metrics={"test": {"accuracy": 10**400}}), "valid"),
    "invalid curves": (
        lambda m, b: of(m, "old:1")["task"].update(metrics={"curves": [{"x": 1}]}), "not valid: curves.0.train_loss"),
    "a confusion of other classes": (
        lambda m, b: of(m, "old:1")["task"].update(metrics={"test": {"confusion": [[1]]}}), "is not 3 x 3"),
    "invalid evaluations": (
        lambda m, b: of(m, "digits:1")["evaluations"][0].update(metrics={"accuracy": -5.0}), "not valid: accuracy"),
    "a configuration of 2 MB": (
        lambda m, b: of(m, "old:1")["task"].update(config={"x": [[]] * 700_000}), "its config has 2,.* the maximum is"),
    "an author of 20 MB": (
        lambda m, b: of(m, "old:1")["task"].update(created_by="a" * 20_000_000), "created_by: .* at most 1000 char"),
    "a path of 20 MB": (
        lambda m, b: m["backbones"][0].update(source="a" * 20_000_000), "source: String should have at most 4096"),
    "an evaluation of a long fingerprint": (
        lambda m, b: of(m, "digits:1")["evaluations"][0].update(data_fingerprint="a" * 1001), "at most 1000 char"),
    "a golden probe of a long fingerprint": (
        lambda m, b: of(m, "old:1")["goldens"][0].update(numerics_fingerprint="a" * 1001), "at most 1000 char"),
    "2,000 tags": (
        lambda m, b: of(m, "old:1")["tags"].extend(map(str, range(2000))), "it has 2,000 tags; the maximum is 1,000"),
    "a probe of 100 images": (
        lambda m, b: probe_of(m, b, np.zeros(300, np.float32).tobytes()), "its golden probe does not have 3 logits"),
    "NUL in a version": (lambda m, b: of(m, "old:1")["task"].update(code_version="a\0"), "contains a NUL character"),
    "NUL in a backbone": (lambda m, b: m["backbones"][0].update(source="a\0"), "contains a NUL character"),
    "a backbone of no task": (
        lambda m, b: m["backbones"].append(m["backbones"][0] | {"fingerprint": "c" * 64}), "none of its tasks uses"),
    "statistics of another width": (
        lambda m, b: statistics_of(m, b, a_statistic(sample=torch.zeros(6, 3)).data), "3 dimensions, but its backbone"),
    "statistics of other numbers": (
        lambda m, b: statistics_of(m, b, a_statistic(sample_targets=torch.zeros(6)).data), "targets must be int64"),
    "statistics of complex numbers": (
        lambda m, b: statistics_of(m, b, a_statistic(counts=torch.zeros(3).to(torch.complex64)).data), "must be int64"),
    "labels that are one text": (
        lambda m, b: swap(m, b, "old:1", artifact_of(labels="abc")), "labels and parents must be lists of strings"),
    "invalid statistics": (lambda m, b: statistics_of(m, b, b"\x80\x04."), "its statistics are not valid"),
}  # fmt: skip
BARE: Task = a_task("bare", 5, class_token=None, memory=None, pooled_weight=None)


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_bundle_is_refused_with_a_message(here, sent, tmp_path, kind):
    change, message = FORGERIES[kind]
    with refused(here.location, RegistryError, match=message):
        here.import_bundle(forge(tmp_path / "forged.addenda", sent, change))


def test_what_a_bundle_adds_to_a_task_that_is_there_has_the_same_limits(here, sent, tmp_path):
    here.import_bundle(sent)
    path, (change, message) = tmp_path / "forged.addenda", FORGERIES["2,000 tags"]
    with refused(here.location, IntegrityError, match=message):
        here.import_bundle(forge(path, sent, change))

    def add_numerics(manifest, blobs):
        probes = of(manifest, "old:1")["goldens"]
        probes.append(probes[0] | {"numerics_fingerprint": "e" * 64, "numerics": {"x": "y" * 2_000_000}})

    with refused(here.location, IntegrityError, match="its golden probe 1 has 2,000,.* bytes"):
        here.import_bundle(forge(path, sent, add_numerics))


def test_an_unchanged_forgery_is_imported(here, sent, tmp_path):
    path = forge(tmp_path / "forged.addenda", sent, lambda manifest, blobs: None)
    assert path.read_bytes() == sent.read_bytes()
    assert set(states(here.import_bundle(path))) == FULL


def test_blobs_of_another_type_are_refused(here, sent, tmp_path):
    with safe_open(sent, "numpy") as file:
        blobs, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({name: blob.view(np.int8) for name, blob in blobs.items()}, tmp_path / "a.addenda", metadata=metadata)
    with pytest.raises(IntegrityError, match=r"its blob '.*' has dtype I8"):
        here.import_bundle(tmp_path / "a.addenda")
