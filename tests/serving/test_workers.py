"""A server whose workers handle HTTP and images: its answers, its changes, its limits, and killed processes."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from tritonclient.http import InferenceServerClient

from addenda import FrozenBackbone, Registry
from addenda.combined import golden
from addenda.serving.keys import KeyFile
from addenda.serving.server import CONNECTIONS
from addenda.serving.tensors import HEADER_LENGTH
from tests.support.commands import Run
from tests.support.inference import images_of, pictures, pixels, served_tasks
from tests.support.load import Load
from tests.support.moments import until
from tests.support.processes import descriptors, num_sockets
from tests.support.servers import ServedProcess
from tests.support.tasks import random_task

pytestmark = pytest.mark.slow

PREDICT = "/api/v1/predict"
IMAGES = pictures(9)
SPARE = 5
"""Sockets by which a process's number may differ for other reasons, such as a connection that is being closed."""
READY = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Workers(ServedProcess):
    """A server with two workers."""

    start_s = 180

    def __init__(self, registry: object, folder: Path, *options: object, **environment: str) -> None:
        super().__init__(str(registry), folder, "--workers", 2, *options, **environment)

    @property
    def forking(self) -> int:
        """The process that forks workers, last started."""
        return children(self.process.pid)[-1]

    @property
    def workers(self) -> list[int]:
        return [worker for forking in children(self.process.pid)[-1:] for worker in children(forking)]

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60)

    def predict(self, image: bytes) -> httpx2.Response:
        return httpx2.post(self.url + PREDICT, content=image, timeout=60)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def settle(self) -> None:
        """Waits until earlier requests' connections are closed."""
        counts: list[int] = []

        def is_settled() -> bool:
            counts.append(sum(len(descriptors(pid)) for pid in (self.process.pid, *self.workers)))
            time.sleep(0.2)
            return counts[-1] == min(counts) and len(set(counts[-5:])) == 1 and len(counts) >= 5

        until(is_settled, "connections are closed", 60)

    def connect(self) -> socket.socket:
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname, address.port), timeout=60)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def running(pids: list[int]) -> list[int]:
    """Those processes that run: neither ended nor zombies."""
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and state(pid) not in "ZX"]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


@pytest.fixture(scope="module")
def location(glyphs: FrozenBackbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with three tasks, one of them multi-label, that no test of this module changes."""
    path = tmp_path_factory.mktemp("registry") / "tasks.db"
    served_tasks(glyphs, path)
    return path


@pytest.fixture(scope="module")
def own(glyphs: FrozenBackbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry like `location`, for tests that change it."""
    path = tmp_path_factory.mktemp("changing") / "tasks.db"
    served_tasks(glyphs, path)
    return path


@pytest.fixture(scope="module")
def alone(location: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    """A server without workers."""
    with ServedProcess(location, tmp_path_factory.mktemp("alone"), OMP_NUM_THREADS="2") as served:
        yield served


@pytest.fixture(scope="module")
def shared(location: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A server with workers, under the same numerics."""
    with Workers(location, tmp_path_factory.mktemp("workers"), OMP_NUM_THREADS="2") as served:
        yield served


@pytest.fixture(scope="module")
def changing(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A server with workers, whose registry and processes its tests change; it has two workers before each."""
    with Workers(own, tmp_path_factory.mktemp("changed")) as served:
        yield served


def add(location: Path, glyphs: FrozenBackbone, name: str, seed: int = 9) -> str:
    with Registry.open(location) as registry:
        task = random_task(glyphs, name, seed=seed)
        return registry.register(task, golden(glyphs, task)).ref


def requests() -> dict[str, dict[str, Any]]:
    """Requests of every kind, right and wrong, as arguments of an HTTP client."""
    body, length = InferenceServerClient.generate_request_body([images_of(IMAGES)], outputs=None)
    binary = {"content": body, "headers": {HEADER_LENGTH: str(length)}}
    one = {"method": "POST", "url": PREDICT, "content": IMAGES[0]}
    return {
        **{f"image {i}": {**one, "content": image} for i, image in enumerate(IMAGES)},
        "form": {"method": "POST", "url": PREDICT, "files": {"image": IMAGES[1]}},
        "chunked": {**one, "content": iter([IMAGES[0][:50], IMAGES[0][50:]])},
        "some tasks": {**one, "url": f"{PREDICT}?tasks=tags,digits&top=2"},
        "no such task": {**one, "url": f"{PREDICT}?task=unknown"},
        "no such top": {**one, "url": f"{PREDICT}?top=0"},
        "routed": {**one, "url": f"{PREDICT}?task=%61uto"},
        "routed among": {**one, "url": f"{PREDICT}?task=auto&tasks=digits"},
        "junk": {**one, "content": b"junk"},
        "nothing": {**one, "content": b""},
        "another site": {**one, "headers": {"Origin": "http://elsewhere"}},
        "another host": {**one, "headers": {"Host": "elsewhere"}},
        "nine images": {"method": "POST", "url": "/v2/models/combined/infer", **binary},
        "a task": {"method": "POST", "url": "/v2/models/strokes/infer", **binary},
        "its version": {"method": "POST", "url": "/v2/models/strokes/versions/1/infer", **binary},
        "another version": {"method": "POST", "url": "/v2/models/strokes/versions/2/infer", **binary},
        "pixels": {"method": "POST", "url": "/v2/models/tags/infer", "json": {"inputs": pixels(0.5)}},
        "infinite": {"method": "POST", "url": "/v2/models/tags/infer", "json": {"inputs": pixels(1e30)}},
        "wrong shape": {
            "method": "POST", "url": "/v2/models/tags/infer", "json": {"inputs": pixels(0.5, shape=[1, 3, 16, 64])},
        },
        "wrong method": {"method": "DELETE", "url": PREDICT},
        "metadata": {"method": "GET", "url": "/v2/models/combined"},
        "index": {"method": "POST", "url": "/v2/repository/index"},
        "tasks": {"method": "GET", "url": "/api/v1/tasks?limit=2"},
        "status": {"method": "GET", "url": "/api/v1/status"},
        "head": {"method": "HEAD", "url": "/livez"},
        "ready": {"method": "GET", "url": "/readyz"},
        "openapi": {"method": "GET", "url": "/openapi.json"},
        "unknown": {"method": "GET", "url": "/unknown"},
        "escaped": {"method": "GET", "url": "/api/v1/tasks/a%2Fb"},
        "too large": {**one, "content": bytes(33 * 2**20)},
    }  # fmt: skip


def answer(served: ServedProcess, arguments: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, without what differs between any two requests."""
    response = httpx2.request(**{**arguments, "url": served.url + arguments["url"]}, timeout=60)
    identifier = response.headers["x-request-id"]
    headers = {k: v for k, v in response.headers.items() if k not in ("date", "x-request-id")}
    return (
        response.status_code,
        headers,
        response.content.replace(identifier.encode(), b"").replace(urlsplit(served.url).netloc.encode(), b""),
    )


@pytest.mark.parametrize("name", requests())
def test_every_answer_has_the_bytes_of_a_server_without_workers(
    name: str, alone: ServedProcess, shared: Workers
) -> None:
    expected = answer(alone, requests()[name])
    for _ in range(3):  # of either worker
        assert answer(shared, requests()[name]) == expected


def test_every_answer_under_load_has_the_bytes_of_the_same_request_alone(alone: ServedProcess, shared: Workers) -> None:
    expected = [httpx2.post(alone.url + PREDICT, content=image, timeout=60).json() for image in IMAGES]
    with Load(shared.url + PREDICT, IMAGES, clients=12) as load:
        load.wait(200)
    assert not load.failed
    assert {each.image for each in load.told} == set(range(len(IMAGES)))
    for each in load.told:
        assert (each.status, each.document) == (200, expected[each.image])


def test_all_workers_count_into_one_page_of_metrics(shared: Workers) -> None:
    counts = (
        f'addenda_requests_total{{method="POST",route="{PREDICT}",status="200"}}',
        f'addenda_request_seconds_count{{route="{PREDICT}"}}',
    )

    def counted() -> list[float]:
        return [shared.metric(name) for name in counts]

    def logged() -> int:
        lines = [json.loads(line) for line in shared.log.read_text().splitlines() if '"path"' in line]
        return sum(line["path"] == PREDICT for line in lines)

    assert shared.predict(IMAGES[0]).status_code == 200
    shared.settle()
    before, before_in_log = counted(), logged()
    with Load(shared.url + PREDICT, IMAGES) as load:
        load.wait(40)
    until(lambda: counted() == [count + len(load.told) for count in before], "all requests are counted")
    assert shared.metric("addenda_waiting_images") == 0
    assert logged() == before_in_log + len(load.told)


def test_a_change_returns_once_every_worker_serves_it(own: Path, changing: Workers) -> None:
    with Registry.open(own) as registry, httpx2.Client(timeout=60) as client:
        for number in range(5):
            alias = f"{changing.url}/api/v1/tasks/digits/aliases/number-{number}"
            changed = client.put(alias, json={"version": 1}, headers={"If-None-Match": "*"})
            assert changed.status_code == 200, changed.text
            assert {changing.predict(IMAGES[0]).json()["generation"] for _ in range(12)} == {registry.generation}


def test_no_answer_mixes_generations_and_snapshots_that_no_request_uses_are_released(
    own: Path, glyphs: FrozenBackbone, changing: Workers
) -> None:
    with Registry.open(own) as registry:
        names = {registry.generation: [record.name for record in registry.tasks()]}
        with Load(changing.url + PREDICT, IMAGES) as load:
            for number in range(6):
                load.wait(8)
                add(own, glyphs, f"late-{number}", number)
                names[registry.generation] = served_now = [*names[max(names)], f"late-{number}"]
                until(lambda wanted=served_now: changing.metric("addenda_tasks") == len(wanted), "it is served", 60)
            load.wait(8)
        assert not load.failed
        expected = [changing.predict(image).json()["tasks"] for image in IMAGES]
    for each in load.told:
        assert each.status == 200
        served_then = names[each.document["generation"]]
        assert each.document["tasks"] == {name: expected[each.image][name] for name in served_then}


def test_killed_workers_are_replaced_and_nothing_wrong_is_answered(
    own: Path, glyphs: FrozenBackbone, changing: Workers
) -> None:
    noise = random.Random(0)
    with Registry.open(own) as registry:
        names = {record.name for record in registry.tasks()}
        expected = [changing.predict(image).json()["tasks"] for image in IMAGES]
        told, failed = [], 0
        for number in range(6):
            with Load(changing.url + PREDICT, IMAGES, clients=6) as load:
                load.wait(10)
                killed = [noise.choice(changing.workers)]
                if number == 2:
                    killed = [*changing.workers, changing.forking]
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
                if number == 3:
                    add(own, glyphs, "during-kills")
                until(lambda gone=killed: not running(gone), "they are gone")
            told += load.told
            failed += len(load.failed)
            until(lambda: len(running(changing.workers)) == 2, "two workers run", 120)
            until(lambda: changing.get("/readyz").status_code == 200, "ready")
        assert failed, "a killed worker's clients are disconnected"
        assert len(told) >= 60
        assert all(each.status == 200 for each in told)
        for each in told:
            assert {name: each.document["tasks"][name] for name in expected[each.image]} == expected[each.image]
        assert [changing.predict(image).json()["tasks"]["digits"] for image in IMAGES] == [
            tasks["digits"] for tasks in expected
        ]
        assert changing.metric("addenda_waiting_images") == 0, "images of killed workers do not count"
        assert registry.check_integrity().ok
        assert {record.name for record in registry.tasks()} == {*names, "during-kills"}


def test_a_worker_that_does_not_respond_delays_a_change_and_is_replaced(
    own: Path, glyphs: FrozenBackbone, changing: Workers
) -> None:
    count = changing.metric("addenda_tasks")
    stuck = changing.workers[0]
    os.kill(stuck, signal.SIGSTOP)
    add(own, glyphs, "during-a-stop")
    until(lambda: not running([stuck]), "it is killed", 120)
    until(lambda: len(running(changing.workers)) == 2, "it is replaced", 120)
    until(lambda: changing.metric("addenda_tasks") == count + 1, "the change is served", 120)
    assert {len(changing.predict(IMAGES[0]).json()["tasks"]) for _ in range(8)} == {count + 1}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_server(number: signal.Signals, location: Path, tmp_path: Path) -> None:
    with Workers(location, tmp_path, "--drain", 0) as served:
        pids = [served.process.pid, served.forking, *served.workers]
        assert not any(path.startswith(("/dev/shm", "/tmp/pymp")) for path in descriptors(pids[-1]))
        with Load(served.url + PREDICT, IMAGES) as load:
            load.wait(10)
            for pid in pids[:1] if number is signal.SIGKILL else pids:  # Ctrl-C, and systemd, reach them all
                with suppress(ProcessLookupError):  # the server has ended it meanwhile
                    os.kill(pid, number)
            until(lambda: len(load.failed) == load.clients, "all clients are disconnected", 120)
        until(lambda: not running(pids[1:]), "no worker runs", 120)
        assert served.process.wait(120) == (-signal.SIGKILL if number is signal.SIGKILL else 0)
    others = [(each.status, each.document.get("detail")) for each in load.told if each.status != 200]
    assert others == []


def test_connections_are_limited_in_total_and_spread_over_the_workers(shared: Workers) -> None:
    shared.settle()
    opened = [shared.connect() for _ in range(CONNECTIONS - 1)]

    def held() -> list[int]:
        return [len(descriptors(pid)) for pid in shared.workers]

    until(lambda: sum(held()) > CONNECTIONS, "all are accepted")
    assert min(held()) > CONNECTIONS / 8, f"connections of each worker: {held()}"
    opened[-1].sendall(READY)
    assert opened[-1].recv(12) == b"HTTP/1.1 200"
    until(lambda: _status(shared) == 503, "one more is too many")
    for connection in opened:
        connection.close()
    until(lambda: _status(shared) == 200, "connections are released")


def _status(served: Workers) -> int:
    with served.connect() as connection:
        connection.sendall(READY)
        return int(connection.recv(12).split()[1])


def test_a_key_file_that_one_worker_has_seen_protects_all(location: Path, tmp_path: Path) -> None:
    with Workers(location, tmp_path) as served:
        assert served.predict(IMAGES[0]).status_code == 200
        keys = tmp_path / "keys.json"
        key = KeyFile(keys).create("shop", "predict")
        with httpx2.Client(timeout=60) as one:  # stays with one worker
            assert one.post(served.url + PREDICT, content=IMAGES[0]).status_code == 401
            headers = {"Authorization": f"Bearer {key}"}
            assert one.post(served.url + PREDICT, content=IMAGES[0], headers=headers).status_code == 200
        keys.unlink()
        assert {served.predict(IMAGES[0]).status_code for _ in range(12)} == {401}


def test_a_client_that_leaves_also_leaves_the_process_of_the_model(shared: Workers) -> None:
    shared.settle()
    before = num_sockets(shared.process.pid)
    with ExitStack() as stack:
        for connection in [stack.enter_context(shared.connect()) for _ in range(20)]:
            connection.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = b""
            while b"data: {" not in received:
                received += connection.recv(1000)
        assert num_sockets(shared.process.pid) >= before + 20 - SPARE
    until(lambda: num_sockets(shared.process.pid) <= before + SPARE, "relayed connections are closed", 120)
    assert "Traceback" not in shared.log.read_text()


def test_images_of_requests_that_time_out_make_room_for_others(location: Path, tmp_path: Path) -> None:
    with Workers(location, tmp_path, "--max-waiting", 8, "--timeout", 0.001) as served:
        for _ in range(20):
            assert served.predict(IMAGES[0]).status_code == 504
        until(lambda: served.metric("addenda_waiting_images") == 0, "no image waits")
        body, length = InferenceServerClient.generate_request_body([images_of(IMAGES[:8])])
        headers = {HEADER_LENGTH: str(length)}
        response = httpx2.post(f"{served.url}/v2/models/combined/infer", content=body, headers=headers, timeout=60)
        assert response.status_code == 504, "not 503: all slots are free again"


def test_workers_without_a_task_answer_with_none(location: Path, tmp_path: Path) -> None:
    with Workers(location, tmp_path, "--alias", "nothing") as served:
        response = served.predict(IMAGES[0])
        assert (response.status_code, response.json()["tasks"]) == (200, {})


def test_a_cookie_behind_tls_is_for_tls_only(location: Path, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    key = keys.create("shop", "predict")
    with Workers(location, tmp_path, "--keys", tmp_path / "keys.json") as served:
        for scheme in ("https", "http"):
            response = httpx2.post(f"{served.url}/login", data={"key": key}, headers={"X-Forwarded-Proto": scheme})
            assert response.status_code == 303
            assert ("Secure" in response.headers["set-cookie"]) == (scheme == "https")


def test_a_large_bundle_is_rejected_while_it_is_still_being_sent(shared: Workers) -> None:
    with shared.connect() as connection:
        head = f"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**30}\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 1000)
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_ray_has_replicas_instead_of_workers(run: Run) -> None:
    result = run("serve", "--workers", 2, "--ray", "auto")
    assert (result.code, "--workers cannot be used with --ray; use --replicas." in result.err) == (2, True)
