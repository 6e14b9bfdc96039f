"""The pages without a browser: content, content security policy and access."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from addenda import FrozenBackbone, Registry, Task
from addenda.backbones import read_image
from addenda.combined import attention_map, golden
from addenda.registry import Kin, Lineage
from addenda.serving import page, page_charts
from addenda.serving.keys import KeyFile
from addenda.serving.page import seen_box
from tests.support.servers import client_of
from tests.support.tasks import random_task

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def a_picture(width: int = 48, height: int = 40, kind: str = "PNG") -> bytes:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    file = BytesIO()
    Image.fromarray(noise.numpy()).save(file, kind)
    return file.getvalue()


def scores(*counts: list[int]) -> dict[str, Any]:
    return {
        "accuracy": 0.75,
        "confusion": list(counts),
        "per_class": {f"class {i}": row[i] / sum(row) for i, row in enumerate(counts)},
        "num_images": sum(map(sum, counts)),
    }


TRAINED: dict[str, Any] = {
    "validation": scores([8, 2, 0], [1, 9, 0], [0, 5, 5]),
    "candidates": [
        {"learning_rate": 0.1, "epoch": 1, "validation_loss": 0.9},
        {"learning_rate": 0.2, "epoch": 2, "validation_loss": 0.4},
    ],
    "chosen": {"learning_rate": 0.2, "epoch": 2},
    "curves": [
        {"train_loss": [1.2, 1.0], "validation_loss": [0.9, 0.8]},
        {"train_loss": [9.0, 0.5], "validation_loss": [None, 0.4]},
        {"train_loss": [None, 0.3], "validation_loss": [None, 0.6]},
    ],
}


def register(registry: Registry, backbone: FrozenBackbone, task: Task, **changes: Any) -> Task:
    """Registers a changed copy of a task with its golden probe, as a new version if its name exists."""
    registry.add_backbone(backbone.record())
    task = replace(task, **changes)
    return registry.register(task, golden(backbone, task), new_version=True)


@pytest.fixture
def full(tiny: FrozenBackbone, registry: Registry) -> Registry:
    """Three task versions with an extension, an evaluation, a note and an alias."""
    parent = register(registry, tiny, random_task(tiny, "digits"), metrics=TRAINED)
    register(registry, tiny, random_task(tiny, "digits", seed=1))
    register(registry, tiny, random_task(tiny, "strokes", parents=(parent,), seed=2))
    registry.set_alias("digits", "production", 1)
    registry.note("digits:1", "looks good")
    registry.add_evaluation("digits:1", "d" * 64, "n" * 64, {"accuracy": 0.75}, "l" * 64)
    return registry


PAGES = ("/", "/page/tasks", "/exactness", "/tasks/digits", "/tasks/digits/versions/1", "/tasks/strokes")


def test_pages_load_nothing_from_other_sites(tiny: FrozenBackbone, full: Registry) -> None:
    with client_of(tiny, full) as client:
        for path in (*PAGES, "/tasks/unknown", *(f"/static/{name}" for name in page.ASSETS)):
            response = client.get(path)
            assert response.status_code == (404 if "unknown" in path else 200), response.text
            assert response.headers["content-security-policy"] == page.CSP
            assert response.headers["x-content-type-options"] == "nosniff"
            text = response.text.replace('xmlns="http://www.w3.org/2000/svg"', "")
            assert not re.search(r"(https?:)?//[a-z]|url\(|@import", re.sub(r"(?m)^\s*// .*$", "", text)), path
            assert not re.search(r"<[^>]+ (style|on\w+)=|<style|<script(?! src=\"/static/)", response.text), path


@pytest.mark.parametrize(
    ("objective", "score", "per_class"),
    [("single-label", "75.0 %", "Accuracy"), ("multi-label", "75.0 % mAP", "Average precision")],
)
def test_a_task_page_shows_its_scores(
    objective: str, score: str, per_class: str, tiny: FrozenBackbone, registry: Registry
) -> None:
    metrics = {"test": scores([8, 2, 0], [1, 9, 0], [0, 5, 5]) | {"mean_average_precision": 0.75}}
    register(registry, tiny, random_task(tiny, "digits"), objective=objective, metrics=metrics)
    with client_of(tiny, registry) as client:
        text = client.get("/tasks/digits").text
    assert f">{score}<" in text
    assert f'Images</th><th scope="col" class="number">{per_class}</th>' in text


def test_the_content_security_policy_allows_only_own_resources() -> None:
    rules = dict(rule.split(" ", 1) for rule in page.CSP.split("; "))
    assert rules == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self' blob: data:",
        "connect-src": "'self'", "form-action": "'self'", "base-uri": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip


def test_the_home_page_lists_the_served_tasks(tiny: FrozenBackbone, full: Registry) -> None:
    with client_of(tiny, full) as client:
        text = client.get("/").text
    rows = re.findall(r'<tr data-task="(\w+)" data-ref="([\w:]+)"', text)
    assert rows == [("digits", "digits:2"), ("strokes", "strokes:1")]
    assert f"<b data-generation>{full.generation}</b>" in text
    with client_of(tiny, full, alias="production") as client:
        text = client.get("/").text
    assert re.findall(r'data-ref="([\w:]+)"', text) == ["digits:1"]
    assert "75.0 %" in text
    assert '<span class="tag ">production</span>' in text


def test_a_quarantined_task_is_shown_with_the_reason(tiny: FrozenBackbone, registry: Registry) -> None:
    registry.add_backbone(tiny.record())
    task = random_task(tiny, "digits")
    registry.register(task, golden(tiny, random_task(tiny, "digits", seed=1)))
    with client_of(tiny, registry) as client:
        home, details = client.get("/").text, client.get("/tasks/digits").text
    assert "0 tasks served" in home
    assert re.search(r'<dt><a href="/tasks/digits/versions/1">digits:1</a></dt><dd>Its golden probe DIFFERS', home)
    assert "<b>Quarantined.</b> Its golden probe DIFFERS" in details


def test_a_version_page_shows_all_details(tiny: FrozenBackbone, full: Registry) -> None:
    with client_of(tiny, full) as client:
        old, new = client.get("/tasks/digits/versions/1").text, client.get("/tasks/digits").text
        assert client.get("/tasks/digits/versions/3").status_code == 404
        wrong = client.get("/tasks/digits/versions/first")
        assert (wrong.status_code, wrong.headers["content-type"]) == (422, "text/html; charset=utf-8")
        assert "path.version: Input should be a valid integer" in wrong.text
    assert "Served version: <a" in old
    assert "Served version: <a" not in new
    assert "version 2" in new.split("</h1>")[0]
    for text in (
        "Evaluated on 30 validation images", "looks good", "selected epoch 2", "strokes:1</text>",
        '<td class="wrong h5">5</td>', full.record("digits:1").sha256, "the first evaluation on this data",
    ):  # fmt: skip
        assert text in old, text
    assert re.search(
        r"<td>class 2</td><td>class 1</td><td class=\"number\">5</td><td class=\"number\">50.0 %</td>", old
    )


def test_a_retired_task_still_has_a_page(tiny: FrozenBackbone, full: Registry) -> None:
    full.retire("strokes:1", "of no use")
    with client_of(tiny, full) as client:
        assert "<b>Retired.</b> of no use" in client.get("/tasks/strokes").text


def test_user_text_is_escaped(tiny: FrozenBackbone, tmp_path: Path) -> None:
    with Registry.open(tmp_path / "hostile.db", user=HOSTILE) as registry:
        labels = tuple(f"{HOSTILE}{i}" for i in range(3))
        validation = scores([8, 2, 0], [1, 9, 0], [0, 5, 5]) | {"per_class": dict.fromkeys(labels, 0.5)}
        content = {"labels": labels, "metrics": {"validation": validation}, "config": {HOSTILE: HOSTILE}}
        task = register(registry, tiny, random_task(tiny, "digits"), **content)
        registry.note("digits", HOSTILE)
        registry.register(random_task(tiny, "strokes", seed=1), golden(tiny, task))
        with client_of(tiny, registry) as client:
            unknown = "/tasks/" + HOSTILE.replace("/", "")
            texts = [client.get(path).text for path in (*PAGES[:4], unknown, f"{unknown}/versions/1")]
        registry.retire("digits", HOSTILE)
        with client_of(tiny, registry) as client:
            texts.append(client.get("/tasks/digits").text)
    assert sum(text.count("&lt;script&gt;alert(1)&lt;/script&gt;") for text in texts) > 20
    assert not any("<script>" in text or "<img" in text for text in texts)


def test_without_a_key_pages_redirect_to_the_login(tiny: FrozenBackbone, full: Registry, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    key = keys.create("reader", "predict")
    with client_of(tiny, full, keys) as client:
        for path in PAGES:
            response = client.get(path, follow_redirects=False)
            assert (response.status_code, response.headers["location"]) == (303, "/login"), path
            assert "digits" not in response.text
        assert client.post("/page/attention?task=digits", content=a_picture()).status_code == 401
        assert client.get("/login").status_code == client.get("/static/page.css").status_code == 200

        invalid = client.post("/login", data={"key": "addenda_wrong"}, follow_redirects=False)
        assert (invalid.status_code, invalid.headers.get("set-cookie")) == (403, None)
        assert "This key is not valid." in invalid.text
        other_origin = {"origin": "http://elsewhere.example"}
        assert client.post("/login", data={"key": key}, headers=other_origin).status_code == 403
        assert not client.cookies

        valid = client.post("/login", data={"key": key}, follow_redirects=False)
        assert (valid.status_code, valid.headers["location"]) == (303, "/")
        assert valid.headers["set-cookie"].split("; ") == [
            f"addenda_key={key}",
            "HttpOnly",
            "Path=/",
            "SameSite=strict",
        ]
        for path in PAGES:
            assert client.get(path, follow_redirects=False).status_code == 200
        keys.revoke("reader")
        assert client.get("/", follow_redirects=False).status_code == 303
        assert client.post("/logout", follow_redirects=False).headers["location"] == "/login"
        assert not client.cookies


def test_over_https_the_cookie_is_secure(tiny: FrozenBackbone, registry: Registry, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    key = keys.create("reader", "predict")
    with client_of(tiny, registry, keys) as client:
        response = client.post("https://localhost/login", data={"key": key}, follow_redirects=False)
        assert "Secure" in response.headers["set-cookie"].split("; ")


def test_without_keys_there_is_no_login(tiny: FrozenBackbone, registry: Registry) -> None:
    with client_of(tiny, registry) as client:
        assert client.get("/login", follow_redirects=False).headers["location"] == "/"
        assert "/logout" not in client.get("/").text


def test_attention_is_that_of_the_class_token_over_the_patches(tiny: FrozenBackbone, full: Registry) -> None:
    with client_of(tiny, full) as client:
        attention = client.post("/page/attention?task=strokes", content=a_picture()).json()
        assert client.post("/page/attention?task=other", content=a_picture()).status_code == 404
        assert client.post("/page/attention?task=strokes", content=b"no image").status_code == 400
        assert client.post("/page/attention?task=strokes", content=a_picture(kind="BMP")).status_code == 400
    pixels = tiny.transform(read_image(BytesIO(a_picture()))).unsqueeze(0)
    expected = attention_map(tiny, full.get("strokes"), pixels)[0]
    assert attention["weights"] == expected.flatten().tolist()
    assert sum(attention["weights"]) <= 1
    assert {key: attention[key] for key in ("generation", "task", "ref", "rows", "columns")} == {
        "generation": full.generation, "task": "strokes", "ref": "strokes:1", "rows": 4, "columns": 4,
    }  # fmt: skip


def test_a_head_only_task_has_no_attention(tiny: FrozenBackbone, registry: Registry) -> None:
    register(registry, tiny, Task("plain", tiny.fingerprint, ("a", "b"), torch.ones(2, 48), torch.zeros(2)))
    with client_of(tiny, registry) as client:
        response = client.post("/page/attention?task=plain", content=a_picture())
        assert 'data-has-token="no"' in client.get("/").text
    assert response.status_code == 409
    assert "'plain:1' is head-only" in response.json()["detail"]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(320, 200), (120, 300), (64, 64)])
def test_the_seen_box_matches_timms_transform(mode: str, size: tuple[int, int]) -> None:
    """Transforms an image whose red and green channels encode pixel positions."""
    preprocessing = {"input_size": (3, 128, 128), "crop_pct": 0.8, "crop_mode": mode}
    across, down = torch.linspace(0, 255, size[0]), torch.linspace(0, 255, size[1])
    pixels = torch.stack([across.expand(size[1], -1), down[:, None].expand(-1, size[0]), torch.zeros(size[1], size[0])])
    image = Image.fromarray(pixels.permute(1, 2, 0).byte().numpy())
    seen = create_transform(**preprocessing, mean=(0, 0, 0), std=(1, 1, 1), is_training=False)(image)
    left, top, width, height = seen_box(preprocessing, *size)
    middle = torch.arange(40, 88)  # not padded
    position = (middle + 0.5) / 128
    assert (seen[0, 64, middle] - (left + position * width)).abs().max() < 0.015
    assert (seen[1, middle, 64] - (top + position * height)).abs().max() < 0.015


def test_a_large_confusion_matrix_is_an_image_with_a_list_of_the_most_frequent_confusions() -> None:
    count = 250
    counts = [[9 if i == j else 0 for j in range(count)] for i in range(count)]
    counts[10][200] = 7
    labels = [f"class {i}" for i in range(count)]
    confusion = page_charts.confusion({"confusion": counts}, labels)
    assert confusion is not None
    assert (confusion.as_table, len(confusion.rows)) == (False, page_charts.BINS)
    drawn = [images for row in confusion.rows for images, _ in row if images]
    assert len(drawn) == page_charts.BINS + 1
    assert sum(drawn) == 9 * count + 7
    assert confusion.pairs == (("class 10", "class 200", 7, 7 / 16),)


def test_curves_of_the_selected_candidate_are_on_top_and_within_the_chart() -> None:
    curves = page_charts.curves(TRAINED)
    assert curves is not None
    assert [kind for kind, _ in curves.lines] == ["other", "other", "train", "validation"]
    assert (curves.epoch, curves.num_candidates) == (2, 2)
    heights = [float(point.split(",")[1]) for _, points in curves.lines for point in points.split()]
    assert len(heights) == 2 + 1 + 3 + 3
    assert min(heights) >= page_charts.TOP
    assert max(heights) <= page_charts.HEIGHT - page_charts.BOTTOM
    assert curves.best == curves.x_ticks[1][0]


def test_a_task_is_drawn_to_the_right_of_all_tasks_that_it_extends() -> None:
    oldest = Kin("a:1", False)
    current = Kin("own:1", False, (Kin("a:1", False, repeated=True), Kin("b:1", True, (oldest,)), *(
        Kin(f"c{i}:1", False) for i in range(20))))  # fmt: skip
    graph = page_charts.graph(Lineage(current, Kin("own:1", False, (Kin("z:1", False, left_out=3),))))
    assert graph is not None
    x = {node.ref: node.x for node in graph.nodes}
    assert x["a:1"] < x["b:1"] < x["own:1"] < x["z:1"]
    assert sorted(node.num_omitted for node in graph.nodes if node.ref is None) == [3, 9]
    assert all(0 <= node.x <= graph.width - page_charts.NODE_WIDTH for node in graph.nodes)
    assert all(0 <= node.y <= graph.height - page_charts.NODE_HEIGHT for node in graph.nodes)
    assert page_charts.graph(Lineage(oldest, oldest)) is None


def test_templates_and_assets_are_in_the_package() -> None:
    for folder, count in (("templates", 8), ("static", len(page.ASSETS))):
        assert len(list((files("addenda.serving") / folder).iterdir())) == count
