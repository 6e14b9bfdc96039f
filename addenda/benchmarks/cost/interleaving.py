"""Timing several ways to do a thing so that what the machine does meanwhile falls on all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import torch

Run = Callable[[], object]
K = TypeVar("K")


def interleave(
    ways: Mapping[K, Run], rounds: int, device: torch.device, thrice: Collection[K] = ()
) -> dict[K, list[float]]:
    """Seconds of every way, once a round and in another order each round; a first round warms up.

    Args:
        ways: what to time.
        rounds: measured rounds.
        device: is waited for after each call.
        thrice: ways that are timed three times a round.
    """
    order = [way for way in ways for _ in range(3 if way in thrice else 1)]
    seconds: dict[K, list[float]] = {way: [] for way in ways}
    shuffle = random.Random(0)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for way in order:
            start = time.perf_counter()
            ways[way]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[way].append(time.perf_counter() - start)
    return seconds
