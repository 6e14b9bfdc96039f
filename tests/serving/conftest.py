"""Services in the test process stop at once; bundles of others' tasks, and a client of a served registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from addenda import FrozenBackbone, Registry, Task
from addenda.combined import golden
from addenda.serving import snapshot
from tests.support.servers import AppClient, client_of
from tests.support.tasks import random_task


@pytest.fixture(autouse=True, scope="session")
def short_waits() -> Iterator[None]:
    """Ends each wait for a registry change soon, and with it the wait of a service that stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "WAIT_S", 0.05)
        yield


@pytest.fixture
def theirs(tiny: FrozenBackbone, tmp_path: Path) -> Callable[..., bytes]:
    """Creates bundles of task versions."""

    @cache
    def bundle(name: str, versions: int = 1, seed: int = 0) -> bytes:
        folder = tmp_path / f"{name}-{versions}-{seed}"
        folder.mkdir()
        with Registry.open(folder / "tasks.db") as registry:
            registry.add_backbone(tiny.record())
            for number in range(versions):
                task = random_task(tiny, name, seed=seed + number)
                registry.register(task, golden(tiny, task), new_version=True)
            registry.tag(f"{name}:1", "theirs")
            registry.export([f"{name}:{versions}"], folder / "a.addenda")
        return (folder / "a.addenda").read_bytes()

    return bundle


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Iterator[AppClient]:
    registered("good")
    with client_of(tiny, registry) as opened:
        yield opened
