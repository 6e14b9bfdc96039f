"""The REST API: predictions, tasks, bundles, aliases, verification, events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from addenda import CombinedModel, FrozenBackbone, Registry, Task
from addenda.combined import predictions
from addenda.serving.keys import KeyFile
from addenda.serving.service import Limits
from tests.support.servers import AppClient, ServedProcess, client_of

MEDIA_TYPE = "application/problem+json"


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (40, 40)) -> bytes:
    file = BytesIO()
    Image.effect_noise(size, 20 + seed).convert("RGB").save(file, kind)
    return file.getvalue()


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Iterator[AppClient]:
    registered("digits")
    registered("strokes", seed=5)
    with client_of(tiny, registry) as opened:
        yield opened


def expected(tiny: FrozenBackbone, task: Task, image: bytes) -> list[dict[str, Any]]:
    pixels = tiny.transform(Image.open(BytesIO(image)))[None]
    labels = predictions(task, CombinedModel(tiny, [task])(pixels)[task.name])[0]
    return [{"label": label, "probability": probability} for label, probability in labels]


def problem(response: Any, status: int, detail: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    assert detail in response.json()["detail"]
    assert response.json()["status"] == status


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_predictions_are_those_of_the_model(
    client: AppClient, tiny: FrozenBackbone, registry: Registry, kind: str
) -> None:
    image = picture(kind=kind)
    prediction = client.post("/api/v1/predict", content=image).json()
    assert (prediction["generation"], prediction["exact"]) == (registry.generation, True)
    for name in ("digits", "strokes"):
        task = registry.get(name)
        assert prediction["tasks"][name]["labels"] == expected(tiny, task, image)
        assert (prediction["tasks"][name]["ref"], prediction["tasks"][name]["sha256"]) == (task.ref, task.sha256)
    assert client.post("/api/v1/predict", files={"image": image}).json() == prediction


def test_tasks_and_the_number_of_labels_are_selected(client: AppClient) -> None:
    def tasks(**query: Any) -> dict[str, Any]:
        prediction: dict[str, Any] = client.post("/api/v1/predict", content=picture(), params=query).json()
        return prediction["tasks"]

    assert list(tasks(tasks="strokes")) == ["strokes"]
    assert list(tasks(tasks=["strokes", "digits"])) == list(tasks(tasks="strokes,digits")) == ["strokes", "digits"]
    assert [len(task["labels"]) for task in tasks(top=1).values()] == [1, 1]


def test_an_invalid_request_gets_a_problem_document_with_the_reason(client: AppClient) -> None:
    post = client.post
    problem(post("/api/v1/predict", content=b"GIF89a"), 400, "not a JPEG, PNG or WEBP file")
    problem(post("/api/v1/predict", content=picture(kind="GIF")), 400, "not a JPEG, PNG or WEBP file")
    problem(post("/api/v1/predict", content=picture()[:200]), 400, "cannot be read")
    problem(post("/api/v1/predict", content=b""), 400, "cannot be read")
    problem(post("/api/v1/predict?tasks=other", content=picture()), 404, "'other' is not served. Served: 'digits'")
    problem(post("/api/v1/predict?top=0", content=picture()), 422, "query.top")
    problem(post("/api/v1/predict?task=auto", content=picture()), 409, "No registered task has routing statistics")
    problem(post("/api/v1/predict?task=auto&tasks=digits", content=picture()), 400, "cannot be combined with 'tasks'")
    problem(post("/api/v1/predict", files={"other": picture()}), 400, "'image'")
    damaged = {"Content-Type": "multipart/form-data; boundary=x"}
    problem(post("/api/v1/predict", content=b"--y\r\n", headers=damaged), 400, "form")
    problem(post("/api/v1/predict", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400, "form")
    problem(post("/api/v1/predict", content=b"x", headers={"Content-Encoding": "br"}), 415, "'br'")
    problem(post("/api/v1/predict", content=b"x", headers={"Content-Encoding": "gzip"}), 400, "gzip")
    problem(client.get("/api/v1/tasks?limit=0"), 422, "limit")
    problem(client.get("/api/v1/tasks?since=never"), 400, "'never' is not an ISO 8601 time")
    problem(client.get("/api/v1/tasks/other"), 404, "Known: 'digits'")
    problem(client.get("/api/v1/tasks/digits:1"), 404, "a name has no ':'")
    problem(client.get("/api/v1/nothing"), 404, "Not Found")


def test_requests_over_the_size_limits_are_rejected(tiny: FrozenBackbone, registry: Registry) -> None:
    import gzip

    limits = Limits(body_bytes=20_000, bundle_bytes=30_000, pixels=10_000)
    with client_of(tiny, registry, limits=limits) as client:
        problem(client.post("/api/v1/predict", content=b"x" * 20_001), 413, "exceeds 20000 bytes")
        bomb = gzip.compress(b"x" * 10_000_000)
        assert len(bomb) < 20_000
        response = client.post("/api/v1/predict", content=bomb, headers={"Content-Encoding": "gzip"})
        problem(response, 413, "exceeds 20000 bytes")
        two = gzip.compress(picture()) + gzip.compress(picture())
        response = client.post("/api/v1/predict", content=two, headers={"Content-Encoding": "gzip"})
        problem(response, 400, "one valid gzip stream")
        problem(client.post("/api/v1/predict", content=picture(size=(101, 100))), 413, "the maximum is 10000")
        problem(client.post("/api/v1/tasks", content=b"x" * 30_001), 413, "exceeds 30000 bytes")


def test_tasks_are_listed_with_their_state_in_pages(
    client: AppClient, registry: Registry, registered: Callable[..., Task]
) -> None:
    registered("digits", new_version=True, seed=7)
    assert client.app.state.service.follower.settle(registry.generation, 10)
    listing = client.get("/api/v1/tasks").json()
    states = {task["ref"]: task["state"] for task in listing["tasks"]}
    assert states == {"digits:1": "not served", "strokes:1": "serving", "digits:2": "serving"}
    assert listing["next"] is None
    page = client.get("/api/v1/tasks?limit=2").json()
    assert [task["ref"] for task in page["tasks"]] == ["strokes:1", "digits:2"]
    older = client.get("/api/v1/tasks", params={"limit": 2, "before": page["next"]}).json()
    assert [task["ref"] for task in older["tasks"]] == ["digits:1"]
    assert client.get("/api/v1/tasks/digits").json()["ref"] == "digits:2"
    assert [task["ref"] for task in client.get("/api/v1/tasks/digits/versions").json()] == ["digits:1", "digits:2"]
    assert client.get("/api/v1/tasks/digits/versions/1").json()["record"]["sha256"] == registry.get("digits:1").sha256
    assert client.get("/api/v1/tasks/digits/versions/1/lineage").json()["extends"]["ref"] == "digits:1"


def test_an_artifact_is_returned_with_its_sha256_as_etag(client: AppClient, registry: Registry) -> None:
    response = client.get("/api/v1/tasks/digits/versions/1/artifact")
    task = registry.get("digits")
    assert (response.content, response.headers["etag"]) == (task.artifact, f'"{task.sha256}"')
    again = client.get("/api/v1/tasks/digits/versions/1/artifact", headers={"If-None-Match": f'"{task.sha256}"'})
    assert (again.status_code, again.content) == (304, b"")
    other = client.get("/api/v1/tasks/digits/versions/1/artifact", headers={"If-None-Match": f'"{"0" * 64}"'})
    assert (other.status_code, other.content) == (200, task.artifact)


@pytest.fixture
def bundle(tiny: FrozenBackbone, tmp_path: Path) -> bytes:
    from addenda.combined import golden
    from tests.support.tasks import random_task

    with Registry.open(tmp_path / "other.db") as other:
        other.add_backbone(tiny.record())
        task = random_task(tiny, "shapes")
        other.register(task, golden(tiny, task))
        other.export(["shapes"], tmp_path / "shapes.addenda")
    return (tmp_path / "shapes.addenda").read_bytes()


def test_registering_a_bundle_responds_once_it_is_served(client: AppClient, bundle: bytes) -> None:
    dry_run = client.post("/api/v1/tasks?dry_run=true", content=bundle)
    assert (dry_run.status_code, dry_run.json()["tasks"][0]["outcome"]) == (200, "added")
    assert "shapes" not in client.get("/api/v1/status").json()["tasks"]
    created = client.post("/api/v1/tasks", content=bundle, headers={"Idempotency-Key": "one"})
    assert (created.status_code, created.json()["tasks"][0]["state"]) == (201, "serving")
    prediction = client.post("/api/v1/predict?tasks=shapes", content=picture()).json()
    assert prediction["generation"] == created.json()["generation"]
    repeated = client.post("/api/v1/tasks", content=bundle, headers={"Idempotency-Key": "one"})
    assert (repeated.status_code, repeated.json()) == (201, created.json())
    existing = client.post("/api/v1/tasks", content=bundle)
    assert (existing.status_code, existing.json()["tasks"][0]["outcome"]) == (200, "there already")
    problem(
        client.post("/api/v1/tasks", content=b"other", headers={"Idempotency-Key": "one"}),
        422,
        "'one' was used with another request; send a new one",
    )
    problem(client.post("/api/v1/tasks", content=bundle[:300]), 422, "Bundle cannot be imported")
    changed = bundle[:-1] + bytes([bundle[-1] ^ 1])
    problem(client.post("/api/v1/tasks", content=changed), 422, "has changed")


def test_a_change_is_recorded_in_the_name_of_its_key(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], bundle: bytes, tmp_path: Path
) -> None:
    registered("digits")
    keys = KeyFile(tmp_path / "keys.json")
    headers = {"Authorization": f"Bearer {keys.create('boss', 'admin')}"}
    with client_of(tiny, registry, keys) as client:
        assert client.post("/api/v1/tasks", content=bundle, headers=headers).status_code == 201
        path = "/api/v1/tasks/digits/aliases/production"
        assert client.put(path, json={"version": 1}, headers={**headers, "If-None-Match": "*"}).status_code == 200
    recorded = [(event.kind, event.created_by) for event in registry.events()[-2:]]
    assert recorded == [("imported", "key boss"), ("alias", "key boss")]


def test_a_version_without_the_alias_is_registered_but_not_served(
    tiny: FrozenBackbone, registry: Registry, bundle: bytes
) -> None:
    with client_of(tiny, registry, alias="production") as client:
        task = client.post("/api/v1/tasks", content=bundle).json()["tasks"][0]
        assert (task["outcome"], task["state"]) == ("added", "not served")
        assert "'production'" in task["reason"]
        path = "/api/v1/tasks/shapes/aliases/production"
        assert client.put(path, json={"version": 1}, headers={"If-None-Match": "*"}).status_code == 200
        assert client.get("/api/v1/status").json()["tasks"] == {"shapes": "shapes:1"}
        assert client.delete(path, headers={"If-Match": '"1"'}).status_code == 204
        assert client.get("/api/v1/status").json()["tasks"] == {}


def test_an_alias_is_moved_only_if_the_precondition_holds(client: AppClient, registered: Callable[..., Task]) -> None:
    registered("digits", new_version=True, seed=7)
    path = "/api/v1/tasks/digits/aliases/production"

    def put(version: int, **headers: str) -> Any:
        return client.put(path, json={"version": version}, headers={k.replace("_", "-"): v for k, v in headers.items()})

    problem(client.get(path), 404, "'digits' has no alias 'production'")
    for body in (b"", b"{}", b'{"version": "x"}', b"[1]"):
        problem(client.put(path, content=body, headers={"If-None-Match": "*"}), 422, "body")
    problem(client.put(path, content=b" " * 5000, headers={"If-None-Match": "*"}), 413, "exceeds 4096 bytes")
    problem(put(1), 428, "If-Match")
    problem(put(1, if_match='"1"'), 412, "at nothing, not at 'digits:1'")
    assert put(1, if_none_match="*").headers["etag"] == '"1"'
    problem(put(2, if_none_match="*"), 412, "not at nothing")
    problem(put(2, if_match='"2"'), 412, "'digits:1', not at 'digits:2'")
    assert put(2, if_match='"1"').status_code == 200
    assert client.get(path).json() == {"name": "digits", "alias": "production", "version": 2}
    assert client.get(path).headers["etag"] == '"2"'
    problem(put(3, if_match='"2"'), 404, "'digits:3' is not registered")
    problem(client.delete(path), 428, "If-Match")
    problem(client.delete(path, headers={"If-Match": '"1"'}), 412, "'digits:2', not at 'digits:1'")
    assert client.delete(path, headers={"If-Match": '"2"'}).status_code == 204
    problem(client.get(path), 404, "has no alias 'production'")


def test_a_verification_is_returned_and_listed(client: AppClient) -> None:
    result = client.post("/api/v1/verify").json()
    assert result["ok"]
    verdicts = [(verdict["task"], verdict["identical"]) for verdict in result["tasks"]]
    assert verdicts == [("digits:1", True), ("strokes:1", True)]
    client.post("/api/v1/verify")
    listed = client.get("/api/v1/verifications").json()
    assert (len(listed), listed[-1]) == (2, result)


def test_one_verification_runs_at_a_time(client: AppClient) -> None:
    verifying = client.app.state.verifying
    with verifying:
        problem(client.post("/api/v1/verify"), 409, "A verification is running already")
    assert client.post("/api/v1/verify").json()["ok"]


def test_a_registration_that_is_not_served_yet_says_so(
    client: AppClient, bundle: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.app.state.service.follower, "settle", lambda *_: False)
    response = client.post("/api/v1/tasks", content=bundle)
    assert response.status_code == 202
    waiting = [task for task in response.json()["tasks"] if task["state"] == "not served"]
    assert all("it is being loaded; see GET /api/v1/tasks/" in task["reason"] for task in waiting)


def test_verification_detects_changed_head_weights(client: AppClient, monkeypatch: pytest.MonkeyPatch) -> None:
    head = client.app.state.service.snapshot.model.heads[0]
    monkeypatch.setattr(head, "weight", head.weight + 1)
    result = client.post("/api/v1/verify").json()
    assert not result["ok"]
    assert [(task["task"], task["ok"]) for task in result["tasks"]] == [("digits:1", False), ("strokes:1", True)]


def test_verification_detects_a_changed_weight_that_no_task_uses(client: AppClient) -> None:
    weight = client.app.state.service.backbone.model.head.weight
    before = weight.data.clone()
    try:
        weight.data[0, 0] += 1
        problem(client.post("/api/v1/verify"), 422, "in memory have changed since they were loaded")
    finally:
        weight.data.copy_(before)


@pytest.mark.slow
def test_listeners_get_an_event_per_generation_and_do_not_block_shutdown(
    tmp_path: Path, registry: Registry, glyphs: FrozenBackbone
) -> None:
    from addenda.combined import golden
    from tests.support.tasks import random_task

    registry.add_backbone(glyphs.record())
    first = random_task(glyphs, "digits")
    registry.register(first, golden(glyphs, first))
    with ServedProcess(registry.location, tmp_path, "--drain", 0) as server:
        with httpx2.stream("GET", f"{server.url}/api/v1/events", timeout=30) as response:
            lines = response.iter_lines()

            def event() -> dict[str, Any]:
                data = next(line for line in lines if line.startswith("data:"))
                sent: dict[str, Any] = json.loads(data.removeprefix("data:"))
                return sent

            assert event()["tasks"] == {"digits": "digits:1"}
            second = random_task(glyphs, "strokes", seed=3)
            registry.register(second, golden(glyphs, second))
            assert event() == {
                "generation": registry.generation,
                "tasks": {"digits": "digits:1", "strokes": "strokes:1"},
                "quarantined": {},
            }
            server.process.terminate()
            assert not any(line.startswith("data:") for line in lines)  # the stream ends
        assert server.process.wait(20) == 0
