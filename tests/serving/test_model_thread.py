"""One thread runs the model: background work gives way to requests, and no other thread uses several cores."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import torch

from addenda import FrozenBackbone, Registry, Task
from addenda.combined import CombinedModel, numerics, numerics_fingerprint, pausing
from addenda.combined.probe_inputs import probe_images
from addenda.serving import model_thread as module
from addenda.serving.model_thread import ModelThread
from addenda.serving.service import Service
from tests.serving.test_service import images_of
from tests.support.inference import client_at, infer, pictures, pixels_of, served_tasks
from tests.support.models import threads
from tests.support.servers import ServedProcess


@contextmanager
def opened() -> Iterator[ModelThread]:
    thread = ModelThread()
    try:
        yield thread
    finally:
        thread.report(0)
        thread.close()


def started(thread: ModelThread, work: Callable[[], None]) -> Future[None]:
    """Runs background work, from another thread."""
    result: Future[None] = Future()
    threading.Thread(target=lambda: result.set_result(thread.background(work)), daemon=True).start()
    return result


def test_background_work_waits_while_images_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 60)
    slices: list[int] = []
    with opened() as thread:

        def work() -> None:
            for number in range(3):
                slices.append(number)
                if number == 1:
                    thread.report(1)  # a request arrives
                thread._give_way()

        thread.report(1)
        working = started(thread, work)
        threading.Event().wait(0.2)
        assert slices == []
        thread.report(0)
        while len(slices) < 2:
            threading.Event().wait(0.01)
        threading.Event().wait(0.2)
        assert slices == [0, 1]
        assert thread.run(lambda: "pass").result(60) == "pass"
        assert slices == [0, 1]
        thread.report(0)
        working.result(60)
        assert slices == [0, 1, 2]


def test_slices_alternate_with_forward_passes_and_neither_waits_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.6)  # far longer than a busy machine stops a thread
    order: list[str] = []
    with opened() as thread:

        def run(kind: str) -> None:
            assert threading.current_thread().name.startswith("addenda-model")
            order.append(kind)
            threading.Event().wait(0.01)

        def work() -> None:
            for _ in range(5):
                run("slice")
                thread._give_way()

        thread.report(1)  # all the time
        working = started(thread, work)
        while not working.done() and len(order) < 10_000:
            thread.run(run, "pass").result(60)
            threading.Event().wait(0.001)  # as the event loop prepares the next batch
        working.result(60)
    assert order.count("slice") == 5
    assert order.count("pass") >= 5
    longest = max(len(part) for part in "".join(kind[0] for kind in order).replace("p", " ").split())
    assert longest <= 2


def test_requests_run_in_order_once_each_and_cancelled_ones_never() -> None:
    order: list[int] = []
    with opened() as thread:
        busy = threading.Event()
        blocked = thread.run(busy.wait)
        results = [thread.run(order.append, number) for number in range(20)]
        assert results[7].cancel()
        busy.set()
        assert blocked.result(60)
    assert order == [*range(7), *range(8, 20)]
    assert all(result.done() for result in results)


def test_a_failure_reaches_its_caller_only() -> None:
    with opened() as thread:
        with pytest.raises(ValueError, match="slice"):
            thread.background(int, "no number: slice")
        with pytest.raises(ValueError, match="request"):
            thread.run(int, "no number: request").result(60)
        assert thread.run(int, "1").result(60) == thread.background(int, "1") == 1


def test_a_pause_after_each_layer_changes_no_bit_and_may_run_other_passes(
    tiny: FrozenBackbone, registered: Callable[..., Task]
) -> None:
    model = CombinedModel(tiny, [registered("digits"), registered("strokes", seed=2)])
    images, others = probe_images(tiny), images_of(3)
    expected, expected_others = model(images)["digits"], model(others, ["strokes"])["strokes"]
    inner: list[torch.Tensor] = []

    def pause() -> None:
        with pausing(None):
            inner.append(model(others, ["strokes"])["strokes"])

    with pausing(pause):
        assert torch.equal(model(images)["digits"], expected)
    assert len(inner) == tiny.depth
    assert all(torch.equal(each, expected_others) for each in inner)
    assert torch.equal(model(images)["digits"], expected)
    assert len(inner) == tiny.depth


@pytest.mark.slow
def test_a_joining_task_gives_way_to_requests_and_is_served_once_its_golden_probe_holds(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("digits")
    monkeypatch.setattr(module, "PATIENCE_S", 600)

    async def ask() -> None:
        service = Service(tiny, registry)
        with service.batcher.reserve(1):  # as if an image waited all the time
            registered("joining", seed=3)
            assert not await asyncio.to_thread(service.follower.settle, registry.generation, 2)
            assert [*(await asyncio.wait_for(service.predict(images_of(1)), 120)).logits] == ["digits"]
        assert await asyncio.to_thread(service.follower.settle, registry.generation, 120)
        assert [*(await service.predict(images_of(1))).logits] == ["digits", "joining"]
        await service.close()

    asyncio.run(ask())


ONE_TEAM = """
import json, os, threading
import torch
from addenda.serving.model_thread import ModelThread

def num_threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.rand(10**6, dtype=torch.float32).exp().sum()
    return torch.get_num_threads(), num_threads()

def other():
    results = []
    thread = threading.Thread(target=lambda: results.extend(compute()))
    thread.start()
    thread.join()
    return results

thread = ModelThread.of_process(3)
before = num_threads()
print(json.dumps([before, thread.run(compute).result(), compute(), other()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_only_the_thread_of_the_model_computes_with_several_cores() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", ONE_TEAM], env=environment, stdout=subprocess.PIPE, check=True)
    before, model, own, other = json.loads(done.stdout)
    assert model == [3, before + 2]  # with the two others of its team
    assert own == [1, before + 2]
    assert other == [1, before + 3]  # itself


@pytest.mark.slow
def test_a_server_has_the_bits_and_the_numerics_of_its_number_of_threads(
    glyphs: FrozenBackbone, tmp_path: Path
) -> None:
    tasks, files = served_tasks(glyphs, tmp_path / "tasks.db"), pictures(3)
    with ServedProcess(tmp_path / "tasks.db", tmp_path, OMP_NUM_THREADS="2") as served, client_at(served) as client:
        answers = infer(client, files)
        fingerprint = httpx2.get(f"{served.url}/api/v1/status").json()["numerics_fingerprint"]
    with threads(2):
        expected = CombinedModel(glyphs, [*tasks.values()])(pixels_of(glyphs, files))
        assert fingerprint == numerics_fingerprint(numerics(glyphs))
    for name, logits in expected.items():
        assert answers.as_numpy(f"{name}.logits").tobytes() == logits.numpy().tobytes()
    assert fingerprint != numerics_fingerprint(numerics(glyphs))
