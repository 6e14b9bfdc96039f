"""The friendly API: images, tasks, bundles, aliases, verification, events."""

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
    made = BytesIO()
    Image.effect_noise(size, 20 + seed).convert("RGB").save(made, kind)
    return made.getvalue()


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Iterator[AppClient]:
    registered("digits")
    registered("strokes", seed=5)
    with client_of(tiny, registry) as opened:
        yield opened


def expected(tiny: FrozenBackbone, task: Task, image: bytes) -> list[dict[str, Any]]:
    pixels = tiny.transform(Image.open(BytesIO(image)))[None]
    best = predictions(task, CombinedModel(tiny, [task])(pixels)[task.name])[0]
    return [{"label": label, "probability": probability} for label, probability in best]


def problem(answer: Any, status: int, said: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert said in answer.json()["detail"]
    assert answer.json()["status"] == status


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_answered_as_the_model_answers_it(
    client: AppClient, tiny: FrozenBackbone, registry: Registry, kind: str
) -> None:
    image = picture(kind=kind)
    answer = client.post("/api/v1/predict", content=image).json()
    assert (answer["generation"], answer["exact"]) == (registry.generation, True)
    for name in ("digits", "strokes"):
        task = registry.get(name)
        assert answer["tasks"][name]["labels"] == expected(tiny, task, image)
        assert (answer["tasks"][name]["ref"], answer["tasks"][name]["sha256"]) == (task.ref, task.sha256)
    assert client.post("/api/v1/predict", files={"image": image}).json() == answer


def test_tasks_and_labels_are_chosen(client: AppClient) -> None:
    def asked(**query: Any) -> dict[str, Any]:
        answer: dict[str, Any] = client.post("/api/v1/predict", content=picture(), params=query).json()
        return answer["tasks"]

    assert list(asked(tasks="strokes")) == ["strokes"]
    assert list(asked(tasks=["strokes", "digits"])) == list(asked(tasks="strokes,digits")) == ["strokes", "digits"]
    assert [len(one["labels"]) for one in asked(top=1).values()] == [1, 1]


def test_what_cannot_be_answered_is_a_problem_that_says_why(client: AppClient) -> None:
    post = client.post
    problem(post("/api/v1/predict", content=b"GIF89a"), 400, "no JPEG, PNG, WEBP file")
    problem(post("/api/v1/predict", content=picture(kind="GIF")), 400, "no JPEG, PNG, WEBP file")
    problem(post("/api/v1/predict", content=picture()[:200]), 400, "cannot be read")
    problem(post("/api/v1/predict", content=b""), 400, "cannot be read")
    problem(post("/api/v1/predict?tasks=other", content=picture()), 404, "'other' is not served. Served: 'digits'")
    problem(post("/api/v1/predict?top=0", content=picture()), 422, "query.top")
    problem(post("/api/v1/predict?task=auto", content=picture()), 409, "nothing was kept of any task's images")
    problem(post("/api/v1/predict?task=auto&tasks=digits", content=picture()), 400, "leave 'tasks' out")
    problem(post("/api/v1/predict", files={"other": picture()}), 400, "'image'")
    damaged = {"Content-Type": "multipart/form-data; boundary=x"}
    problem(post("/api/v1/predict", content=b"--y\r\n", headers=damaged), 400, "form")
    problem(post("/api/v1/predict", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400, "form")
    problem(post("/api/v1/predict", content=b"x", headers={"Content-Encoding": "br"}), 415, "'br'")
    problem(post("/api/v1/predict", content=b"x", headers={"Content-Encoding": "gzip"}), 400, "gzip")
    problem(client.get("/api/v1/tasks?limit=0"), 422, "limit")
    problem(client.get("/api/v1/tasks?since=never"), 400, "'never' is not an ISO 8601 time")
    problem(client.get("/api/v1/tasks/other"), 404, "Known: 'digits'")
    problem(client.get("/api/v1/tasks/digits:1"), 404, "names hold no ':'")
    problem(client.get("/api/v1/nothing"), 404, "Not Found")


def test_what_is_too_large_is_refused(tiny: FrozenBackbone, registry: Registry) -> None:
    import gzip

    limits = Limits(body_bytes=20_000, bundle_bytes=30_000, pixels=10_000)
    with client_of(tiny, registry, limits=limits) as client:
        problem(client.post("/api/v1/predict", content=b"x" * 20_001), 413, "more than the 20000 bytes")
        bomb = gzip.compress(b"x" * 10_000_000)
        assert len(bomb) < 20_000
        answer = client.post("/api/v1/predict", content=bomb, headers={"Content-Encoding": "gzip"})
        problem(answer, 413, "more than the 20000 bytes")
        two = gzip.compress(picture()) + gzip.compress(picture())
        answer = client.post("/api/v1/predict", content=two, headers={"Content-Encoding": "gzip"})
        problem(answer, 400, "one stream of gzip")
        problem(client.post("/api/v1/predict", content=picture(size=(101, 100))), 413, "at most 10000")
        problem(client.post("/api/v1/tasks", content=b"x" * 30_001), 413, "more than the 30000 bytes")


def test_tasks_are_listed_with_their_state_in_pages(
    client: AppClient, registry: Registry, registered: Callable[..., Task]
) -> None:
    registered("digits", new_version=True, seed=7)
    assert client.app.state.service.follower.settle(registry.generation, 10)
    found = client.get("/api/v1/tasks").json()
    states = {one["ref"]: one["state"] for one in found["tasks"]}
    assert states == {"digits:1": "not served", "strokes:1": "serving", "digits:2": "serving"}
    assert found["next"] is None
    page = client.get("/api/v1/tasks?limit=2").json()
    assert [one["ref"] for one in page["tasks"]] == ["strokes:1", "digits:2"]
    rest = client.get("/api/v1/tasks", params={"limit": 2, "before": page["next"]}).json()
    assert [one["ref"] for one in rest["tasks"]] == ["digits:1"]
    assert client.get("/api/v1/tasks/digits").json()["ref"] == "digits:2"
    assert [one["ref"] for one in client.get("/api/v1/tasks/digits/versions").json()] == ["digits:1", "digits:2"]
    assert client.get("/api/v1/tasks/digits/versions/1").json()["record"]["sha256"] == registry.get("digits:1").sha256
    assert client.get("/api/v1/tasks/digits/versions/1/lineage").json()["extends"]["ref"] == "digits:1"


def test_an_artifact_is_its_bytes_under_its_sha256(client: AppClient, registry: Registry) -> None:
    found = client.get("/api/v1/tasks/digits/versions/1/artifact")
    task = registry.get("digits")
    assert (found.content, found.headers["etag"]) == (task.artifact, f'"{task.sha256}"')
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


def test_a_bundle_is_served_when_its_registration_is_answered(client: AppClient, bundle: bytes) -> None:
    tried = client.post("/api/v1/tasks?dry_run=true", content=bundle)
    assert (tried.status_code, tried.json()["tasks"][0]["outcome"]) == (200, "added")
    assert "shapes" not in client.get("/api/v1/status").json()["tasks"]
    made = client.post("/api/v1/tasks", content=bundle, headers={"Idempotency-Key": "one"})
    assert (made.status_code, made.json()["tasks"][0]["state"]) == (201, "serving")
    answer = client.post("/api/v1/predict?tasks=shapes", content=picture()).json()
    assert answer["generation"] == made.json()["generation"]
    again = client.post("/api/v1/tasks", content=bundle, headers={"Idempotency-Key": "one"})
    assert (again.status_code, again.json()) == (201, made.json())
    there = client.post("/api/v1/tasks", content=bundle)
    assert (there.status_code, there.json()["tasks"][0]["outcome"]) == (200, "there already")
    problem(client.post("/api/v1/tasks", content=b"other", headers={"Idempotency-Key": "one"}), 422, "'one' came with")
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
    told = [(event.kind, event.created_by) for event in registry.events()[-2:]]
    assert told == [("imported", "key boss"), ("alias", "key boss")]


def test_what_no_alias_points_at_is_registered_and_not_served(
    tiny: FrozenBackbone, registry: Registry, bundle: bytes
) -> None:
    with client_of(tiny, registry, alias="production") as client:
        made = client.post("/api/v1/tasks", content=bundle).json()["tasks"][0]
        assert (made["outcome"], made["state"]) == ("added", "not served")
        assert "'production'" in made["reason"]
        path = "/api/v1/tasks/shapes/aliases/production"
        assert client.put(path, json={"version": 1}, headers={"If-None-Match": "*"}).status_code == 200
        assert client.get("/api/v1/status").json()["tasks"] == {"shapes": "shapes:1"}
        assert client.delete(path, headers={"If-Match": '"1"'}).status_code == 204
        assert client.get("/api/v1/status").json()["tasks"] == {}


def test_an_alias_is_moved_only_from_where_it_is(client: AppClient, registered: Callable[..., Task]) -> None:
    registered("digits", new_version=True, seed=7)
    path = "/api/v1/tasks/digits/aliases/production"

    def put(version: int, **headers: str) -> Any:
        return client.put(path, json={"version": version}, headers={k.replace("_", "-"): v for k, v in headers.items()})

    problem(client.get(path), 404, "'digits@production' is not registered")
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
    problem(client.get(path), 404, "is not registered")


def test_a_verification_is_answered_and_kept(client: AppClient) -> None:
    found = client.post("/api/v1/verify").json()
    assert found["ok"]
    assert [(one["task"], one["identical"]) for one in found["tasks"]] == [("digits:1", True), ("strokes:1", True)]
    client.post("/api/v1/verify")
    kept = client.get("/api/v1/verifications").json()
    assert (len(kept), kept[-1]) == (2, found)


def test_a_change_of_the_served_weights_is_found_by_verification(
    client: AppClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = client.app.state.service.snapshot.model.heads[0]
    monkeypatch.setattr(head, "weight", head.weight + 1)
    found = client.post("/api/v1/verify").json()
    assert not found["ok"]
    assert [(one["task"], one["ok"]) for one in found["tasks"]] == [("digits:1", False), ("strokes:1", True)]


def test_a_change_of_a_weight_that_no_task_reads_is_found_by_verification(client: AppClient) -> None:
    weight = client.app.state.service.backbone.model.head.weight
    before = weight.data.clone()
    try:
        weight.data[0, 0] += 1
        problem(client.post("/api/v1/verify"), 422, "in memory have changed since they were loaded")
    finally:
        weight.data.copy_(before)


@pytest.mark.slow
def test_listeners_are_told_of_each_generation_and_hang_up_nothing(
    tmp_path: Path, registry: Registry, glyphs: FrozenBackbone
) -> None:
    from addenda.combined import golden
    from tests.support.tasks import random_task

    registry.add_backbone(glyphs.record())
    first = random_task(glyphs, "digits")
    registry.register(first, golden(glyphs, first))
    with ServedProcess(registry.location, tmp_path, "--drain", 0) as server:
        with httpx2.stream("GET", f"{server.url}/api/v1/events", timeout=30) as answer:
            lines = answer.iter_lines()

            def event() -> dict[str, Any]:
                data = next(line for line in lines if line.startswith("data:"))
                told: dict[str, Any] = json.loads(data.removeprefix("data:"))
                return told

            assert event()["tasks"] == {"digits": "digits:1"}
            second = random_task(glyphs, "strokes", seed=3)
            registry.register(second, golden(glyphs, second))
            assert event() == {
                "generation": registry.generation,
                "tasks": {"digits": "digits:1", "strokes": "strokes:1"},
                "quarantined": {},
            }
            server.process.terminate()
            assert not any(line.startswith("data:") for line in lines)  # and they end
        assert server.process.wait(20) == 0
