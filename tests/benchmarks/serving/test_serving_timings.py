"""`addenda bench serving`: the load generator sends the requested load, and the results are recorded."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from addenda import FrozenBackbone
from addenda.benchmarks.serving import load as load_module
from addenda.benchmarks.serving import serving_timings
from addenda.benchmarks.serving.load import Measured, generator, load, pin
from addenda.benchmarks.serving.serving_timings import cores_apart, run_serving


async def loaded(status: bytes, open_loop: bool) -> tuple[Measured, list[bytes]]:
    """The result of a load on a server that responds with one status, and the requests that it received."""
    heads = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.read(5):
            heads.append(head)
            await asyncio.sleep(0.01)
            writer.write(b"HTTP/1.1 " + status + b" Any\r\nContent-Length: 3\r\n\r\nyes")
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        options = {"rate": 100, "seconds": 0.5} if open_loop else {"clients": 2, "seconds": 0.3}
        return await load("127.0.0.1", port, [b"one--", b"two--"], **options), heads


@pytest.mark.parametrize("open_loop", [True, False])
def test_each_request_is_sent_completely_and_counted_once(open_loop: bool) -> None:
    measured, heads = asyncio.run(loaded(b"200", open_loop))
    assert len(measured.latencies_s) == len(heads) > 4
    assert not measured.failed
    assert min(measured.latencies_s) >= 0.01
    assert abs(heads.count(b"one--") - heads.count(b"two--")) <= 1


def test_the_rate_of_a_closed_loop_is_that_of_a_full_server() -> None:
    """A connection's requests take 10 ms each and the first one 0.4 s, which the rate does not include."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        delay = 0.4
        while await reader.read(5):
            await asyncio.sleep(delay)
            writer.write(b"HTTP/1.1 200 Any\r\nContent-Length: 3\r\n\r\nyes")
            delay = 0.01
        writer.close()

    async def measure() -> Measured:
        async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
            return await load("127.0.0.1", server.sockets[0].getsockname()[1], [b"image"], 1, clients=2)

    measured = asyncio.run(measure())
    served_s = 1 - 0.4
    assert measured.rate == pytest.approx((len(measured.latencies_s) - 2) / served_s, rel=0.2)
    assert measured.rate > len(measured.latencies_s) / 1 * 1.2


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "KEEP_S", 0)
    connections = 0

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.read(5):
            writer.write(b"HTTP/1.1 200 Any\r\nContent-Length: 3\r\n\r\nyes")
        writer.close()

    async def measure() -> Measured:
        async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
            return await load("127.0.0.1", server.sockets[0].getsockname()[1], [b"image"], 0.1, clients=1)

    measured = asyncio.run(measure())
    assert connections == len(measured.latencies_s) > 2
    assert not measured.failed


def test_a_status_other_than_200_is_a_failure() -> None:
    measured, heads = asyncio.run(loaded(b"503", open_loop=False))
    assert not measured.latencies_s
    assert measured.failed == {"503": len(heads)}


def test_failures_are_returned_by_the_process_of_the_load_generator() -> None:
    with generator([b"image"]) as send_load:
        measured = send_load("127.0.0.1", 1, seconds=0.2, clients=1)
    assert not measured.latencies_s
    assert measured.failed["ConnectionRefusedError"] > 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process")
def test_the_load_generator_has_a_core_of_its_own_if_the_model_leaves_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 3, 4, 6})
    assert cores_apart(3) == ([1, 3, 4], [6])
    assert cores_apart(4) == ([], [])
    monkeypatch.undo()
    own = sorted(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pin(process.pid, own[-1:])
        assert os.sched_getaffinity(process.pid) == {own[-1]}
        process.communicate(b"\n")


@pytest.mark.slow
def test_bench_serving_measures_and_records(
    glyphs: FrozenBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_timings, "CLIENTS", (1, 3))
    figures = run_serving(glyphs, None, tmp_path, quick=True, seconds=0.5, cycles=2, workers=1)
    groups = dict.fromkeys(figure.group for figure in figures)
    assert [*groups] == ["1 task", "10 tasks", "10 tasks, by clients", "10 tasks, changing"]
    assert all(math.isfinite(figure.measured) for figure in figures)
    failed = [figure for figure in figures if figure.what.startswith("failed requests")]
    assert len(failed) == 14
    assert all(figure.measured == 0 for figure in failed)
    served = next(figure for figure in figures if figure.what.startswith("served, "))
    assert served.measured > 1
    assert next(figure for figure in figures if figure.what == "served with 1 worker").measured > 1
    written = json.loads((tmp_path / "serving.json").read_text())
    assert [row["what"] for row in written["figures"]] == [figure.what for figure in figures]
    assert "| served / stock timm |" in (tmp_path / "serving.md").read_text()
