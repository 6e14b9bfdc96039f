"""A server under load that is stopped, killed, without its database, attacked, or whose registry changes."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from PIL import Image

from addenda import FrozenBackbone, Registry, Task
from addenda.combined import golden
from addenda.exceptions import AddendaError
from addenda.serving.server import bind
from tests.support.databases import own_postgres, raw, url_of
from tests.support.images import colour_folder
from tests.support.load import Load
from tests.support.moments import until
from tests.support.places import ROOT
from tests.support.processes import Forked
from tests.support.servers import ServedProcess
from tests.support.tasks import random_task

pytestmark = pytest.mark.slow

PREDICT = "/api/v1/predict"


class Server(ServedProcess):
    start_s = 180

    def predict(self, image: bytes) -> httpx2.Response:
        return httpx2.post(self.url + PREDICT, content=image, timeout=60)

    def metric(self, name: str) -> float:
        lines = httpx2.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def connect(self) -> socket.socket:
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname, address.port), timeout=30)


class Impatient(Server):
    module = "tests.support.impatient"


@pytest.fixture
def images(tmp_path: Path) -> list[bytes]:
    folder = colour_folder(tmp_path / "images", per_class=2)
    return [path.read_bytes() for path in sorted(folder.rglob("*.png"))]


@pytest.fixture
def location(glyphs: FrozenBackbone, tmp_path: Path) -> str:
    """The location of a registry with two tasks."""
    location = str(tmp_path / "tasks.db")
    fill(location, glyphs)
    return location


def fill(location: str, backbone: FrozenBackbone) -> None:
    with Registry.open(location) as registry:
        registry.add_backbone(backbone.record())
        for seed, name in enumerate(("digits", "strokes")):
            add(registry, backbone, name, seed)


def add(registry: Registry, backbone: FrozenBackbone, name: str, seed: int = 9) -> Task:
    task = random_task(backbone, name, seed=seed)
    return registry.register(task, golden(backbone, task))


def predictions(server: Server, images: list[bytes]) -> list[dict[str, object]]:
    """The prediction for each image, without concurrent requests."""
    responses = [server.predict(image) for image in images]
    assert [response.status_code for response in responses] == [200] * len(images)
    return [response.json() for response in responses]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_is_stopped_completes_all_pending_requests(
    workers: int, location: str, images: list[bytes], tmp_path: Path
) -> None:
    with Server(location, tmp_path, "--drain", 3, "--workers", workers) as server, ExitStack() as stack:
        expected = predictions(server, images)
        pending = stack.enter_context(server.connect())
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(images[0])}\r\n\r\n"
        pending.sendall(head.encode() + images[0][:10])
        with Load(server.url + PREDICT, images) as load:
            load.wait(20)
            stopped = time.monotonic()
            server.process.terminate()
            until(lambda: httpx2.get(f"{server.url}/readyz").status_code == 503, "unready")
            unready = time.monotonic()
            load.wait(20)
            assert server.process.poll() is None
            until(lambda: len(load.failed) == load.clients, "no new request is accepted")
        with pytest.raises(OSError, match="refused"):
            server.connect()
        pending.sendall(images[0][10:])
        response = stack.enter_context(pending.makefile("rb")).read()
        assert response.startswith(b"HTTP/1.1 200 "), "a pending request is completed after the drain"
        assert json.loads(response.partition(b"\r\n\r\n")[2]) == expected[0]
        assert server.process.wait(30) == 0
    assert all(at >= stopped + 3 for at, _ in load.failed), "rejected before the end of the drain"
    assert sum(each.asked > unready for each in load.told) > 10
    assert all(each.status == 200 and each.document == expected[each.image] for each in load.told)
    num_logged = server.log.read_text().count(f'"path": "{PREDICT}", "status": 200')
    assert num_logged == len(load.told) + len(images) + 1, "a response was lost"


def test_a_killed_server_leaves_the_registry_intact_and_predicts_as_before(
    location: str, images: list[bytes], glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    with Server(location, tmp_path) as server, Registry.open(location) as registry:
        add(registry, glyphs, "late")
        until(lambda: server.metric("addenda_tasks") == 3, "the third task is served")
        expected = predictions(server, images)
        with Load(server.url + PREDICT, images) as load:
            load.wait(20)
            server.process.kill()
            server.process.wait()
            until(lambda: len(load.failed) == load.clients, "all clients are disconnected")
        assert all(each.document == expected[each.image] for each in load.told)
        assert registry.check_integrity().ok
    with Server(location, tmp_path) as server:
        assert predictions(server, images) == expected


@contextmanager
def down(server: Any) -> Iterator[None]:
    """Stops PostgreSQL."""
    server._stop()
    yield
    server.ensure_postgres_running()


@contextmanager
def locked(location: str) -> Iterator[None]:
    """Holds the write lock of the database file."""
    with raw(location) as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        connection.exec_driver_sql("ROLLBACK")


def test_a_server_keeps_predicting_while_its_database_is_down_and_then_follows_it_again(
    glyphs: FrozenBackbone, images: list[bytes], tmp_path: Path
) -> None:
    with own_postgres() as database:
        location = url_of(database)
        fill(location, glyphs)
        with Server(location, tmp_path) as server:
            expected = predictions(server, images)
            with Load(server.url + PREDICT, images) as load:
                with down(database):
                    until(lambda: server.metric("addenda_registry_up") == 0, "the outage is reported")
                    load.wait(50)
                    assert httpx2.get(f"{server.url}/readyz").status_code == 200
                    assert httpx2.get(f"{server.url}/livez").status_code == 200
                    listing = httpx2.get(f"{server.url}/api/v1/tasks", timeout=60)
                    assert (listing.status_code, listing.headers.get("retry-after")) == (503, "5"), listing.text
                until(lambda: server.metric("addenda_registry_up") == 1, "the end of the outage is reported")
            assert not load.failed
            assert all(each.status == 200 and each.document == expected[each.image] for each in load.told)
            with Registry.open(location) as registry:
                add(registry, glyphs, "late")
            until(lambda: "late" in server.predict(images[0]).json()["tasks"], "a later registration is served")
            assert server.log.read_text().count("The registry is unavailable; still serving") == 1


def test_a_long_write_transaction_blocks_no_prediction(
    location: str, images: list[bytes], glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    with Server(location, tmp_path) as server:
        expected = predictions(server, images)
        with Load(server.url + PREDICT, images) as load, locked(location):
            load.wait(50)
            time.sleep(2)
            load.wait(10)
            assert httpx2.get(f"{server.url}/api/v1/tasks", timeout=60).status_code == 200
            assert server.metric("addenda_registry_up") == 1
        assert not load.failed
        assert all(each.status == 200 and each.document == expected[each.image] for each in load.told)
        with Registry.open(location) as registry:
            add(registry, glyphs, "late")
        until(lambda: "late" in server.predict(images[0]).json()["tasks"], "a later registration is served")


def drip(connection: socket.socket, data: bytes, ended: list[float]) -> None:
    """Sends ten bytes per second until the server closes the connection."""
    try:
        for byte in data:
            connection.sendall(bytes([byte]))
            connection.settimeout(0.1)
            try:
                if not connection.recv(1000):
                    break
            except TimeoutError:
                pass
    except OSError:
        pass
    ended.append(time.monotonic())
    connection.close()


def test_slow_senders_are_disconnected_and_others_are_served(
    location: str, images: list[bytes], tmp_path: Path
) -> None:
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n".encode()
    with Impatient(location, tmp_path, HEAD_S="2", BODY_S="3", PYTHONPATH=str(ROOT)) as server:
        expected = predictions(server, images)
        for prefix, limit_s in ((b"", 2), (head, 3)):
            ended: list[float] = []
            started = time.monotonic()
            slow = [server.connect() for _ in range(200)]
            for connection in slow:
                connection.sendall(prefix)
            data = b"GET /" + b"a" * 1000
            threads = [threading.Thread(target=drip, args=(connection, data, ended)) for connection in slow]
            with Load(server.url + PREDICT, images) as load:
                for thread in threads:
                    thread.start()
                load.wait(20)
                for thread in threads:
                    thread.join()
            assert len(ended) == 200
            assert min(ended) - started >= limit_s
            assert max(ended) - started < 20, "sending everything would have taken 100 s"
            assert not load.failed
            assert all(each.status == 200 and each.document == expected[each.image] for each in load.told)
        assert server.log.read_text().count('"status": 408') == 200


def memory_kb(process: Forked) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_queue_gives_503_with_retry_after(workers: int, location: str, tmp_path: Path) -> None:
    images = []
    for grey in range(20):
        file = BytesIO()
        Image.new("RGB", (2000, 1500), (grey, 0, 0)).save(file, "PNG")
        images.append(file.getvalue())
    with Server(location, tmp_path, "--max-waiting", 4, "--workers", workers) as server:
        expected = predictions(server, images)
        before = memory_kb(server.process)
        with Load(server.url + PREDICT, images, clients=20) as load:
            load.wait(200)
            during = memory_kb(server.process)
        assert not load.failed
        assert {each.status for each in load.told} == {200, 503}
        for each in load.told:
            if each.status == 200:
                assert each.document == expected[each.image]
            else:
                assert 1 <= int(each.headers["retry-after"]) <= 60
                assert each.headers["content-type"] == "application/problem+json"
        assert during - before < 150_000, (
            "rejected images are not decoded: 20 images would need 180 MB, and more with each request"
        )
        assert predictions(server, images) == expected


def test_a_request_times_out(location: str, images: list[bytes], tmp_path: Path) -> None:
    with Server(location, tmp_path, "--timeout", 0.001) as server:
        response = server.predict(images[0])
        assert response.status_code == 504
        assert response.json()["detail"] == "The request timed out after 0.001 s."


def test_tasks_registered_under_load_are_served_and_no_response_mixes_generations(
    location: str, images: list[bytes], glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    with Server(location, tmp_path) as server, Registry.open(location) as registry:
        names = {registry.generation: ["digits", "strokes"]}
        with Load(server.url + PREDICT, images) as load:
            for number in range(5):
                load.wait(10)
                add(registry, glyphs, f"late-{number}", number)
                served = [*names[max(names)], f"late-{number}"]
                names[registry.generation] = served
                until(lambda served=served: server.metric("addenda_tasks") == len(served), f"{served} are served")
            load.wait(10)
        assert not load.failed
        expected = predictions(server, images)
    assert {each.document["generation"] for each in load.told} == set(names)
    for each in load.told:
        assert each.status == 200
        served = names[each.document["generation"]]
        assert each.document["tasks"] == {name: expected[each.image]["tasks"][name] for name in served}


def test_the_start_up_line_has_the_alias_and_the_metrics_port(location: str, tmp_path: Path) -> None:
    with ServedProcess(location, tmp_path, "--alias", "production", "--metrics-port", 0) as server:
        match = re.search(r"\(only the versions of alias 'production'; metrics on port (\d+)\)", server.log.read_text())
        assert match is not None
        response = httpx2.get(f"http://127.0.0.1:{match[1]}/metrics", timeout=10)
    assert "addenda_" in response.text


def test_a_response_is_sent_at_once_and_not_when_the_client_has_acknowledged_its_headers() -> None:
    with bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_port_option_is_suggested_only_if_the_port_is_in_use() -> None:
    with (
        bind("127.0.0.1", 0) as taken,
        pytest.raises(AddendaError, match=r"already in use.* Choose another with --port"),
    ):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(AddendaError, match="Cannot listen on") as error:
        bind("192.0.2.1", 0)
    assert "--port" not in str(error.value)
