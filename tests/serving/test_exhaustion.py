"""Requests meant to exhaust the server, and its memory over many snapshots."""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
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

from addenda import FrozenBackbone, Registry, Task
from addenda.backbones import vit
from addenda.combined import golden, tiles
from addenda.registry.store import queries
from addenda.serving import routes, server
from addenda.serving.api_tasks import UPLOADS
from addenda.serving.keys import KeyFile
from addenda.serving.service import Limits
from tests.support.inference import pictures
from tests.support.moments import until
from tests.support.places import ROOT
from tests.support.servers import AppClient, ServedProcess, client_of
from tests.support.tasks import random_task

PREDICT = "/api/v1/predict"


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


def test_unknown_methods_share_one_metric_label(client: AppClient) -> None:
    for number in range(50):
        assert client.request(f"MADE{number}", "/livez").status_code == 405
        assert client.request(f"MADE{number}", f"/x{number}").status_code == 404
    series = [line for line in client.get("/metrics").text.splitlines() if line.startswith("addenda_requests_total{")]
    assert [line for line in series if "MADE" in line] == []
    assert len([line for line in series if 'method="other"' in line]) == 2


@pytest.mark.slow
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
