"""Follows the registry: each of its generations becomes the snapshot that is served."""

from __future__ import annotations

import logging
import threading
import time

from addenda.backbones import FrozenBackbone
from addenda.exceptions import RegistryError
from addenda.registry import Registry
from addenda.serving.snapshot import Snapshot, first, following

WAIT_S = 1.0
"""How long one question for the next change waits: so long may it take to stop."""
RETRY_S = 1.0
"""Between questions to a database that does not answer."""

log = logging.getLogger(__name__)


class Follower:
    """Keeps a snapshot in step with a registry, in a thread of its own; a database that is down leaves the last one.

    Args:
        backbone: the backbone that all tasks run on.
        registry: the registry to follow.
        alias: serve what this alias points at; None serves the newest active version of each name.

    Attributes:
        snapshot: what is served now; replaced as a whole, never altered.
        reachable: whether the registry answered last.

    Raises:
        ExactnessError: this machine's arithmetic does not keep the promise.
        RegistryError: the registry cannot be read.
    """

    def __init__(self, backbone: FrozenBackbone, registry: Registry, alias: str | None = None) -> None:
        self._registry, self._alias = registry, alias
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self.snapshot: Snapshot = first(backbone)
        self.reachable = True
        self._follow()
        self._thread = threading.Thread(target=self._run, name="addenda-follower", daemon=True)
        self._thread.start()

    def settle(self, generation: int, timeout_s: float) -> bool:
        """Waits until a generation is served, or the time is over; says whether it is. It blocks its thread."""
        with self._changed:
            return self._changed.wait_for(lambda: self.snapshot.generation >= generation, timeout_s)

    def stop(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._registry.wait(self.snapshot.generation, WAIT_S) != self.snapshot.generation:
                    self._follow()
                self.reachable = True
            except RegistryError as error:
                if self.reachable:
                    log.error(
                        "The registry does not answer; generation %d is served on: %s", self.snapshot.generation, error
                    )
                self.reachable = False
                self._stopping.wait(RETRY_S)
            except Exception:  # a thread that ends would serve this generation for ever
                log.exception("Generation %d is served on", self.snapshot.generation)
                self._stopping.wait(RETRY_S)

    def _follow(self) -> None:
        started, before = time.monotonic(), self.snapshot
        snapshot = following(before, self._registry, self._alias)
        with self._changed:
            self.snapshot = snapshot
            self._changed.notify_all()
        log.info(
            "Generation %d is served: %d tasks, %.0f ms",
            snapshot.generation,
            len(snapshot.records),
            1000 * (time.monotonic() - started),
        )
        if not (snapshot.records or snapshot.quarantined):
            where = "is registered" if self._alias is None else f"has the alias {self._alias!r}"
            log.warning("Nothing is answered: no task of backbone %s %s", snapshot.model.backbone.name, where)
        for ref, why in snapshot.quarantined.items():
            if before.quarantined.get(ref) != why:
                log.error("Task %s is quarantined: %s", ref, why)
