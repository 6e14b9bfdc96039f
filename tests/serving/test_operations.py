"""A served registry under load and under stress: stopped, killed, without its database, attacked, and changed."""

from __future__ import annotations

import json
import re
import socket
import subprocess
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
from tests.support.servers import ServedProcess
from tests.support.tasks import random_task

pytestmark = pytest.mark.slow

PREDICT = "/api/v1/predict"


class Answering(ServedProcess):
    def ask(self, image: bytes) -> httpx2.Response:
        return httpx2.post(self.url + PREDICT, content=image, timeout=60)

    def metric(self, name: str) -> float:
        lines = httpx2.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def connect(self) -> socket.socket:
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname, address.port), timeout=30)


class Impatient(Answering):
    module = "tests.support.impatient"


@pytest.fixture
def images(tmp_path: Path) -> list[bytes]:
    folder = colour_folder(tmp_path / "images", per_class=2)
    return [path.read_bytes() for path in sorted(folder.rglob("*.png"))]


@pytest.fixture
def place(glyphs: FrozenBackbone, tmp_path: Path) -> str:
    """A registry of two tasks."""
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


def answers(server: Answering, images: list[bytes]) -> list[dict[str, object]]:
    """What the server says of each image, when nobody else asks."""
    responses = [server.ask(image) for image in images]
    assert [response.status_code for response in responses] == [200] * len(images)
    return [response.json() for response in responses]


def test_a_server_that_is_told_to_stop_answers_all_that_was_begun(
    place: str, images: list[bytes], tmp_path: Path
) -> None:
    with Answering(place, tmp_path, "--drain", 3) as server, ExitStack() as stack:
        right = answers(server, images)
        begun = stack.enter_context(server.connect())
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(images[0])}\r\n\r\n"
        begun.sendall(head.encode() + images[0][:10])
        with Load(server.url + PREDICT, images) as load:
            load.wait(20)
            stopped = time.monotonic()
            server.process.terminate()
            until(lambda: httpx2.get(f"{server.url}/readyz").status_code == 503, "unready")
            unready = time.monotonic()
            load.wait(20)
            assert server.process.poll() is None
            until(lambda: len(load.failed) == load.clients, "no new request is taken")
        with pytest.raises(OSError, match="refused"):
            server.connect()
        begun.sendall(images[0][10:])
        answer = stack.enter_context(begun.makefile("rb")).read()
        assert answer.startswith(b"HTTP/1.1 200 "), "what was begun before is answered after"
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == right[0]
        assert server.process.wait(30) == 0
    assert all(at >= stopped + 3 for at, _ in load.failed), "refused before the drain was over"
    assert sum(told.asked > unready for told in load.told) > 10
    assert all(told.status == 200 and told.document == right[told.image] for told in load.told)
    answered = server.log.read_text().count(f'"path": "{PREDICT}", "status": 200')
    assert answered == len(load.told) + len(images) + 1, "an answer was lost on its way"


def test_a_killed_server_leaves_the_registry_whole_and_answers_as_before(
    place: str, images: list[bytes], glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    with Answering(place, tmp_path) as server, Registry.open(place) as registry:
        add(registry, glyphs, "late")
        until(lambda: server.metric("addenda_tasks") == 3, "the third task is served")
        right = answers(server, images)
        with Load(server.url + PREDICT, images) as load:
            load.wait(20)
            server.process.kill()
            server.process.wait()
            until(lambda: len(load.failed) == load.clients, "no client is answered any more")
        assert all(told.document == right[told.image] for told in load.told)
        assert registry.check_integrity().ok
    with Answering(place, tmp_path) as server:
        assert answers(server, images) == right


@contextmanager
def down(server: Any) -> Iterator[None]:
    """PostgreSQL is stopped."""
    server._stop()
    yield
    server.ensure_postgres_running()


@contextmanager
def locked(location: str) -> Iterator[None]:
    """A writer holds the file's lock."""
    with raw(location) as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        connection.exec_driver_sql("ROLLBACK")


def test_a_server_whose_database_is_down_answers_on_and_then_follows_again(
    glyphs: FrozenBackbone, images: list[bytes], tmp_path: Path
) -> None:
    with own_postgres() as database:
        location = url_of(database)
        fill(location, glyphs)
        with Answering(location, tmp_path) as server:
            right = answers(server, images)
            with Load(server.url + PREDICT, images) as load:
                with down(database):
                    until(lambda: server.metric("addenda_registry_up") == 0, "the outage is told of")
                    load.wait(50)
                    assert httpx2.get(f"{server.url}/readyz").status_code == 200
                    assert httpx2.get(f"{server.url}/livez").status_code == 200
                    listing = httpx2.get(f"{server.url}/api/v1/tasks", timeout=60)
                    assert (listing.status_code, listing.headers.get("retry-after")) == (503, "5"), listing.text
                until(lambda: server.metric("addenda_registry_up") == 1, "the end of the outage is told of")
            assert not load.failed
            assert all(told.status == 200 and told.document == right[told.image] for told in load.told)
            with Registry.open(location) as registry:
                add(registry, glyphs, "late")
            until(lambda: "late" in server.ask(images[0]).json()["tasks"], "what is registered afterwards is served")
            assert server.log.read_text().count("The registry does not answer") == 1


def test_a_long_writer_of_the_file_stops_no_answer(
    place: str, images: list[bytes], glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    with Answering(place, tmp_path) as server:
        right = answers(server, images)
        with Load(server.url + PREDICT, images) as load, locked(place):
            load.wait(50)
            time.sleep(2)
            load.wait(10)
            assert httpx2.get(f"{server.url}/api/v1/tasks", timeout=60).status_code == 200
            assert server.metric("addenda_registry_up") == 1
        assert not load.failed
        assert all(told.status == 200 and told.document == right[told.image] for told in load.told)
        with Registry.open(place) as registry:
            add(registry, glyphs, "late")
        until(lambda: "late" in server.ask(images[0]).json()["tasks"], "what is registered afterwards is served")


def drip(connection: socket.socket, data: bytes, ended: list[float]) -> None:
    """Sends a byte ten times a second until it is hung up on."""
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


def test_clients_that_drip_are_hung_up_on_and_others_are_answered(
    place: str, images: list[bytes], tmp_path: Path
) -> None:
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n".encode()
    with Impatient(place, tmp_path, HEAD_S="2", BODY_S="3", PYTHONPATH=str(ROOT)) as server:
        right = answers(server, images)
        for begin, most in ((b"", 2), (head, 3)):
            ended: list[float] = []
            started = time.monotonic()
            slow = [server.connect() for _ in range(200)]
            for connection in slow:
                connection.sendall(begin)
            data = b"GET /" + b"a" * 1000
            threads = [threading.Thread(target=drip, args=(connection, data, ended)) for connection in slow]
            with Load(server.url + PREDICT, images) as load:
                for thread in threads:
                    thread.start()
                load.wait(20)
                for thread in threads:
                    thread.join()
            assert len(ended) == 200
            assert min(ended) - started >= most
            assert max(ended) - started < 20, "dripping on would have taken 100 s"
            assert not load.failed
            assert all(told.status == 200 and told.document == right[told.image] for told in load.told)
        assert server.log.read_text().count('"status": 408') == 200


def memory_kb(process: subprocess.Popen[bytes]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def test_who_comes_to_a_full_queue_is_told_when_to_come_again(place: str, tmp_path: Path) -> None:
    images = []
    for grey in range(20):
        file = BytesIO()
        Image.new("RGB", (2000, 1500), (grey, 0, 0)).save(file, "PNG")
        images.append(file.getvalue())
    with Answering(place, tmp_path, "--max-waiting", 4) as server:
        right = answers(server, images)
        before = memory_kb(server.process)
        with Load(server.url + PREDICT, images, clients=20) as load:
            load.wait(200)
            during = memory_kb(server.process)
        assert not load.failed
        assert {told.status for told in load.told} == {200, 503}
        for told in load.told:
            if told.status == 200:
                assert told.document == right[told.image]
            else:
                assert 1 <= int(told.headers["retry-after"]) <= 60
                assert told.headers["content-type"] == "application/problem+json"
        assert during - before < 150_000, (
            "what is refused is not decoded: 20 images would be 180 MB, and more with each"
        )
        assert answers(server, images) == right


def test_an_answer_that_would_be_late_is_not_given(place: str, images: list[bytes], tmp_path: Path) -> None:
    with Answering(place, tmp_path, "--timeout", 0.001) as server:
        response = server.ask(images[0])
        assert response.status_code == 504
        assert response.json()["detail"] == "No answer within 0.001 s."


def test_tasks_registered_under_load_are_served_and_no_answer_mixes_generations(
    place: str, images: list[bytes], glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    with Answering(place, tmp_path) as server, Registry.open(place) as registry:
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
        right = answers(server, images)
    assert {told.document["generation"] for told in load.told} == set(names)
    for told in load.told:
        assert told.status == 200
        served = names[told.document["generation"]]
        assert told.document["tasks"] == {name: right[told.image]["tasks"][name] for name in served}


def test_the_line_at_the_start_says_what_is_served_and_where_metrics_are(place: str, tmp_path: Path) -> None:
    with ServedProcess(place, tmp_path, "--alias", "production", "--metrics-port", 0) as server:
        told = re.search(r"\(only what 'production' points at; metrics on port (\d+)\)", server.log.read_text())
        assert told is not None
        found = httpx2.get(f"http://127.0.0.1:{told[1]}/metrics", timeout=10)
    assert "addenda_" in found.text


def test_another_port_is_named_only_where_this_one_is_taken() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(AddendaError, match=r"already in use .*--port takes another"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(AddendaError, match="cannot be listened on") as error:
        bind("192.0.2.1", 0)
    assert "--port" not in str(error.value)
