"""Replicas on Ray Serve respond with the same bytes, and no request is lost when a replica is restarted."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from PIL import Image

from addenda import CombinedModel, FrozenBackbone, Registry
from tests.serving.test_operations import PREDICT, add, fill
from tests.support.commands import Run
from tests.support.databases import Postgres
from tests.support.images import colour_folder
from tests.support.load import Load
from tests.support.moments import until
from tests.support.servers import ServedProcess

pytestmark = pytest.mark.ray

CPUS = 2
"""Of each node and of each replica, so that a node holds one replica."""
MICRO_BATCH = 8
"""On a CPU; with more than two micro-batches of requests per replica another replica is started."""
INFER = "/v2/models/combined/infer"


class OnRay(ServedProcess):
    start_s = 180


class Replicas(OnRay):
    """`addenda serve --ray` on a cluster of this process.

    Attributes:
        location: the registry's.
        logs: the folder of the cluster's worker logs.
    """

    def __init__(self, cluster: tuple[Any, str], location: str, folder: Path, *options: object) -> None:
        self.location, self.logs = location, Path(cluster[0].head_node.get_logs_dir_path())
        self._numbers = count()
        super().__init__(location, folder, "--ray", cluster[1], "--cpus", CPUS, "--drain", 0, *options)

    def pids(self) -> set[int]:
        """The process ids of the replicas."""
        matches = set()
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                if child.status() != psutil.STATUS_ZOMBIE and "ServeReplica:addenda" in " ".join(child.cmdline()):
                    matches.add(child.pid)
        return matches

    def each(self, path: str, **request: Any) -> dict[int, httpx2.Response]:
        """The response of every replica by its process id; sends requests until all have responded."""
        responses: dict[int, httpx2.Response] = {}
        pids, deadline = self.pids(), time.monotonic() + 30
        while responses.keys() != pids:
            assert time.monotonic() < deadline, f"{pids - responses.keys()} did not respond"
            request_id = f"request-{next(self._numbers)}"
            response = httpx2.request(
                "POST" if request else "GET",
                self.url + path,
                headers={"X-Request-ID": request_id},
                timeout=60,
                **request,
            )
            until(lambda sent=request_id: self._logged_by(sent), f"{request_id} is logged")
            responses[self._logged_by(request_id)[0]] = response
        return responses

    def _logged_by(self, request_id: str) -> list[int]:
        """The process that logged a request."""
        logs = (log for log in self.logs.glob("worker-*.err") if f'"{request_id}"' in log.read_text())
        return [int(log.stem.rsplit("-", 1)[1]) for log in logs]

    def printed(self, text: str) -> bool:
        return text in self.log.read_text()


@pytest.fixture(scope="module")
def database(postgres: str) -> Iterator[Postgres]:
    created = Postgres(postgres)
    yield created
    created.close()


@pytest.fixture(scope="module")
def served(
    cluster: tuple[Any, str], database: Postgres, glyphs: FrozenBackbone, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replicas]:
    """Two replicas, each on its own node, with a PostgreSQL registry of two tasks."""
    location = database.new()
    fill(location, glyphs)
    with Replicas(cluster, location, tmp_path_factory.mktemp("served"), "--replicas", 2) as server:
        until(lambda: server.printed("with 2 replicas"), "both serve", 60)
        yield server
        assert server.stop() == 0, server.log.read_text()
        assert not server.pids()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = colour_folder(tmp_path_factory.mktemp("images") / "of", per_class=2)
    return [path.read_bytes() for path in sorted(folder.rglob("*.png"))]


def expected_documents(server: Replicas, images: list[bytes]) -> list[dict[str, Any]]:
    """The response to each image when both replicas serve and there is no other load."""
    until(lambda: server.log.read_text().rstrip().endswith("with 2 replicas"), "both serve", 60)
    return [httpx2.post(server.url + PREDICT, content=image, timeout=60).json() for image in images]


def check_responses(load: Load, documents: list[dict[str, Any]], lost: float, noticed: float) -> None:
    """Responses are correct, or are 500 for requests sent to a lost replica before its loss was noticed."""
    failed = [response for response in load.told if response.status != 200]
    assert {response.status for response in failed} <= {500}
    late = [response.asked - lost for response in failed if response.told <= lost or response.asked >= noticed]
    assert not late, late
    assert all(response.document == documents[response.image] for response in load.told if response.status == 200)
    assert sum(response.asked > noticed for response in load.told) > 20


def test_all_replicas_give_the_bytes_that_the_model_alone_gives(served: Replicas, glyphs: FrozenBackbone) -> None:
    pixels = torch.randn(3, *glyphs.preprocessing["input_size"], generator=torch.Generator().manual_seed(0))
    sent = {"name": "pixel_values", "shape": list(pixels.shape), "datatype": "FP32", "data": pixels.flatten().tolist()}
    responses = served.each(INFER, json={"inputs": [sent]})
    assert len(responses) == 2
    first, other = responses.values()
    assert first.status_code == 200, first.text
    assert first.content == other.content
    threads = torch.get_num_threads()
    torch.set_num_threads(CPUS)
    try:
        with Registry.open(served.location) as registry:
            alone = CombinedModel(glyphs, registry.load(glyphs))(pixels)
    finally:
        torch.set_num_threads(threads)
    outputs = {output["name"]: output["data"] for output in first.json()["outputs"]}
    for name, logits in alone.items():
        assert torch.equal(torch.tensor(outputs[f"{name}.logits"]).reshape(logits.shape), logits)


def test_all_replicas_serve_a_new_task_within_five_seconds(served: Replicas, glyphs: FrozenBackbone) -> None:
    with Registry.open(served.location) as registry:
        add(registry, glyphs, "late")
        registered, generation = time.monotonic(), registry.generation
    while any(response.json()["generation"] < generation for response in served.each("/api/v1/status").values()):
        assert time.monotonic() - registered < 5
        time.sleep(0.05)


def test_only_requests_of_a_killed_replica_fail(served: Replicas, images: list[bytes]) -> None:
    documents, before = expected_documents(served, images), served.pids()
    with Load(served.url + PREDICT, images) as load:
        load.wait(50)
        killed = time.monotonic()
        os.kill(min(before), signal.SIGKILL)
        until(lambda: served.log.read_text().rstrip().endswith("with 1 replica"), "its loss is noticed", 60)
        noticed = time.monotonic()
        until(lambda: len(served.pids() - before) == 1, "another is started", 60)
        until(lambda: served.log.read_text().rstrip().endswith("with 2 replicas"), "it serves", 60)
        load.wait(50)
    assert not load.failed
    check_responses(load, documents, killed, noticed)
    assert len(served.each("/api/v1/status")) == 2


def long_request() -> bytes:
    """A request that takes a second or more: many images, each large to decode."""
    file = BytesIO()
    Image.linear_gradient("L").resize((2000, 2000)).save(file, "PNG")
    data = [base64.b64encode(file.getvalue()).decode()] * 24
    return json.dumps({"inputs": [{"name": "image", "shape": [24], "datatype": "BYTES", "data": data}]}).encode()


def test_a_restart_of_all_replicas_loses_no_request(served: Replicas, images: list[bytes]) -> None:
    documents, before = expected_documents(served, images), served.pids()
    long = long_request()
    outputs = httpx2.post(served.url + INFER, content=long, timeout=60).json()["outputs"]
    with Load(served.url + PREDICT, images) as load, Load(served.url + INFER, [long], clients=2) as slow:
        load.wait(20)
        served.process.send_signal(signal.SIGHUP)
        until(lambda: not before & served.pids() and len(served.pids()) == 2, "all are new", 120)
        until(lambda: served.log.read_text().rstrip().endswith("with 2 replicas"), "both serve", 60)
        load.wait(50)
    assert not load.failed
    assert not slow.failed
    assert {response.status for response in (*load.told, *slow.told)} == {200}
    assert all(response.document == documents[response.image] for response in load.told)
    assert all(response.document["outputs"] == outputs for response in slow.told)
    assert served.printed("Restarting the replicas")


def test_serving_survives_a_lost_node_and_refuses_a_node_with_other_numerics(
    served: Replicas, cluster: tuple[Any, str], images: list[bytes]
) -> None:
    nodes, documents = cluster[0], expected_documents(served, images)
    times = served.log.read_text().count("with 2 replicas")
    with Load(served.url + PREDICT, images) as load:
        load.wait(20)
        lost = time.monotonic()
        (node,) = nodes.worker_nodes
        nodes.remove_node(node, allow_graceful=False)
        until(lambda: served.log.read_text().rstrip().endswith("with 1 replica"), "its loss is noticed", 60)
        noticed = time.monotonic()
        other = nodes.add_node(
            num_cpus=CPUS, node_ip_address="127.0.0.1", include_dashboard=False,
            env_vars={"ATEN_CPU_CAPABILITY": "default"},
        )  # fmt: skip
        until(lambda: served.printed("A replica was refused"), "the other numerics are noticed", 60)
        load.wait(20)
        assert served.log.read_text().count("with 2 replicas") == times, "the refused replica has served"
        nodes.remove_node(other, allow_graceful=False)
        nodes.add_node(num_cpus=CPUS, node_ip_address="127.0.0.1", include_dashboard=False)
        until(lambda: served.log.read_text().rstrip().endswith("with 2 replicas"), "a node of the same kind serves", 90)
        load.wait(20)
    assert not load.failed
    check_responses(load, documents, lost, noticed)
    assert len(served.each("/api/v1/status")) == 2
    refusal = re.search(r"its numerics fingerprint is (\w+)…, the deployment's is (\w+)…", served.log.read_text())
    assert refusal is not None
    assert refusal[1] != refusal[2]
    assert httpx2.get(f"{served.url}/api/v1/status").json()["numerics_fingerprint"].startswith(refusal[2])


def test_a_second_command_on_the_cluster_is_refused(served: Replicas, cluster: tuple[Any, str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Ray Serve is already running on this cluster"):
        Replicas(cluster, served.location, tmp_path)


def listening(processes: list[psutil.Process]) -> list[tuple[str, str]]:
    """The command lines and addresses of listening sockets."""
    sockets = [
        (" ".join(process.cmdline()), connection.laddr.ip)
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(sockets) > 5
    return sockets


def test_one_replica_on_this_machine_serves_scales_up_under_load_and_stops(
    glyphs: FrozenBackbone, images: list[bytes], tmp_path: Path
) -> None:
    location = str(tmp_path / "tasks.db")
    fill(location, glyphs)
    scale = ("--min-replicas", 1, "--max-replicas", 2)
    with OnRay(location, tmp_path, "--ray", "local", *scale, "--drain", 5) as server:
        processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        elsewhere = [(name, ip) for name, ip in listening(processes) if ip.removeprefix("::ffff:") != "127.0.0.1"]
        assert [name.partition(":addenda:")[0] for name, _ in elsewhere] == ["ray::ServeReplica"], elsewhere
        with Load(server.url + PREDICT, images, clients=3 * MICRO_BATCH) as load:
            until(lambda: server.log.read_text().rstrip().endswith("with 2 replicas"), "there are two replicas", 90)
            load.wait(50)
            assert {response.status for response in load.told} == {200}
            processes += psutil.Process(server.process.pid).children(recursive=True)
            server.process.terminate()
            until(lambda: httpx2.get(f"{server.url}/readyz").status_code == 503, "unready")
            load.wait(5)
            assert server.process.wait(60) == 0
        assert not psutil.wait_procs(processes, timeout=10)[1]
    assert sum(response.status == 200 for response in load.told) > 50
    assert {response.status for response in load.told} <= {200, 404, 503}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--replicas", 2), "--replicas requires --ray."),
        (("--ray", "local", "--replicas", 2, "--max-replicas", 3), "Give --replicas N, or --min-replicas A"),
        (("--ray", "local", "--min-replicas", 3, "--max-replicas", 2), "Give --replicas N, or --min-replicas A"),
        (("--ray", "local", "--metrics-port", 9000), "--metrics-port cannot be used with --ray"),
        (("--ray", "local", "--host", "0.0.0.0"), "Listening on '0.0.0.0' requires API keys"),
    ],
)
def test_incompatible_options_are_refused(options: tuple[object, ...], message: str, run: Run) -> None:
    result = run("serve", *options)
    assert result.code == 2
    assert message in result.err
