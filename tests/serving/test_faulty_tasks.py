"""Tasks that fail: never registered, or quarantined while the others are served."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

from addenda import CombinedModel, FrozenBackbone, Registry, Task
from addenda.combined import feature_statistics, golden, predictions_of, verify
from addenda.exceptions import IntegrityError, RegistryError
from addenda.registry.store import registration
from tests.support.inference import pictures, pixels
from tests.support.servers import client_of
from tests.support.tasks import random_task

PREDICT = "/api/v1/predict"


def infinite(backbone: FrozenBackbone, name: str = "bad") -> Task:
    """A task with finite weights and infinite logits."""
    return replace(random_task(backbone, name), head_weight=torch.full((3, backbone.embed_dim), 3e38))


def registered_before(
    monkeypatch: pytest.MonkeyPatch, registry: Registry, backbone: FrozenBackbone, task: Task
) -> None:
    """Registers a task as earlier versions with fewer checks did."""
    with monkeypatch.context() as before:
        before.setattr(registration, "is_finite", lambda *_: True)
        before.setattr(registration, "check_bounds", lambda *_: None)
        registry.add_backbone(backbone.record())
        registry.register(task, golden(backbone, task))


@pytest.mark.parametrize("cause", ["weights", "temperature"])
def test_a_task_with_non_finite_predictions_cannot_be_registered(
    tiny: FrozenBackbone, registry: Registry, cause: str
) -> None:
    task = infinite(tiny) if cause == "weights" else replace(random_task(tiny, "bad"), temperature=1e-300)
    registry.add_backbone(tiny.record())
    with pytest.raises(RegistryError, match=r"Task 'bad'.* (NaN or infinite|temperature 1e-300)"):
        registry.register(task, golden(tiny, task))
    assert registry.tasks() == []


@pytest.mark.parametrize("cause", ["weights", "temperature"])
def test_a_registered_task_with_non_finite_predictions_is_quarantined_and_the_others_are_served(
    tiny: FrozenBackbone,
    registry: Registry,
    registered: Callable[..., Task],
    monkeypatch: pytest.MonkeyPatch,
    cause: str,
) -> None:
    registered("good")
    task = infinite(tiny) if cause == "weights" else replace(random_task(tiny, "bad"), temperature=1e-300)
    registered_before(monkeypatch, registry, tiny, task)
    (verdict,) = verify(tiny, [(registry.get("bad"), registry.goldens("bad"))])
    assert not verdict.ok
    with client_of(tiny, registry) as client:
        status = client.get("/api/v1/status").json()
        assert list(status["tasks"]) == ["good"]
        assert "NaN or infinite" in status["quarantined"]["bad:1"]
        prediction = client.post(PREDICT, content=pictures(1)[0])
        assert list(prediction.json()["tasks"]) == ["good"]
        response = client.post("/v2/models/combined/infer", json={"inputs": pixels(0.5)})
        assert response.status_code == 200


def test_a_task_that_fails_for_some_images_is_named_and_the_others_predict(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("good")
    registered_before(monkeypatch, registry, tiny, infinite(tiny))
    # As if the golden probes were finite.
    monkeypatch.setattr(import_module("addenda.combined.golden"), "is_finite", lambda *_: True)
    with client_of(tiny, registry) as client:
        image = pictures(1)[0]
        rejected = client.post(PREDICT, content=image)
        assert rejected.status_code == 422
        assert "Task 'bad:1' gives logits or probabilities that are NaN or infinite" in rejected.json()["detail"]
        assert client.post(f"{PREDICT}?tasks=good", content=image).status_code == 200
        inputs = [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(image).decode()]}]
        assert client.post("/v2/models/combined/infer", json={"inputs": inputs}).status_code == 422
        assert client.post("/v2/models/good/infer", json={"inputs": inputs}).status_code == 200


def test_a_faulty_task_is_not_reported_as_invalid_pixels_and_large_logits_are_accepted(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("good")
    large = replace(random_task(tiny, "large"), head_bias=torch.tensor([1e31, 0.0, 0.0]))
    registry.register(large, golden(tiny, large))
    request = {"inputs": pixels(0.5)}
    with client_of(tiny, registry) as client:
        assert client.post("/v2/models/combined/infer", json=request).status_code == 200
    registered_before(monkeypatch, registry, tiny, infinite(tiny))
    monkeypatch.setattr(import_module("addenda.combined.golden"), "is_finite", lambda *_: True)
    with client_of(tiny, registry) as client:
        rejected = client.post("/v2/models/combined/infer", json=request)
        assert (rejected.status_code, "'bad:1'" in rejected.json()["detail"]) == (422, True)


def test_routing_works_beside_a_task_with_non_finite_logits(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add_backbone(tiny.record())
    features = torch.randn(40, tiny.embed_dim)
    statistics = feature_statistics(features, torch.arange(40) % 3, 3)
    good, bad = random_task(tiny, "good"), infinite(tiny)
    registry.register(good, golden(tiny, good), statistics)
    other = replace(statistics, sums=statistics.sums[:, :5], gram=statistics.gram[:15], sample=statistics.sample[:, :3])
    odd = random_task(tiny, "odd", seed=2)
    registry.register(odd, golden(tiny, odd), other)  # of other features: excluded from routing
    registered_before(monkeypatch, registry, tiny, bad)
    monkeypatch.setattr(import_module("addenda.combined.golden"), "is_finite", lambda *_: True)
    with client_of(tiny, registry) as client:
        response = client.post(f"{PREDICT}?task=auto", content=pictures(1)[0])
        assert response.status_code == 200, response.text
        assert response.json()["chosen"]["task"] == "good"


def test_a_task_of_another_width_is_quarantined(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]
) -> None:
    """A bundle can bring such a task to a registry that does not know the backbone."""
    registered("good")
    narrow = Task(
        name="narrow",
        backbone=tiny.fingerprint,
        labels=("a", "b"),
        head_weight=torch.zeros(2, 5),
        head_bias=torch.zeros(2),
    )
    probe = golden(tiny, random_task(tiny, "x", classes=2))
    registry.register(narrow, probe)
    with client_of(tiny, registry) as client:
        status = client.get("/api/v1/status").json()
    assert list(status["tasks"]) == ["good"]
    assert "its features have 5 dimensions" in status["quarantined"]["narrow:1"]


def test_only_the_task_with_an_unexpected_error_is_quarantined(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good", "bad", "better"):
        registered(name)
    snapshots = import_module("addenda.serving.snapshot")
    real = snapshots.verdicts

    def failing(model: CombinedModel, recorded: Any) -> Any:
        if any(task.name == "bad" for task, _ in recorded):
            raise RuntimeError("shapes")
        return real(model, recorded)

    monkeypatch.setattr(snapshots, "verdicts", failing)
    with client_of(tiny, registry) as client:
        status = client.get("/api/v1/status").json()
    assert (sorted(status["tasks"]), status["quarantined"]) == (["better", "good"], {"bad:1": "shapes"})


def test_non_finite_predictions_raise(tiny: FrozenBackbone) -> None:
    task, good = infinite(tiny), random_task(tiny, "good")
    logits = CombinedModel(tiny, [good, task])(torch.randn(2, 3, 32, 32))
    with pytest.raises(IntegrityError, match=r"Task 'bad' gives .* addenda tasks retire bad"):
        predictions_of([good, task], logits)
    assert len(predictions_of([good], logits)["good"]) == 2


def test_a_task_with_too_many_ancestors_is_rejected(tiny: FrozenBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "MAX_ANCESTORS", 2)
    line = [random_task(tiny, "a0", memory=0)]
    for number in range(1, 4):
        line.append(random_task(tiny, f"a{number}", memory=0, parents=(line[-1],)))
    registration.check_bounds(line[2])
    with pytest.raises(RegistryError, match=r"Task 'a3' has 3 ancestors; the maximum is 2"):
        registration.check_bounds(line[3])
