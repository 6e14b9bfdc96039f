"""Every route asks for its scope; keys, hosts and origins."""

from __future__ import annotations

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
"""Its answer has no end, which a client in this process would wait for; tests/serving/test_api.py reads it."""


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, keys: KeyFile) -> Iterator[AppClient]:
    with client_of(tiny, registry, keys) as opened:
        yield opened


def routes(client: AppClient) -> dict[str, object]:
    """Method and path of every operation of the OpenAPI document, with what it says of keys."""
    paths = client.get("/openapi.json").json()["paths"]
    return {f"{how.upper()} {path}": one.get("security") for path, all_ in paths.items() for how, one in all_.items()}


def ask(client: AppClient, route: str, key: str | None) -> int:
    how, path = route.split(" ")
    for name in ("{name}", "{model}", "{alias}", "{asset}"):
        path = path.replace(name, "digits")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return client.request(how, path.replace("{version}", "1"), headers=headers, follow_redirects=False).status_code


def test_every_route_is_listed_with_its_scope(client: AppClient) -> None:
    said = routes(client)
    for scope, listed in NEEDS.items():
        assert {route for route, security in said.items() if security and security[0]["key"] == [scope]} == listed
    assert {route for route, security in said.items() if not security} == PUBLIC


def test_no_route_is_left_out_of_the_document(client: AppClient) -> None:
    said, hidden, seen = routes(client), set(), 0
    waiting: list[Any] = list(client.app.routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, APIRoute):
            hidden |= {f"{how} {route.path}" for how in route.methods} - said.keys()
            seen += 1
        elif hasattr(route, "original_router"):
            waiting += route.original_router.routes
        else:
            hidden.add(route.path)
    assert hidden == {"/openapi.json"}
    assert seen == len(said)


@pytest.mark.parametrize("held", [None, "wrong", *SCOPES])
def test_every_route_keeps_out_who_may_not(client: AppClient, keys: KeyFile, held: str | None) -> None:
    made = {scope: keys.create(scope, scope) for scope in SCOPES}
    key = made.get(held, held) if held else None
    asked = 0
    for scope, listed in NEEDS.items():
        may = held in SCOPES and SCOPES.index(held) >= SCOPES.index(scope)
        for route in listed - {EVENTS}:
            code = ask(client, route, key)
            page = route.startswith(("GET / ", "GET /tasks", "GET /exactness", "GET /page")) or route == "GET /"
            refused = {401} if held not in SCOPES else {403}
            if page and held not in SCOPES:
                refused = {303}
            assert (code not in {401, 403, 303}) if may else (code in refused), (route, held, code)
            asked += 1
    for route in PUBLIC:
        assert ask(client, route, key) not in {401, 500}
    assert asked > 25


def test_a_revoked_key_counts_no_more_and_the_last_one_opens_nothing(client: AppClient, keys: KeyFile) -> None:
    assert client.get("/api/v1/status").status_code == 200
    headers = {"Authorization": f"Bearer {keys.create('shop', 'predict')}"}
    assert client.get("/api/v1/status").status_code == 401
    assert client.get("/api/v1/status", headers=headers).status_code == 200
    keys.revoke("shop")
    assert client.get("/api/v1/status", headers=headers).status_code == 401
    keys.path.unlink()
    assert client.get("/api/v1/status", headers=headers).status_code == 401


def test_beyond_this_machine_no_keys_means_nobody(client: AppClient) -> None:
    client.app.state.loopback = False
    assert client.get("/api/v1/status").status_code == 401


def test_a_damaged_key_file_lets_nobody_in_and_only_the_log_says_why(
    client: AppClient, keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"Authorization": f"Bearer {keys.create('shop', 'predict')}"}
    keys.path.write_text("[{]")
    answer = client.get("/api/v1/status", headers=headers)
    assert answer.status_code == 503
    assert "cannot read its keys" in answer.json()["detail"]
    assert str(keys.path) not in answer.text
    assert f"The keys {str(keys.path)!r} cannot be read" in caplog.text
    assert client.get("/livez").status_code == 200


def test_the_key_is_asked_for_before_a_body_is_read(client: AppClient, keys: KeyFile) -> None:
    keys.create("shop", "predict")
    body = b"x" * (client.app.state.service.limits.body_bytes + 1)
    assert client.post("/api/v1/predict", content=body).status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "[", "localhost.evil.example", "127.0.0.1.nip.io"])
def test_a_name_that_is_made_to_point_here_is_refused(client: AppClient, host: str) -> None:
    assert client.get("/api/v1/status", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://[", "null", "http://localhost:81", "http://localhost.evil.example"]
)
def test_other_sites_pages_are_refused(client: AppClient, origin: str) -> None:
    assert client.post("/api/v1/verify", headers={"Origin": origin}).status_code == 403
    assert client.post("/api/v1/verify", headers={"Origin": "http://localhost"}).status_code == 200


def test_a_cookie_does_what_its_key_does(client: AppClient, keys: KeyFile) -> None:
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


def test_a_key_file_holds_no_key_and_is_its_owners_alone(keys: KeyFile) -> None:
    key = keys.create("shop", "predict")
    assert key.removeprefix("addenda_") not in keys.path.read_text()
    assert len(key.removeprefix("addenda_")) >= 43  # 256 bits in base64
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert keys.find(key).name == "shop"
    assert keys.find(key + "x") is None


def test_what_is_no_key_file_is_refused(tmp_path: Path) -> None:
    for text in ("", "{}", "[1]", '[{"name": "a", "scope": "root", "sha256": "", "created_at": ""}]'):
        (tmp_path / "keys.json").write_text(text)
        with pytest.raises(KeyFileError):
            KeyFile(tmp_path / "keys.json")


def test_the_commands_make_list_and_revoke_keys(run: Run, tmp_path: Path) -> None:
    place = ("--keys", tmp_path / "keys.json")
    made = run("keys", "create", "shop", "--scope", "predict", *place)
    assert made.code == 0
    assert KeyFile(tmp_path / "keys.json").find(made.out.strip()).scope == "predict"
    assert run("keys", "create", "shop", "--scope", "predict", *place).code == 2
    assert "no scope 'all'" in run("keys", "create", "other", "--scope", "all", *place).err
    assert '"shop"' in run("keys", "list", "--json", *place).out
    assert run("keys", "revoke", "shop", *place).code == 0
    assert "no key 'shop'" in run("keys", "revoke", "shop", *place).err


def test_beyond_this_machine_a_server_wants_keys(run: Run, tmp_path: Path, registered: Callable[..., Task]) -> None:
    registered("digits")
    refused = run("serve", "--host", "0.0.0.0", "--keys", tmp_path / "none.json")
    assert refused.code == 2
    assert "addenda keys create" in refused.err
