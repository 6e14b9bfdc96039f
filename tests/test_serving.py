"""The service under HTTP: snapshots, the follower and the batcher."""

from __future__ import annotations

from collections.abc import Callable

from addenda import FrozenBackbone, Registry, Task
from tests.servers import client_of


def test_a_server_without_a_task_is_ready(tiny: FrozenBackbone, registry: Registry) -> None:
    with client_of(tiny, registry) as client:
        assert client.get("/readyz").json() == {"ready": True}


def test_a_registered_task_is_served(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> None:
    registered("digits")
    with client_of(tiny, registry) as client:
        service = client.app.state.service
        assert list(service.snapshot.model.tasks) == ["digits"]
        registered("strokes")
        assert service.follower.settle(registry.generation, 10)
        assert list(service.snapshot.model.tasks) == ["digits", "strokes"]
