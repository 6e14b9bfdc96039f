"""What strangers send: tasks whose answers are no numbers, names that are others', and requests made to wear out."""

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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import httpx2
import pytest
import torch
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
from addenda.serving import bodies, server
from addenda.serving.api_changes import UPLOADS
from addenda.serving.keys import KeyFile
from addenda.serving.service import Limits
from addenda.text import csv_row, shown
from tests.support.commands import Run
from tests.support.databases import Database, raw, tamper
from tests.support.inference import pictures, pixels
from tests.support.places import ROOT
from tests.support.registries import BACKBONE, a_task, keep
from tests.support.servers import AppClient, ServedProcess, client_of
from tests.support.tasks import random_task

PREDICT = "/api/v1/predict"


def infinite(backbone: FrozenBackbone, name: str = "bad") -> Task:
    """A task of finite weights whose logits are not."""
    return replace(random_task(backbone, name), head_weight=torch.full((3, backbone.embed_dim), 3e38))


def registered_before(
    monkeypatch: pytest.MonkeyPatch, registry: Registry, backbone: FrozenBackbone, task: Task
) -> None:
    """Registers a task as versions did that looked at less."""
    with monkeypatch.context() as before:
        before.setattr(registration, "is_finite", lambda *_: True)
        before.setattr(registration, "check_bounds", lambda *_: None)
        registry.add_backbone(backbone.record())
        registry.register(task, golden(backbone, task))


# --- tasks whose answers are no numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["weights", "temperature"])
def test_a_task_that_answers_no_numbers_is_refused_when_it_is_registered(
    tiny: FrozenBackbone, registry: Registry, how: str
) -> None:
    task = infinite(tiny) if how == "weights" else replace(random_task(tiny, "bad"), temperature=1e-300)
    registry.add_backbone(tiny.record())
    with pytest.raises(RegistryError, match=r"Task 'bad'.* (NaN or infinite|temperature 1e-300)"):
        registry.register(task, golden(tiny, task))
    assert registry.tasks() == []


@pytest.mark.parametrize("how", ["weights", "temperature"])
def test_one_that_is_there_is_quarantined_and_the_others_are_served(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    registered("good")
    task = infinite(tiny) if how == "weights" else replace(random_task(tiny, "bad"), temperature=1e-300)
    registered_before(monkeypatch, registry, tiny, task)
    (verdict,) = verify(tiny, [(registry.get("bad"), registry.goldens("bad"))])
    assert not verdict.ok
    with client_of(tiny, registry) as client:
        status = client.get("/api/v1/status").json()
        assert list(status["tasks"]) == ["good"]
        assert "NaN or infinite" in status["quarantined"]["bad:1"]
        answer = client.post(PREDICT, content=pictures(1)[0])
        assert list(answer.json()["tasks"]) == ["good"]
        asked = client.post("/v2/models/combined/infer", json={"inputs": pixels(0.5)})
        assert asked.status_code == 200


def test_one_that_fails_for_some_images_is_named_and_the_others_answer(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("good")
    registered_before(monkeypatch, registry, tiny, infinite(tiny))
    # As if the probes had shown nothing.
    monkeypatch.setattr(import_module("addenda.combined.golden"), "is_finite", lambda *_: True)
    with client_of(tiny, registry) as client:
        image = pictures(1)[0]
        refused = client.post(PREDICT, content=image)
        assert refused.status_code == 422
        assert "Task 'bad:1' gives logits or probabilities that are NaN or infinite" in refused.json()["detail"]
        assert client.post(f"{PREDICT}?tasks=good", content=image).status_code == 200
        inputs = [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(image).decode()]}]
        assert client.post("/v2/models/combined/infer", json={"inputs": inputs}).status_code == 422
        assert client.post("/v2/models/good/infer", json={"inputs": inputs}).status_code == 200


def test_pixels_are_not_blamed_for_a_task_nor_large_logits_for_being_infinite(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("good")
    large = replace(random_task(tiny, "large"), head_bias=torch.tensor([1e31, 0.0, 0.0]))
    registry.register(large, golden(tiny, large))
    asked = {"inputs": pixels(0.5)}
    with client_of(tiny, registry) as client:
        assert client.post("/v2/models/combined/infer", json=asked).status_code == 200
    registered_before(monkeypatch, registry, tiny, infinite(tiny))
    monkeypatch.setattr(import_module("addenda.combined.golden"), "is_finite", lambda *_: True)
    with client_of(tiny, registry) as client:
        refused = client.post("/v2/models/combined/infer", json=asked)
        assert (refused.status_code, "'bad:1'" in refused.json()["detail"]) == (422, True)


def test_one_task_that_answers_no_numbers_does_not_end_the_choosing_of_tasks(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add_backbone(tiny.record())
    features = torch.randn(40, tiny.embed_dim)
    kept = feature_statistics(features, torch.arange(40) % 3, 3)
    good, bad = random_task(tiny, "good"), infinite(tiny)
    registry.register(good, golden(tiny, good), kept)
    other = replace(kept, sums=kept.sums[:, :5], gram=kept.gram[:15], sample=kept.sample[:, :3])
    odd = random_task(tiny, "odd", seed=2)
    registry.register(odd, golden(tiny, odd), other)  # of another kind of feature: left out of the choice
    registered_before(monkeypatch, registry, tiny, bad)
    monkeypatch.setattr(import_module("addenda.combined.golden"), "is_finite", lambda *_: True)
    with client_of(tiny, registry) as client:
        answer = client.post(f"{PREDICT}?task=auto", content=pictures(1)[0])
        assert answer.status_code == 200, answer.text
        assert answer.json()["chosen"]["task"] == "good"


def test_a_task_of_another_width_is_quarantined(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]
) -> None:
    """As a bundle may bring it that says so of its backbone, to a registry that does not know this one."""
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
    assert "reads features of 5 dimensions" in status["quarantined"]["narrow:1"]


def test_a_task_that_fails_in_a_way_that_nobody_foresaw_is_quarantined_alone(
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


def test_a_prediction_that_is_no_number_is_no_answer(tiny: FrozenBackbone) -> None:
    task, good = infinite(tiny), random_task(tiny, "good")
    logits = CombinedModel(tiny, [good, task])(torch.randn(2, 3, 32, 32))
    with pytest.raises(IntegrityError, match=r"Task 'bad' gives .* addenda tasks retire bad"):
        predictions_of([good, task], logits)
    assert len(predictions_of([good], logits)["good"]) == 2


def test_a_task_that_sees_too_many_is_refused(tiny: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "MAX_ANCESTORS", 2)
    line = [random_task(tiny, "a0", memory=0)]
    for number in range(1, 4):
        line.append(random_task(tiny, f"a{number}", memory=0, parents=(line[-1],)))
    registration.check_bounds(line[2])
    with pytest.raises(RegistryError, match=r"Task 'a3' has 3 ancestors; the maximum is 2"):
        registration.check_bounds(line[3])


# --- texts ------------------------------------------------------------------------------------------------------------

TRICK = "fine\x1b[1A\x1b[2K\u202egnihton\u2066 \x9b31m\r\x00"


def test_what_a_terminal_would_obey_is_shown_as_an_escape() -> None:
    assert shown(TRICK) == r"fine\x1b[1A\x1b[2K\u202egnihton\u2066 \x9b31m\r\x00"
    plain = "Ünïcödé, 漢字, 👩‍👩‍👧, עברית, tab none"
    assert shown(plain) == plain


def test_a_cell_of_csv_is_no_formula_and_a_number_stays_one() -> None:
    row = ["=HYPERLINK(1)", "+1", "-2.5", "@SUM", "-bird", "cat", 0.5, "a\nb"]
    assert csv_row(row) == ["'=HYPERLINK(1)", "+1", "-2.5", "'@SUM", "'-bird", "cat", 0.5, r"a\nb"]


def test_notes_reasons_and_labels_hide_nothing_in_a_terminal_and_json_keeps_them(
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
def test_what_no_database_can_keep_is_refused_as_a_note_or_a_reason(full_book: Registry, text: str) -> None:
    generation = full_book.generation
    for change in (lambda: full_book.note("digits", text), lambda: full_book.retire("digits", text)):
        with pytest.raises(
            RegistryError, match=r"The (note|reason) (contains a NUL character|cannot be encoded as UTF-8)"
        ):
            change()
    assert full_book.generation == generation


def test_a_name_that_no_task_can_have_is_found_where_rows_are_copied_or_verified(
    full_book: Registry, tmp_path: Path
) -> None:
    tamper(full_book, "task", "UPDATE task SET name = '../strokes' WHERE name = 'strokes'")
    found = full_book.check_integrity()
    assert Fault("../strokes:1", "has an invalid name") in found.faults
    with pytest.raises(IntegrityError, match=r"damaged"):
        full_book.backup(tmp_path / "copy.db")


# --- names belong to those who made them ------------------------------------------------------------------------------


@pytest.fixture
def theirs(tiny: FrozenBackbone, tmp_path: Path) -> Callable[..., bytes]:
    """Makes bundles of versions of tasks."""

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


def test_a_register_key_adds_to_its_own_names_and_to_nobody_elses(
    tiny: FrozenBackbone,
    registry: Registry,
    registered: Callable[..., Task],
    theirs: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    registered("birds")
    keys = KeyFile(tmp_path / "keys.json")
    heads = {
        name: {"Authorization": f"Bearer {keys.create(name, scope)}"}
        for name, scope in (("ann", "register"), ("bob", "register"), ("chief", "admin"))
    }
    with client_of(tiny, registry, keys) as client:

        def send(who: str, bundle: bytes) -> Any:
            return client.post("/api/v1/tasks", content=bundle, headers=heads[who])

        refused = send("ann", theirs("birds", 2, seed=5))
        assert refused.status_code == 403
        assert (
            "'birds:2' cannot be imported: key ann did not register all versions of this name"
            in refused.json()["detail"]
        )
        assert client.get("/api/v1/tasks/birds", headers=heads["ann"]).json()["ref"] == "birds:1"
        assert send("ann", theirs("fish")).status_code == 201
        assert send("ann", theirs("fish", 2)).status_code == 201
        assert send("bob", theirs("fish", 3)).status_code == 403
        assert send("chief", theirs("fish", 3)).status_code == 201
        assert send("ann", theirs("fish", 4)).status_code == 403  # now it is not hers alone
    assert [record.ref for record in registry.tasks()] == ["birds:1", "fish:1", "fish:2", "fish:3"]


def test_what_is_there_already_of_somebody_elses_gets_neither_tags_nor_probes(
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


def test_a_register_key_brings_no_backbone(
    tiny: FrozenBackbone, registry: Registry, theirs: Callable[..., bytes], tmp_path: Path
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    heads = [{"Authorization": f"Bearer {keys.create(scope, scope)}"} for scope in ("register", "admin")]
    with client_of(tiny, registry, keys) as client:
        answers = [client.post("/api/v1/tasks", content=theirs("fish"), headers=head) for head in heads]
    assert [answer.status_code for answer in answers] == [403, 201]
    assert "is not registered, and key register may not add backbones" in answers[0].json()["detail"]


def test_an_idempotency_key_is_its_callers_own(
    tiny: FrozenBackbone,
    registry: Registry,
    registered: Callable[..., Task],
    theirs: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    registered("birds")
    keys = KeyFile(tmp_path / "keys.json")
    with client_of(tiny, registry, keys) as client:
        for who, name in (("ann", "fish"), ("bob", "frogs")):
            head = {"Authorization": f"Bearer {keys.create(who, 'register')}", "Idempotency-Key": "1"}
            for _ in range(2):
                assert client.post("/api/v1/tasks", content=theirs(name), headers=head).status_code == 201


# --- requests ---------------------------------------------------------------------------------------------------------


def test_more_images_than_may_wait_are_too_many_not_too_soon(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]
) -> None:
    registered("good")
    with client_of(tiny, registry, limits=Limits(waiting=2)) as client:
        inputs = [{"name": "pixel_values", "shape": [3, 3, 32, 32], "datatype": "FP32", "data": [0.5] * 3 * 3072}]
        refused = client.post("/v2/models/combined/infer", json={"inputs": inputs})
    assert refused.status_code == 413
    assert "3 images, and 2 may wait at one time" in refused.json()["detail"]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v2/health/ready", "/metrics", "/api/v1/status", "/none", "/"])
def test_head_answers_as_get_does(client: AppClient, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers.get("content-type") == get.headers.get("content-type")


def test_head_of_the_events_ends(client: AppClient) -> None:
    assert client.head("/api/v1/events").status_code == 200


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Any:
    registered("good")
    with client_of(tiny, registry) as made:
        yield made


def test_made_up_methods_share_one_label(client: AppClient) -> None:
    for number in range(50):
        assert client.request(f"MADE{number}", "/livez").status_code == 405
        assert client.request(f"MADE{number}", f"/x{number}").status_code == 404
    series = [line for line in client.get("/metrics").text.splitlines() if line.startswith("addenda_requests_total{")]
    assert [line for line in series if "MADE" in line] == []
    assert len([line for line in series if 'method="other"' in line]) == 2


def test_a_name_that_is_not_there_costs_a_look_at_a_few(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        registered(f"task-{number:02d}", memory=0, classes=2)
    monkeypatch.setattr(queries, "MAX_CANDIDATES", 4)
    with client_of(tiny, registry) as client:
        snapshot = client.app.state.service.snapshot
        looked_at: list[str] = []

        class Tasks(dict[str, Task]):
            def __iter__(self) -> Any:
                for name in super().__iter__():
                    looked_at.append(name)
                    yield name

        snapshot.model.tasks = Tasks(snapshot.model.tasks)
        for path in ("/v2/models/unknown", "/v2/models/unknown/ready"):
            assert "and 21 more" in client.get(path).json()["detail"]
        assert client.post(f"{PREDICT}?tasks=unknown", content=pictures(1)[0]).status_code == 404
        assert 0 < len(looked_at) <= 30
        asked: list[list[str]] = []
        monkeypatch.setattr(difflib, "get_close_matches", lambda name, known, **_: asked.append(known) or [])
        assert client.get("/api/v1/tasks/task-0x").status_code == 404
    assert asked == [["task-00", "task-01", "task-02", "task-03"]]


def test_bodies_together_have_a_budget_and_give_it_back(client: AppClient) -> None:
    app: Any = client.app
    app.state.service.limits = replace(app.state.service.limits, bodies_bytes=10_000)
    small, large = pictures(1)[0], b"x" * 20_000
    for _ in range(5):
        refused = client.post(PREDICT, content=large)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert client.post(PREDICT, content=small).status_code == 200
        assert client.post(PREDICT, content=b"junk").status_code == 400
    assert app.state.body_bytes == 0


def test_a_bundle_is_received_in_a_file(client: AppClient, theirs: Callable[..., bytes]) -> None:
    app: Any = client.app
    app.state.service.limits = replace(app.state.service.limits, bodies_bytes=100)
    assert client.post("/api/v1/tasks", content=theirs("fish")).status_code == 201
    app.state.service.limits = replace(app.state.service.limits, bundle_bytes=100)
    assert client.post("/api/v1/tasks", content=theirs("fish", 2)).status_code == 413


def test_a_full_queue_is_told_before_the_body_is_read(client: AppClient, monkeypatch: pytest.MonkeyPatch) -> None:
    app: Any = client.app
    monkeypatch.setattr(bodies, "_pieces", lambda *_: pytest.fail("it was read"))
    with app.state.service.batcher.room(app.state.service.limits.waiting):
        for path in (PREDICT, "/v2/models/combined/infer"):
            assert client.post(path, content=b"x").status_code == 503


def test_attention_takes_a_place_before_its_body_too(client: AppClient, monkeypatch: pytest.MonkeyPatch) -> None:
    app: Any = client.app
    monkeypatch.setattr(bodies, "_pieces", lambda *_: pytest.fail("it was read"))
    with app.state.service.batcher.room(app.state.service.limits.waiting):
        assert client.post("/page/attention?task=good", content=b"x").status_code == 503


def test_a_failure_is_counted_and_found_by_its_id(client: AppClient, monkeypatch: pytest.MonkeyPatch) -> None:
    app: Any = client.app
    monkeypatch.setattr(type(app.state.service), "snapshot", property(lambda self: 1 / 0))
    failed = client.get("/api/v1/status")
    monkeypatch.undo()
    assert failed.status_code == 500
    assert failed.headers["x-request-id"] == failed.json()["request_id"]
    assert 'addenda_requests_total{method="GET",route="/api/v1/status",status="500"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("what", ["disk", "folder"])
def test_a_disk_that_is_full_or_gone_is_a_reason_to_come_again(
    client: AppClient, theirs: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    bundle, app = theirs("fish"), client.app
    with monkeypatch.context() as spoilt:
        if what == "folder":
            spoilt.setattr("tempfile.tempdir", "/nowhere/at/all")
        else:
            spoilt.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        refused = client.post("/api/v1/tasks", content=bundle)
    assert refused.status_code == 503
    assert "a full disk or a folder that is gone" in refused.json()["detail"]
    assert app.state.uploads._value == UPLOADS
    assert client.post("/api/v1/tasks", content=bundle).status_code == 201


def test_so_many_bundles_lie_on_the_disk_and_no_more(client: AppClient, theirs: Callable[..., bytes]) -> None:
    app: Any = client.app
    app.state.uploads = asyncio.Semaphore(0)
    assert client.post("/api/v1/tasks", content=theirs("fish")).status_code == 503
    app.state.uploads = asyncio.Semaphore(UPLOADS)


@pytest.mark.slow
def test_who_does_not_read_is_hung_up_on_and_who_reads_slowly_is_not(
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
        whole = len(httpx2.get(f"{served.url}/api/v1/tasks/wide", timeout=30).content)
        assert whole > 300_000
        large = b"GET /api/v1/tasks/wide HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

        def connect() -> socket.socket:
            made = socket.socket()
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            made.settimeout(30)
            made.connect((address.hostname, address.port))
            return made

        def read_to_its_end(one: socket.socket) -> int:
            """What can still be read of a connection that was hung up on."""
            received = 0
            with suppress(ConnectionResetError):
                while some := one.recv(2**16):
                    received += len(some)
            return received

        stuck = [connect() for _ in range(10)]
        for one in stuck:
            one.sendall(large * 40)  # more than the system holds of it
        slow = connect()
        slow.sendall(large)
        received = 0
        while received < whole:  # a fifth of a second for each 64 kB: slower than the line, and reading
            received += len(slow.recv(2**16))
            time.sleep(0.02)
        time.sleep(6)  # each is looked at every second
        assert all(read_to_its_end(one) < 40 * whole for one in stuck)
        for one in (*stuck, slow):
            one.close()


def test_every_line_of_the_log_is_json(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root, hooks = logging.getLogger(), (threading.excepthook, sys.unraisablehook)
    handlers, level, shower = root.handlers[:], root.level, warnings.showwarning
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
        root.handlers[:], warnings.showwarning = handlers, shower
        root.setLevel(level)
        threading.excepthook, sys.unraisablehook = hooks
    told = [json.loads(line) for line in lines]
    assert "a library says" in told[0]["message"]
    assert "ZeroDivisionError" in told[1]["traceback"]


# --- outages and faults of our own ------------------------------------------------------------------------------------


def test_an_outage_is_told_from_a_statement_that_is_wrong(full_book: Registry) -> None:
    with pytest.raises(RegistryError) as wrong, reading(full_book._engine) as connection:
        connection.execute(sql("SELECT nothing FROM task"))
    assert isinstance(wrong.value, RegistryFaultError)
    with pytest.raises(RegistryError) as wrong, database_errors("It"), writing(full_book._engine) as connection:
        connection.execute(sql("INSERT INTO nowhere VALUES (1)"))
    assert isinstance(wrong.value, RegistryFaultError)


def test_a_damaged_schema_is_the_servers_fault_and_its_log_says_so(
    client: AppClient, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with raw(registry.location) as connection:
        connection.execute(sql("ALTER TABLE task RENAME COLUMN score TO points"))
    failed = client.get("/api/v1/tasks")
    assert failed.status_code == 500
    assert "no such column" in caplog.text


def test_a_database_that_only_reads_is_an_outage(database: Database) -> None:
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


def test_outages_of_sqlite_are_known_by_their_codes(registry: Registry) -> None:
    for code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        assert code in OUTAGES
        error = sqlite3.OperationalError("something")
        error.sqlite_errorcode = code | 0x100
        with pytest.raises(RegistryUnavailableError), database_errors("It"):
            raise error


@pytest.mark.parametrize("error", [TypeError("ours"), ValueError("ours"), OverflowError("ours")])
def test_a_fault_of_our_own_is_no_fault_of_the_database(full_book: Registry, error: Exception) -> None:
    with pytest.raises(type(error), match=r"^ours$"), database_errors("It"), writing(full_book._engine):
        raise error
    with pytest.raises(type(error), match=r"^ours$"), reading(full_book._engine):
        raise error


@pytest.mark.parametrize("metrics", [{"x": {1, 2}}, {"x": float("nan")}, {"x": "\ud800"}])
def test_a_value_that_no_database_keeps_is_told_as_such(full_book: Registry, metrics: dict[str, Any]) -> None:
    with pytest.raises(RegistryError, match=r"was not recorded: .* Nothing was changed"):
        full_book.add_evaluation("digits", "d", "n", metrics, "l")


@pytest.mark.parametrize(
    "location", [":memory:", "sqlite:///:memory:", "file:tasks.db?mode=memory", "sqlite:///tasks.db?mode=ro"]
)
def test_a_place_that_is_none_is_refused_and_nothing_is_made(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegistryError, match=r"cannot be a registry|An SQLite URL takes no query parameters"):
        Registry.open(location)
    assert list(tmp_path.iterdir()) == []


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_no_thread_keeps_a_projections_output(tiny: FrozenBackbone) -> None:
    assert isinstance(tiny.family, vit.VisionTransformerFamily)
    images = torch.randn(2, 3, 32, 32)
    for _ in tiny.stream(images):
        pass
    tiny.backbone_logits(images)
    assert [name for name, held in vars(tiny.family._captured).items() if isinstance(held, torch.Tensor)] == []


def test_tiles_are_looked_up_under_a_lock(tiny: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []

    class Watched(WeakValueDictionary[object, tiles.Tile]):
        def values(self) -> Any:
            held.append(tiles._LOCK.locked())
            return super().values()

        def __setitem__(self, key: object, value: tiles.Tile) -> None:
            held.append(tiles._LOCK.locked())
            super().__setitem__(key, value)

    store = tiles.TileStore(tiny)
    store._tiles = Watched()
    tiles.Layout(store, [random_task(tiny, "a"), random_task(tiny, "b", seed=1)])
    assert len(held) > 2
    assert all(held)
