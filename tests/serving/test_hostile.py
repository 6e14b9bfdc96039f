"""Hostile input: tasks with non-finite logits, other users' names, and requests meant to exhaust the server."""

from __future__ import annotations

import asyncio
import base64
import difflib
import json
import logging
import re
import socket
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import httpx2
import psutil
import pytest
import torch
from PIL import Image
from sqlalchemy import text as sql

from addenda import CombinedModel, FrozenBackbone, Registry, Task
from addenda.backbones import vit
from addenda.combined import feature_statistics, golden, predictions_of, tiles, verify
from addenda.exceptions import (
    IntegrityError,
    OwnershipError,
    RegistryError,
    RegistryFaultError,
    RegistryUnavailableError,
)
from addenda.registry.audit.faults import Fault
from addenda.registry.store import queries, registration
from addenda.registry.store.database import OUTAGES, database_errors, reading, writing
from addenda.serving import routes, server
from addenda.serving.api_tasks import UPLOADS
from addenda.serving.keys import KeyFile
from addenda.serving.service import Limits
from addenda.text import csv_row, shown
from tests.support.commands import Run
from tests.support.databases import Database, raw, tamper
from tests.support.inference import pictures, pixels
from tests.support.moments import until
from tests.support.places import ROOT
from tests.support.registries import BACKBONE, a_task, keep
from tests.support.servers import AppClient, ServedProcess, client_of
from tests.support.tasks import random_task

PREDICT = "/api/v1/predict"


def infinite(backbone: FrozenBackbone, name: str = "bad") -> Task:
    """A task with finite weights and infinite logits."""
    return replace(random_task(backbone, name), head_weight=torch.full((3, backbone.embed_dim), 3e38))


def registered_before(
    monkeypatch: pytest.MonkeyPatch, registry: Registry, backbone: FrozenBackbone, task: Task
) -> None:
    """Registers a task as earlier versions with fewer checks did."""
    with monkeypatch.context() as before:
        before.setattr(registration, "is_finite", lambda *_: True)
        before.setattr(registration, "check_bounds", lambda *_: None)
        registry.add_backbone(backbone.record())
        registry.register(task, golden(backbone, task))


# --- tasks with non-finite logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["weights", "temperature"])
def test_a_task_with_non_finite_predictions_cannot_be_registered(
    tiny: FrozenBackbone, registry: Registry, cause: str
) -> None:
    task = infinite(tiny) if cause == "weights" else replace(random_task(tiny, "bad"), temperature=1e-300)
    registry.add_backbone(tiny.record())
    with pytest.raises(RegistryError, match=r"Task 'bad'.* (NaN or infinite|temperature 1e-300)"):
        registry.register(task, golden(tiny, task))
    assert registry.tasks() == []


@pytest.mark.parametrize("cause", ["weights", "temperature"])
def test_a_registered_task_with_non_finite_predictions_is_quarantined_and_the_others_are_served(
    tiny: FrozenBackbone,
    registry: Registry,
    registered: Callable[..., Task],
    monkeypatch: pytest.MonkeyPatch,
    cause: str,
) -> None:
    registered("good")
    task = infinite(tiny) if cause == "weights" else replace(random_task(tiny, "bad"), temperature=1e-300)
    registered_before(monkeypatch, registry, tiny, task)
    (verdict,) = verify(tiny, [(registry.get("bad"), registry.goldens("bad"))])
    assert not verdict.ok
    with client_of(tiny, registry) as client:
        status = client.get("/api/v1/status").json()
        assert list(status["tasks"]) == ["good"]
        assert "NaN or infinite" in status["quarantined"]["bad:1"]
        prediction = client.post(PREDICT, content=pictures(1)[0])
        assert list(prediction.json()["tasks"]) == ["good"]
        response = client.post("/v2/models/combined/infer", json={"inputs": pixels(0.5)})
        assert response.status_code == 200


def test_a_task_that_fails_for_some_images_is_named_and_the_others_predict(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("good")
    registered_before(monkeypatch, registry, tiny, infinite(tiny))
    # As if the golden probes were finite.
    monkeypatch.setattr(import_module("addenda.combined.golden"), "is_finite", lambda *_: True)
    with client_of(tiny, registry) as client:
        image = pictures(1)[0]
        rejected = client.post(PREDICT, content=image)
        assert rejected.status_code == 422
        assert "Task 'bad:1' gives logits or probabilities that are NaN or infinite" in rejected.json()["detail"]
        assert client.post(f"{PREDICT}?tasks=good", content=image).status_code == 200
        inputs = [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(image).decode()]}]
        assert client.post("/v2/models/combined/infer", json={"inputs": inputs}).status_code == 422
        assert client.post("/v2/models/good/infer", json={"inputs": inputs}).status_code == 200


def test_a_faulty_task_is_not_reported_as_invalid_pixels_and_large_logits_are_accepted(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("good")
    large = replace(random_task(tiny, "large"), head_bias=torch.tensor([1e31, 0.0, 0.0]))
    registry.register(large, golden(tiny, large))
    request = {"inputs": pixels(0.5)}
    with client_of(tiny, registry) as client:
        assert client.post("/v2/models/combined/infer", json=request).status_code == 200
    registered_before(monkeypatch, registry, tiny, infinite(tiny))
    monkeypatch.setattr(import_module("addenda.combined.golden"), "is_finite", lambda *_: True)
    with client_of(tiny, registry) as client:
        rejected = client.post("/v2/models/combined/infer", json=request)
        assert (rejected.status_code, "'bad:1'" in rejected.json()["detail"]) == (422, True)


def test_routing_works_beside_a_task_with_non_finite_logits(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add_backbone(tiny.record())
    features = torch.randn(40, tiny.embed_dim)
    statistics = feature_statistics(features, torch.arange(40) % 3, 3)
    good, bad = random_task(tiny, "good"), infinite(tiny)
    registry.register(good, golden(tiny, good), statistics)
    other = replace(statistics, sums=statistics.sums[:, :5], gram=statistics.gram[:15], sample=statistics.sample[:, :3])
    odd = random_task(tiny, "odd", seed=2)
    registry.register(odd, golden(tiny, odd), other)  # of other features: excluded from routing
    registered_before(monkeypatch, registry, tiny, bad)
    monkeypatch.setattr(import_module("addenda.combined.golden"), "is_finite", lambda *_: True)
    with client_of(tiny, registry) as client:
        response = client.post(f"{PREDICT}?task=auto", content=pictures(1)[0])
        assert response.status_code == 200, response.text
        assert response.json()["chosen"]["task"] == "good"


def test_a_task_of_another_width_is_quarantined(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]
) -> None:
    """A bundle can bring such a task to a registry that does not know the backbone."""
    registered("good")
    narrow = Task(
        name="narrow",
        backbone=tiny.fingerprint,
        labels=("a", "b"),
        head_weight=torch.zeros(2, 5),
        head_bias=torch.zeros(2),
    )
    probe = golden(tiny, random_task(tiny, "x", classes=2))
    registry.register(narrow, probe)
    with client_of(tiny, registry) as client:
        status = client.get("/api/v1/status").json()
    assert list(status["tasks"]) == ["good"]
    assert "its features have 5 dimensions" in status["quarantined"]["narrow:1"]


def test_only_the_task_with_an_unexpected_error_is_quarantined(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good", "bad", "better"):
        registered(name)
    snapshots = import_module("addenda.serving.snapshot")
    real = snapshots.verdicts

    def failing(model: CombinedModel, recorded: Any) -> Any:
        if any(task.name == "bad" for task, _ in recorded):
            raise RuntimeError("shapes")
        return real(model, recorded)

    monkeypatch.setattr(snapshots, "verdicts", failing)
    with client_of(tiny, registry) as client:
        status = client.get("/api/v1/status").json()
    assert (sorted(status["tasks"]), status["quarantined"]) == (["better", "good"], {"bad:1": "shapes"})


def test_non_finite_predictions_raise(tiny: FrozenBackbone) -> None:
    task, good = infinite(tiny), random_task(tiny, "good")
    logits = CombinedModel(tiny, [good, task])(torch.randn(2, 3, 32, 32))
    with pytest.raises(IntegrityError, match=r"Task 'bad' gives .* addenda tasks retire bad"):
        predictions_of([good, task], logits)
    assert len(predictions_of([good], logits)["good"]) == 2


def test_a_task_with_too_many_ancestors_is_rejected(tiny: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "MAX_ANCESTORS", 2)
    line = [random_task(tiny, "a0", memory=0)]
    for number in range(1, 4):
        line.append(random_task(tiny, f"a{number}", memory=0, parents=(line[-1],)))
    registration.check_bounds(line[2])
    with pytest.raises(RegistryError, match=r"Task 'a3' has 3 ancestors; the maximum is 2"):
        registration.check_bounds(line[3])


# --- texts ------------------------------------------------------------------------------------------------------------

TRICK = "fine\x1b[1A\x1b[2K\u202egnihton\u2066 \x9b31m\r\x00"


def test_terminal_control_sequences_are_escaped() -> None:
    assert shown(TRICK) == r"fine\x1b[1A\x1b[2K\u202egnihton\u2066 \x9b31m\r\x00"
    plain = "Ünïcödé, 漢字, 👩‍👩‍👧, עברית, tab none"
    assert shown(plain) == plain


def test_csv_cells_are_not_formulas_and_numbers_stay_numbers() -> None:
    row = ["=HYPERLINK(1)", "+1", "-2.5", "@SUM", "-bird", "cat", 0.5, "a\nb"]
    assert csv_row(row) == ["'=HYPERLINK(1)", "+1", "-2.5", "'@SUM", "'-bird", "cat", 0.5, r"a\nb"]


def test_notes_reasons_and_labels_are_escaped_in_a_terminal_and_unchanged_in_json(
    run: Run, tiny: FrozenBackbone, registered: Callable[..., Task], registry: Registry
) -> None:
    trick = TRICK.replace("\x00", "")
    registered("plain")
    registry.note("plain", trick)
    registry.add_backbone(tiny.record())
    task = replace(random_task(tiny, "labelled"), labels=(trick, "=cmd|' /C calc'!A0", "c"))
    registry.register(task, golden(tiny, task))
    registry.retire("plain", trick)
    for command in (("db", "log"), ("tasks", "show", "labelled"), ("tasks", "show", "plain:1"), ("tasks", "list", "*")):
        out = run(*command).out
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066]", out), command
    assert r"\x1b[1A" in run("db", "log").out
    assert json.loads(run("db", "log", "--json").out)[-1]["details"]["reason"] == trick


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_notes_and_reasons_that_no_database_can_store_are_rejected(full_book: Registry, text: str) -> None:
    generation = full_book.generation
    for change in (lambda: full_book.note("digits", text), lambda: full_book.retire("digits", text)):
        with pytest.raises(
            RegistryError, match=r"The (note|reason) (contains a NUL character|cannot be encoded as UTF-8)"
        ):
            change()
    assert full_book.generation == generation


def test_an_invalid_task_name_is_detected_by_backup_and_verification(full_book: Registry, tmp_path: Path) -> None:
    tamper(full_book, "task", "UPDATE task SET name = '../strokes' WHERE name = 'strokes'")
    report = full_book.check_integrity()
    assert Fault("../strokes:1", "has an invalid name") in report.faults
    with pytest.raises(IntegrityError, match=r"damaged"):
        full_book.backup(tmp_path / "copy.db")


# --- ownership of names -----------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(tiny: FrozenBackbone, tmp_path: Path) -> Callable[..., bytes]:
    """Creates bundles of task versions."""

    @cache
    def bundle(name: str, versions: int = 1, seed: int = 0) -> bytes:
        folder = tmp_path / f"{name}-{versions}-{seed}"
        folder.mkdir()
        with Registry.open(folder / "tasks.db") as registry:
            registry.add_backbone(tiny.record())
            for number in range(versions):
                task = random_task(tiny, name, seed=seed + number)
                registry.register(task, golden(tiny, task), new_version=True)
            registry.tag(f"{name}:1", "theirs")
            registry.export([f"{name}:{versions}"], folder / "a.addenda")
        return (folder / "a.addenda").read_bytes()

    return bundle


def test_a_register_key_adds_versions_only_to_its_own_names(
    tiny: FrozenBackbone,
    registry: Registry,
    registered: Callable[..., Task],
    theirs: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    registered("birds")
    keys = KeyFile(tmp_path / "keys.json")
    headers = {
        name: {"Authorization": f"Bearer {keys.create(name, scope)}"}
        for name, scope in (("ann", "register"), ("bob", "register"), ("chief", "admin"))
    }
    with client_of(tiny, registry, keys) as client:

        def send(user: str, bundle: bytes) -> Any:
            return client.post("/api/v1/tasks", content=bundle, headers=headers[user])

        rejected = send("ann", theirs("birds", 2, seed=5))
        assert rejected.status_code == 403
        assert (
            "'birds:2' cannot be imported: key ann did not register all versions of this name"
            in rejected.json()["detail"]
        )
        assert client.get("/api/v1/tasks/birds", headers=headers["ann"]).json()["ref"] == "birds:1"
        assert send("ann", theirs("fish")).status_code == 201
        assert send("ann", theirs("fish", 2)).status_code == 201
        assert send("bob", theirs("fish", 3)).status_code == 403
        assert send("chief", theirs("fish", 3)).status_code == 201
        assert send("ann", theirs("fish", 4)).status_code == 403  # another key has added a version
    assert [record.ref for record in registry.tasks()] == ["birds:1", "fish:1", "fish:2", "fish:3"]


def test_another_keys_existing_task_gets_neither_tags_nor_probes(
    tiny: FrozenBackbone, registry: Registry, theirs: Callable[..., bytes], tmp_path: Path
) -> None:
    path = tmp_path / "fish.addenda"
    registry.add_backbone(tiny.record())
    path.write_bytes(theirs("fish"))
    registry.on_behalf_of("key ann").import_bundle(path, owner="key ann")
    registry.untag("fish:1", "theirs")
    generation = registry.generation
    registry.on_behalf_of("key bob").import_bundle(path, owner="key bob")
    assert (registry.generation, registry.record("fish:1").tags) == (generation, ())
    registry.on_behalf_of("key ann").import_bundle(path, owner="key ann")
    assert registry.record("fish:1").tags == ("theirs",)
    path.write_bytes(theirs("fish", 2))
    with pytest.raises(OwnershipError):
        registry.import_bundle(path, owner="key bob")


def test_a_register_key_cannot_add_a_backbone(
    tiny: FrozenBackbone, registry: Registry, theirs: Callable[..., bytes], tmp_path: Path
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    headers = [{"Authorization": f"Bearer {keys.create(scope, scope)}"} for scope in ("register", "admin")]
    with client_of(tiny, registry, keys) as client:
        responses = [client.post("/api/v1/tasks", content=theirs("fish"), headers=each) for each in headers]
    assert [response.status_code for response in responses] == [403, 201]
    assert "is not registered, and key register may not add backbones" in responses[0].json()["detail"]


def test_idempotency_keys_are_separate_for_each_api_key(
    tiny: FrozenBackbone,
    registry: Registry,
    registered: Callable[..., Task],
    theirs: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    registered("birds")
    keys = KeyFile(tmp_path / "keys.json")
    with client_of(tiny, registry, keys) as client:
        for user, name in (("ann", "fish"), ("bob", "frogs")):
            headers = {"Authorization": f"Bearer {keys.create(user, 'register')}", "Idempotency-Key": "1"}
            for _ in range(2):
                assert client.post("/api/v1/tasks", content=theirs(name), headers=headers).status_code == 201


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_request_larger_than_the_queue_is_413_and_not_503(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]
) -> None:
    registered("good")
    with client_of(tiny, registry, limits=Limits(waiting_images=2)) as client:
        inputs = [{"name": "pixel_values", "shape": [3, 3, 32, 32], "datatype": "FP32", "data": [0.5] * 3 * 3072}]
        rejected = client.post("/v2/models/combined/infer", json={"inputs": inputs})
    assert rejected.status_code == 413
    assert "3 images; the queue holds at most 2" in rejected.json()["detail"]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v2/health/ready", "/metrics", "/api/v1/status", "/none", "/"])
def test_head_has_the_status_and_content_type_of_get(client: AppClient, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers.get("content-type") == get.headers.get("content-type")


def test_head_of_the_events_ends(client: AppClient) -> None:
    assert client.head("/api/v1/events").status_code == 200


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Any:
    registered("good")
    with client_of(tiny, registry) as opened:
        yield opened


def test_unknown_methods_share_one_metric_label(client: AppClient) -> None:
    for number in range(50):
        assert client.request(f"MADE{number}", "/livez").status_code == 405
        assert client.request(f"MADE{number}", f"/x{number}").status_code == 404
    series = [line for line in client.get("/metrics").text.splitlines() if line.startswith("addenda_requests_total{")]
    assert [line for line in series if "MADE" in line] == []
    assert len([line for line in series if 'method="other"' in line]) == 2


def test_an_unknown_name_is_compared_with_few_known_ones(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        registered(f"task-{number:02d}", memory=0, classes=2)
    monkeypatch.setattr(queries, "MAX_CANDIDATES", 4)
    with client_of(tiny, registry) as client:
        snapshot = client.app.state.service.snapshot
        iterated: list[str] = []

        class Tasks(dict[str, Task]):
            def __iter__(self) -> Any:
                for name in super().__iter__():
                    iterated.append(name)
                    yield name

        snapshot.model.tasks = Tasks(snapshot.model.tasks)
        for path in ("/v2/models/unknown", "/v2/models/unknown/ready"):
            assert "and 22 more" in client.get(path).json()["detail"]
        assert client.post(f"{PREDICT}?tasks=unknown", content=pictures(1)[0]).status_code == 404
        assert 0 < len(iterated) <= 30
        compared: list[list[str]] = []
        monkeypatch.setattr(difflib, "get_close_matches", lambda name, known, **_: compared.append(known) or [])
        assert client.get("/api/v1/tasks/task-0x").status_code == 404
    assert compared == [["task-00", "task-01", "task-02", "task-03"]]


def test_all_bodies_share_a_memory_limit_and_release_it(client: AppClient) -> None:
    app: Any = client.app
    app.state.bodies.limit = 10_000
    small, large = pictures(1)[0], b"x" * 20_000
    for _ in range(5):
        rejected = client.post(PREDICT, content=large)
        assert (rejected.status_code, rejected.headers["Retry-After"]) == (503, "1")
        assert client.post(PREDICT, content=small).status_code == 200
        assert client.post(PREDICT, content=b"junk").status_code == 400
    assert app.state.bodies.used == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/api/v1/tasks/digits/aliases/x"), ("POST", "/api/v1/tasks"), ("POST", PREDICT), ("POST", "/login")],
)
def test_no_body_is_read_before_the_key_is_checked(
    tiny: FrozenBackbone, registered: Callable[..., Task], registry: Registry, tmp_path: Path, method: str, path: str
) -> None:
    registered("digits")
    keys = KeyFile(tmp_path / "keys.json")
    keys.create("shop", "predict")
    read = []

    def body() -> Iterator[bytes]:
        for _ in range(100):
            read.append(True)
            yield b" " * 2**16

    with client_of(tiny, registry, keys) as client:
        response = client.request(method, path, content=body(), headers={"Content-Type": "application/json"})
        assert response.status_code == (413 if path == "/login" else 401)
        large = client.request(method, path, content=b"", headers={"Content-Length": str(300 * 2**20)})
        assert large.status_code in (401, 413)
        metrics = client.app.state.metrics.registry
        assert not [s for m in metrics.collect() for s in m.samples if s.labels.get("status") == "500"]


def test_a_jpeg_of_very_many_scans_is_rejected_before_it_is_decoded(client: AppClient) -> None:
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    assert client.post(PREDICT, content=content).status_code == 200
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    bomb = content[:-2] + 200 * last_scan + content[-2:]
    response = client.post(PREDICT, content=bomb)
    assert response.status_code == 413
    assert "more than 100 scans" in response.json()["detail"]


def test_a_bundle_is_streamed_to_a_file(client: AppClient, theirs: Callable[..., bytes]) -> None:
    app: Any = client.app
    app.state.bodies.limit = 100
    assert client.post("/api/v1/tasks", content=theirs("fish")).status_code == 201
    app.state.service.limits = replace(app.state.service.limits, bundle_bytes=100)
    assert client.post("/api/v1/tasks", content=theirs("fish", 2)).status_code == 413


def test_a_full_queue_rejects_requests_before_their_bodies_are_read(
    client: AppClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: Any = client.app
    monkeypatch.setattr(routes, "_chunks", lambda *_: pytest.fail("the body was read"))
    with app.state.service.batcher.reserve(app.state.service.limits.waiting_images):
        for path in (PREDICT, "/v2/models/combined/infer"):
            assert client.post(path, content=b"x").status_code == 503


def test_a_full_queue_rejects_attention_requests_before_their_bodies_are_read(
    client: AppClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: Any = client.app
    monkeypatch.setattr(routes, "_chunks", lambda *_: pytest.fail("the body was read"))
    with app.state.service.batcher.reserve(app.state.service.limits.waiting_images):
        assert client.post("/page/attention?task=good", content=b"x").status_code == 503


def test_a_failure_is_counted_and_has_a_request_id(client: AppClient, monkeypatch: pytest.MonkeyPatch) -> None:
    app: Any = client.app
    monkeypatch.setattr(type(app.state.service), "snapshot", property(lambda self: 1 / 0))
    failed = client.get("/api/v1/status")
    monkeypatch.undo()
    assert failed.status_code == 500
    assert failed.headers["x-request-id"] == failed.json()["request_id"]
    assert 'addenda_requests_total{method="GET",route="/api/v1/status",status="500"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("cause", ["disk", "folder"])
def test_a_full_disk_or_missing_folder_is_503(
    client: AppClient, theirs: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    bundle, app = theirs("fish"), client.app
    with monkeypatch.context() as patch:
        if cause == "folder":
            patch.setattr("tempfile.tempdir", "/nowhere/at/all")
        else:
            patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        rejected = client.post("/api/v1/tasks", content=bundle)
    assert rejected.status_code == 503
    assert "a full disk or a missing folder" in rejected.json()["detail"]
    assert app.state.uploads._value == UPLOADS
    assert client.post("/api/v1/tasks", content=bundle).status_code == 201


def test_the_number_of_concurrent_uploads_is_limited(client: AppClient, theirs: Callable[..., bytes]) -> None:
    app: Any = client.app
    app.state.uploads = asyncio.Semaphore(0)
    assert client.post("/api/v1/tasks", content=theirs("fish")).status_code == 503
    app.state.uploads = asyncio.Semaphore(UPLOADS)


@pytest.mark.slow
def test_clients_that_do_not_read_are_disconnected_and_slow_readers_are_not(
    tiny: FrozenBackbone, glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    class Impatient(ServedProcess):
        module = "tests.support.impatient"

    with Registry.open(tmp_path / "tasks.db") as registry:
        registry.add_backbone(glyphs.record())
        task = random_task(glyphs, "wide", classes=30_000)
        registry.register(task, golden(glyphs, task))
    times = {"HEAD_S": "5", "BODY_S": "5", "READ_S": "1", "PYTHONPATH": str(ROOT)}
    with Impatient(tmp_path / "tasks.db", tmp_path, **times) as served:
        address = urlsplit(served.url)
        num_bytes = len(httpx2.get(f"{served.url}/api/v1/tasks/wide", timeout=30).content)
        assert num_bytes > 300_000
        request = b"GET /api/v1/tasks/wide HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

        def connect() -> socket.socket:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(30)
            connection.connect((address.hostname, address.port))
            return connection

        def num_readable_bytes(connection: socket.socket) -> int:
            """Reads what is left of a connection that the server has closed."""
            received = 0
            with suppress(ConnectionResetError):
                while chunk := connection.recv(2**16):
                    received += len(chunk)
            return received

        stuck = [connect() for _ in range(10)]
        for connection in stuck:
            connection.sendall(request * 40)  # more than the system's buffers hold
        slow = connect()
        slow.sendall(request)
        received = 0
        while received < num_bytes:  # slower than the network, but always reading
            received += len(slow.recv(2**16))
            time.sleep(0.02)
        # They are checked every second. Reading from one before it is disconnected would set it free.
        ports, process = {connection.getsockname()[1] for connection in stuck}, psutil.Process(served.process.pid)

        def connected() -> set[int]:
            return ports & {each.raddr.port for each in process.net_connections() if each.raddr}

        until(lambda: not connected(), "they are disconnected", 300)
        assert all(num_readable_bytes(connection) < 40 * num_bytes for connection in stuck)
        for connection in (*stuck, slow):
            connection.close()


def test_every_line_of_the_log_is_json(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root, hooks = logging.getLogger(), (threading.excepthook, sys.unraisablehook)
    handlers, level, showwarning = root.handlers[:], root.level, warnings.showwarning
    try:
        server.log_as_json("info")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)
            warnings.warn("a library says\nso", stacklevel=1)
        failing = threading.Thread(target=lambda: 1 / 0)
        failing.start()
        failing.join()
        lines = capfd.readouterr().err.splitlines()
    finally:
        logging.captureWarnings(False)
        root.handlers[:], warnings.showwarning = handlers, showwarning
        root.setLevel(level)
        threading.excepthook, sys.unraisablehook = hooks
    records = [json.loads(line) for line in lines]
    assert "a library says" in records[0]["message"]
    assert "ZeroDivisionError" in records[1]["traceback"]


# --- outages and internal faults --------------------------------------------------------------------------------------


def test_an_invalid_statement_is_not_an_outage(full_book: Registry) -> None:
    with pytest.raises(RegistryError) as wrong, reading(full_book._engine) as connection:
        connection.execute(sql("SELECT nothing FROM task"))
    assert isinstance(wrong.value, RegistryFaultError)
    with pytest.raises(RegistryError) as wrong, database_errors("It"), writing(full_book._engine) as connection:
        connection.execute(sql("INSERT INTO nowhere VALUES (1)"))
    assert isinstance(wrong.value, RegistryFaultError)


def test_a_damaged_schema_is_500_and_logged(
    client: AppClient, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with raw(registry.location) as connection:
        connection.execute(sql("ALTER TABLE task RENAME COLUMN score TO points"))
    failed = client.get("/api/v1/tasks")
    assert failed.status_code == 500
    assert "no such column" in caplog.text


def test_a_read_only_database_is_an_outage(database: Database) -> None:
    with Registry.open(location := database.new()) as opened:
        opened.add_backbone(BACKBONE)
    if database.kind == "sqlite":
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY
        with pytest.raises(RegistryUnavailableError), database_errors("It"):
            raise error
        return
    standby = f"{location}{'&' if '?' in location else '?'}options=-c%20default_transaction_read_only%3Don"
    with Registry.open(standby) as opened, pytest.raises(RegistryUnavailableError, match="read-only transaction"):
        keep(opened, a_task())


def test_sqlite_outages_are_recognized_by_their_codes(registry: Registry) -> None:
    for code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        assert code in OUTAGES
        error = sqlite3.OperationalError("something")
        error.sqlite_errorcode = code | 0x100
        with pytest.raises(RegistryUnavailableError), database_errors("It"):
            raise error


@pytest.mark.parametrize("error", [TypeError("ours"), ValueError("ours"), OverflowError("ours")])
def test_internal_errors_are_not_reported_as_database_errors(full_book: Registry, error: Exception) -> None:
    with pytest.raises(type(error), match=r"^ours$"), database_errors("It"), writing(full_book._engine):
        raise error
    with pytest.raises(type(error), match=r"^ours$"), reading(full_book._engine):
        raise error


@pytest.mark.parametrize("metrics", [{"x": {1, 2}}, {"x": float("nan")}, {"x": "\ud800"}])
def test_values_that_no_database_can_store_are_rejected(full_book: Registry, metrics: dict[str, Any]) -> None:
    with pytest.raises(RegistryError, match=r"was not recorded: .* Nothing was changed"):
        full_book.add_evaluation("digits", "d", "n", metrics, "l")


@pytest.mark.parametrize(
    "location", [":memory:", "sqlite:///:memory:", "file:tasks.db?mode=memory", "sqlite:///tasks.db?mode=ro"]
)
def test_an_unsupported_location_is_rejected_and_nothing_is_created(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegistryError, match=r"cannot be a registry|An SQLite URL takes no query parameters"):
        Registry.open(location)
    assert list(tmp_path.iterdir()) == []


# --- memory -----------------------------------------------------------------------------------------------------------


def test_captured_projection_outputs_are_released(tiny: FrozenBackbone) -> None:
    assert isinstance(tiny.family, vit.VisionTransformerFamily)
    images = torch.randn(2, 3, 32, 32)
    for _ in tiny.stream(images):
        pass
    tiny.backbone_logits(images)
    assert [name for name, value in vars(tiny.family._captured).items() if isinstance(value, torch.Tensor)] == []


def test_tiles_are_accessed_under_a_lock(tiny: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[bool] = []

    class Watched(WeakValueDictionary[object, tiles.Tile]):
        def values(self) -> Any:
            locked.append(tiles._LOCK.locked())
            return super().values()

        def __setitem__(self, key: object, value: tiles.Tile) -> None:
            locked.append(tiles._LOCK.locked())
            super().__setitem__(key, value)

    store = tiles.TileStore(tiny)
    store._tiles = Watched()
    tiles.Layout(store, [random_task(tiny, "a"), random_task(tiny, "b", seed=1)])
    assert len(locked) > 2
    assert all(locked)
