"""Several threads and forked processes: the bits of one."""

from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from addenda import CombinedModel
from tests.support.models import backbone, bits, family, images
from tests.support.ordinary import plain_bits, same_bits, tasks_of


@pytest.mark.slow
def test_several_models_in_several_threads_keep_their_bits() -> None:
    on = backbone("dinov2")
    all_tasks = list(family(on).values())
    pixels = images(5)
    expected = {name: bits(logits) for name, logits in CombinedModel(on, all_tasks)(pixels).items()}
    start = threading.Barrier(6)

    def work(number: int) -> None:
        start.wait()
        with torch.autocast("cpu", torch.bfloat16) if number % 2 else torch.inference_mode():
            for turn in range(3):
                chosen = all_tasks[number % 3 :: 2] if turn else all_tasks
                model = CombinedModel(on, chosen) if turn < 2 else CombinedModel(on, chosen[:1]).with_tasks(chosen)
                assert same_bits(model(pixels), expected)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [None] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_keeps_the_bits() -> None:
    on = backbone()
    model, pixels = CombinedModel(on, tasks_of(on)), images(3)
    expected = plain_bits(on)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            outputs = {name: bits(logits) for name, logits in model(pixels).items()}
            os.write(writer, pickle.dumps(outputs))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pickle.loads(pipe.read()) == expected
    os.waitpid(child, 0)
