"""Names belong to those who registered them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from addenda import FrozenBackbone, Registry, Task
from addenda.exceptions import OwnershipError
from addenda.serving.keys import KeyFile
from tests.support.servers import client_of


def test_a_register_key_adds_versions_only_to_its_own_names(
    tiny: FrozenBackbone,
    registry: Registry,
    registered: Callable[..., Task],
    theirs: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    registered("birds")
    keys = KeyFile(tmp_path / "keys.json")
    headers = {
        name: {"Authorization": f"Bearer {keys.create(name, scope)}"}
        for name, scope in (("ann", "register"), ("bob", "register"), ("chief", "admin"))
    }
    with client_of(tiny, registry, keys) as client:

        def send(user: str, bundle: bytes) -> Any:
            return client.post("/api/v1/tasks", content=bundle, headers=headers[user])

        rejected = send("ann", theirs("birds", 2, seed=5))
        assert rejected.status_code == 403
        assert (
            "'birds:2' cannot be imported: key ann did not register all versions of this name"
            in rejected.json()["detail"]
        )
        assert client.get("/api/v1/tasks/birds", headers=headers["ann"]).json()["ref"] == "birds:1"
        assert send("ann", theirs("fish")).status_code == 201
        assert send("ann", theirs("fish", 2)).status_code == 201
        assert send("bob", theirs("fish", 3)).status_code == 403
        assert send("chief", theirs("fish", 3)).status_code == 201
        assert send("ann", theirs("fish", 4)).status_code == 403  # another key has added a version
    assert [record.ref for record in registry.tasks()] == ["birds:1", "fish:1", "fish:2", "fish:3"]


def test_another_keys_existing_task_gets_neither_tags_nor_probes(
    tiny: FrozenBackbone, registry: Registry, theirs: Callable[..., bytes], tmp_path: Path
) -> None:
    path = tmp_path / "fish.addenda"
    registry.add_backbone(tiny.record())
    path.write_bytes(theirs("fish"))
    registry.on_behalf_of("key ann").import_bundle(path, owner="key ann")
    registry.untag("fish:1", "theirs")
    generation = registry.generation
    registry.on_behalf_of("key bob").import_bundle(path, owner="key bob")
    assert (registry.generation, registry.record("fish:1").tags) == (generation, ())
    registry.on_behalf_of("key ann").import_bundle(path, owner="key ann")
    assert registry.record("fish:1").tags == ("theirs",)
    path.write_bytes(theirs("fish", 2))
    with pytest.raises(OwnershipError):
        registry.import_bundle(path, owner="key bob")


def test_a_register_key_cannot_add_a_backbone(
    tiny: FrozenBackbone, registry: Registry, theirs: Callable[..., bytes], tmp_path: Path
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    headers = [{"Authorization": f"Bearer {keys.create(scope, scope)}"} for scope in ("register", "admin")]
    with client_of(tiny, registry, keys) as client:
        responses = [client.post("/api/v1/tasks", content=theirs("fish"), headers=each) for each in headers]
    assert [response.status_code for response in responses] == [403, 201]
    assert "is not registered, and key register may not add backbones" in responses[0].json()["detail"]


def test_idempotency_keys_are_separate_for_each_api_key(
    tiny: FrozenBackbone,
    registry: Registry,
    registered: Callable[..., Task],
    theirs: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    registered("birds")
    keys = KeyFile(tmp_path / "keys.json")
    with client_of(tiny, registry, keys) as client:
        for user, name in (("ann", "fish"), ("bob", "frogs")):
            headers = {"Authorization": f"Bearer {keys.create(user, 'register')}", "Idempotency-Key": "1"}
            for _ in range(2):
                assert client.post("/api/v1/tasks", content=theirs(name), headers=headers).status_code == 201
