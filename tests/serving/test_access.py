"""Every route requires its scope; keys, hosts and origins."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from addenda import FrozenBackbone, Registry, Task
from addenda.exceptions import KeyFileError
from addenda.serving.keys import SCOPES, KeyFile
from tests.support.commands import Run
from tests.support.servers import AppClient, client_of

PUBLIC = {
    "GET /livez",
    "GET /readyz",
    "GET /v2/health/live",
    "GET /v2/health/ready",
    "GET /login",
    "POST /login",
    "POST /logout",
    "GET /static/{asset}",
}
NEEDS = {
    "predict": {
        "GET /",
        "GET /metrics",
        "GET /page/tasks",
        "GET /tasks/{name}",
        "GET /tasks/{name}/versions/{version}",
        "GET /exactness",
        "POST /page/attention",
        "GET /v2",
        "GET /v2/models/{model}",
        "GET /v2/models/{model}/ready",
        "GET /v2/models/{model}/versions/{version}",
        "GET /v2/models/{model}/versions/{version}/ready",
        "POST /v2/models/{model}/infer",
        "POST /v2/models/{model}/versions/{version}/infer",
        "POST /v2/repository/index",
        "POST /api/v1/embed",
        "POST /api/v1/predict",
        "GET /api/v1/status",
        "GET /api/v1/verifications",
        "GET /api/v1/tasks",
        "GET /api/v1/tasks/{name}",
        "GET /api/v1/tasks/{name}/versions",
        "GET /api/v1/tasks/{name}/lineage",
        "GET /api/v1/tasks/{name}/versions/{version}",
        "GET /api/v1/tasks/{name}/versions/{version}/lineage",
        "GET /api/v1/tasks/{name}/versions/{version}/artifact",
        "GET /api/v1/tasks/{name}/aliases/{alias}",
        "GET /api/v1/events",
    },
    "register": {"POST /api/v1/tasks"},
    "admin": {
        "POST /api/v1/verify",
        "PUT /api/v1/tasks/{name}/aliases/{alias}",
        "DELETE /api/v1/tasks/{name}/aliases/{alias}",
    },
}
EVENTS = "GET /api/v1/events"
"""Its response never ends, so the in-process client would hang; tests/serving/test_api.py reads it."""


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, keys: KeyFile) -> Iterator[AppClient]:
    with client_of(tiny, registry, keys) as opened:
        yield opened


def routes(client: AppClient) -> dict[str, object]:
    """Method and path of every operation of the OpenAPI document, with its security requirement."""
    paths = client.get("/openapi.json").json()["paths"]
    return {
        f"{method.upper()} {path}": operation.get("security")
        for path, operations in paths.items()
        for method, operation in operations.items()
    }


def status_of(client: AppClient, route: str, key: str | None) -> int:
    method, path = route.split(" ")
    path = re.sub(r"\{\w+\}", "digits", path.replace("{version}", "1"))
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return client.request(method, path, headers=headers, follow_redirects=False).status_code


def test_every_route_is_listed_with_its_scope(client: AppClient) -> None:
    documented = routes(client)
    for scope, expected in NEEDS.items():
        assert {
            route for route, security in documented.items() if security and security[0]["key"] == [scope]
        } == expected
    assert {route for route, security in documented.items() if not security} == PUBLIC


def test_no_route_is_left_out_of_the_document(client: AppClient) -> None:
    documented, hidden, num_routes = routes(client), set(), 0
    pending: list[Any] = list(client.app.routes)
    while pending:
        route = pending.pop()
        if isinstance(route, APIRoute):
            hidden |= {f"{method} {route.path}" for method in route.methods} - documented.keys()
            num_routes += 1
        elif hasattr(route, "original_router"):
            pending += route.original_router.routes
        else:
            hidden.add(route.path)
    assert hidden == {"/openapi.json"}
    assert num_routes == len(documented)


@pytest.mark.parametrize("owned", [None, "wrong", *SCOPES])
def test_every_route_rejects_keys_without_its_scope(client: AppClient, keys: KeyFile, owned: str | None) -> None:
    created = {scope: keys.create(scope, scope) for scope in SCOPES}
    key = created.get(owned, owned) if owned else None
    num_requests = 0
    for scope, routes_of_scope in NEEDS.items():
        allowed = owned in SCOPES and SCOPES.index(owned) >= SCOPES.index(scope)
        for route in routes_of_scope - {EVENTS}:
            code = status_of(client, route, key)
            page = route.startswith(("GET /tasks", "GET /exactness", "GET /page")) or route == "GET /"
            rejected = {401} if owned not in SCOPES else {403}
            if page and owned not in SCOPES:
                rejected = {303}
            assert (code not in {401, 403, 303}) if allowed else (code in rejected), (route, owned, code)
            num_requests += 1
    for route in PUBLIC:
        assert status_of(client, route, key) not in {401, 500}
    assert num_requests > 25


def test_a_revoked_key_is_rejected_and_keys_stay_required_without_any(client: AppClient, keys: KeyFile) -> None:
    assert client.get("/api/v1/status").status_code == 200
    headers = {"Authorization": f"Bearer {keys.create('shop', 'predict')}"}
    assert client.get("/api/v1/status").status_code == 401
    assert client.get("/api/v1/status", headers=headers).status_code == 200
    keys.revoke("shop")
    assert client.get("/api/v1/status", headers=headers).status_code == 401
    keys.path.unlink()
    assert client.get("/api/v1/status", headers=headers).status_code == 401


def test_beyond_loopback_a_server_without_keys_rejects_all(client: AppClient) -> None:
    client.app.state.loopback = False
    assert client.get("/api/v1/status").status_code == 401


def test_with_a_damaged_key_file_requests_are_rejected_and_only_the_log_has_the_reason(
    client: AppClient, keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"Authorization": f"Bearer {keys.create('shop', 'predict')}"}
    keys.path.write_text("[{]")
    for path in ("/api/v1/status", "/"):  # as JSON, and as a page
        response = client.get(path, headers=headers)
        assert response.status_code == 503
        assert "cannot read its key file" in response.text
        assert str(keys.path) not in response.text
    assert f"Key file {str(keys.path)!r} cannot be read" in caplog.text
    assert client.get("/livez").status_code == 200


def test_the_key_is_checked_before_a_body_is_read(client: AppClient, keys: KeyFile) -> None:
    keys.create("shop", "predict")
    body = b"x" * (client.app.state.service.limits.body_bytes + 1)
    assert client.post("/api/v1/predict", content=body).status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "[", "localhost.evil.example", "127.0.0.1.nip.io"])
def test_another_host_name_is_rejected_on_loopback(client: AppClient, host: str) -> None:
    assert client.get("/api/v1/status", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://[", "null", "http://localhost:81", "http://localhost.evil.example"]
)
def test_cross_origin_requests_are_rejected(client: AppClient, origin: str) -> None:
    assert client.post("/api/v1/verify", headers={"Origin": origin}).status_code == 403
    assert client.post("/api/v1/verify", headers={"Origin": "http://localhost"}).status_code == 200


def test_a_cookie_has_the_scope_of_its_key(client: AppClient, keys: KeyFile) -> None:
    key = keys.create("shop", "predict")
    client.cookies.set("addenda_key", key)
    assert client.get("/api/v1/status").status_code == 200
    assert client.post("/api/v1/verify").status_code == 403


def test_neither_key_nor_header_nor_query_is_logged(
    client: AppClient, keys: KeyFile, caplog: pytest.LogCaptureFixture, registered: Callable[..., Task]
) -> None:
    registered("digits")
    key = keys.create("shop", "predict")
    caplog.set_level("DEBUG", logger="addenda")
    client.get("/api/v1/tasks?name=hush-query", headers={"Authorization": f"Bearer {key}", "X-Other": "hush-header"})
    lines = [f"{record.getMessage()} {getattr(record, 'facts', '')}" for record in caplog.records]
    assert any("/api/v1/tasks" in line and "'key': 'shop'" in line for line in lines)
    assert not any("hush" in line or key in line for line in lines)


def test_a_key_file_has_no_key_in_plain_text_and_is_private_to_its_owner(keys: KeyFile) -> None:
    key = keys.create("shop", "predict")
    assert key.removeprefix("addenda_") not in keys.path.read_text()
    assert len(key.removeprefix("addenda_")) >= 43  # 256 bits in base64
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert keys.find(key).name == "shop"
    assert keys.find(key + "x") is None


def test_a_changed_key_file_keeps_its_permissions(keys: KeyFile) -> None:
    keys.create("shop", "predict")
    keys.path.chmod(0o640)
    KeyFile(keys.path).create("trainers", "register")
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_changed_key_file_keeps_its_owner_or_is_not_changed(keys: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.create("shop", "predict")
    os.chown(keys.path, 12345, 12346)
    KeyFile(keys.path).create("trainers", "register")
    assert (keys.path.stat().st_uid, keys.path.stat().st_gid) == (12345, 12346)

    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)  # as for a user who is not root
    with pytest.raises(KeyFileError, match=r"another user \(uid 12345, gid 12346\).* as that user or as root"):
        KeyFile(keys.path).create("other", "predict")
    left = KeyFile(keys.path).keys()
    assert [key.name for key in left] == ["shop", "trainers"]
    assert not list(keys.path.parent.glob(".*"))


def test_a_key_revoked_through_a_link_is_revoked(keys: KeyFile, tmp_path: Path) -> None:
    key = keys.create("shop", "predict")
    link = tmp_path / "link.json"
    link.symlink_to(keys.path.name)
    other = KeyFile(link).create("trainers", "register")
    KeyFile(link).revoke("shop")
    assert link.is_symlink()
    assert (keys.find(key), keys.find(other).name) == (None, "trainers")
    assert not (tmp_path / "link.json.lock").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_the_lock_of_a_key_file_belongs_to_the_key_files_owner(keys: KeyFile) -> None:
    keys.create("shop", "predict")
    os.chown(keys.path, 12345, 12346)
    KeyFile(keys.path).create("trainers", "register")
    lock = keys.path.with_name(f"{keys.path.name}.lock").stat()
    assert (lock.st_uid, lock.st_gid) == (12345, 12346)


def test_a_mistyped_key_file_creates_no_folder(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    created = run("keys", "create", "shop", "--scope", "predict", "--keys", tmp_path / "typo" / "keys.json")
    assert (created.code, "does not exist; create it first" in created.err) == (2, True)
    revoked = run("keys", "revoke", "shop", "--keys", tmp_path / "typo" / "keys.json")
    assert (revoked.code, "There is no key file" in revoked.err) == (2, True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("keys", "create", "shop", "--scope", "predict", "--keys=~/keys.json").code == 0
    assert KeyFile(tmp_path / "keys.json").keys()[0].name == "shop"


def test_a_malformed_key_file_is_rejected(tmp_path: Path) -> None:
    for text in ("", "{}", "[1]", '[{"name": "a", "scope": "root", "sha256": "", "created_at": ""}]'):
        (tmp_path / "keys.json").write_text(text)
        with pytest.raises(KeyFileError):
            KeyFile(tmp_path / "keys.json")


def test_the_commands_create_list_and_revoke_keys(run: Run, tmp_path: Path) -> None:
    key_file = ("--keys", tmp_path / "keys.json")
    created = run("keys", "create", "shop", "--scope", "predict", *key_file)
    assert created.code == 0
    assert KeyFile(tmp_path / "keys.json").find(created.out.strip()).scope == "predict"
    assert run("keys", "create", "shop", "--scope", "predict", *key_file).code == 2
    assert "Unknown scope 'all'" in run("keys", "create", "other", "--scope", "all", *key_file).err
    assert '"shop"' in run("keys", "list", "--json", *key_file).out
    assert run("keys", "revoke", "shop", *key_file).code == 0
    assert "no key 'shop'" in run("keys", "revoke", "shop", *key_file).err


def test_beyond_loopback_a_server_starts_only_with_keys(
    run: Run, tmp_path: Path, registered: Callable[..., Task]
) -> None:
    registered("digits")
    rejected = run("serve", "--host", "0.0.0.0", "--keys", tmp_path / "none.json")
    assert rejected.code == 2
    assert "addenda keys create" in rejected.err
