"""What the workers of a run are at, for the one who waits for them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addenda.learner.context import Report

REFRESH_S = 1.0
"""How often a worker says how far it is, and how often that is read."""


class Notes:
    """What each name is at: the state of an actor."""

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}

    def write(self, name: str, note: str) -> None:
        """Notes what a name is at now."""
        self._notes[name] = note

    def read(self) -> dict[str, str]:
        """What each was at last."""
        return self._notes


class Board:
    """Notes that all nodes can write, kept beside the driver; where they are lost, the work goes on unseen."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor: Any = ray.remote(Notes).options(num_cpus=0, scheduling_strategy=here).remote()

    def read(self) -> dict[str, str]:
        """What each was at last; nothing where the notes cannot be had in time."""
        import ray

        try:
            found: dict[str, str] = ray.get(self._actor.read.remote(), timeout=REFRESH_S)
        except ray.exceptions.RayError:
            return {}
        return found

    def reporter(self, name: str) -> Report:
        """A report of progress that notes, now and then, what a name is at."""
        said = -REFRESH_S

        def report(what: str, done: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said >= REFRESH_S:
                said = time.monotonic()
                self._actor.write.remote(name, f"{what.partition(',')[0]} {done}/{total}")

        return report
