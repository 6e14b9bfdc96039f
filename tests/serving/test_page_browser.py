"""The pages in a real browser: predictions, live updates and verification."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from addenda import FrozenBackbone, Registry, load_backbone
from addenda.combined import golden
from addenda.serving.keys import KeyFile
from addenda.serving.server import Server, bind, make_app
from addenda.serving.service import Service
from tests.serving.test_page import TRAINED, register, scores
from tests.support.processes import exit_code
from tests.support.tasks import random_task

pytestmark = pytest.mark.slow


@contextmanager
def serving(backbone: FrozenBackbone, registry: Registry, keys: KeyFile | None = None) -> Iterator[str]:
    """Runs a server in a thread; yields its URL."""
    app = make_app(lambda: Service(backbone, registry), keys or KeyFile("no-keys.json"))
    listening: socket.socket = bind("127.0.0.1", 0)
    server = Server(app, drain_s=0, stop_s=1)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.02)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        app.state.draining = server.should_exit = True
        thread.join()


class Visit:
    """A page in a browser; `complaints` are console messages and requests to other servers."""

    def __init__(self, browser: Any, url: str, folder: Path, **options: Any) -> None:
        self.context = browser.new_context(base_url=url, **({"viewport": {"width": 1280, "height": 900}} | options))
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.context.on("request", lambda request: self._check(url, request.url))
        self.folder = Path(os.environ.get("ADDENDA_SCREENSHOTS") or folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _check(self, url: str, requested: str) -> None:
        if not requested.startswith((url, "blob:", "data:")):
            self.complaints.append(requested)

    def shoot(self, name: str) -> None:
        self.page.screenshot(path=str(self.folder / f"{name}.png"), full_page=True)

    def end(self) -> None:
        assert self.complaints == []
        self.context.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = Image.new("RGB", (320, 240), "#274")
    draw = ImageDraw.Draw(image)
    draw.ellipse((90, 40, 230, 200), fill="#e94", outline="#fff", width=8)
    draw.line((40, 220, 280, 20), fill="#225", width=12)
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def registry_of_two(glyphs: FrozenBackbone, tmp_path: Path) -> Iterator[Registry]:
    """A registry with a long name, many classes, curves, an extension, an alias and a quarantined task."""
    with Registry.open(tmp_path / "tasks.db") as registry:
        parent = register(registry, glyphs, random_task(glyphs, "strokes"), metrics=TRAINED)
        labels = 60
        random = torch.Generator().manual_seed(0)
        counts = (torch.eye(labels) * 12 + torch.rand(labels, labels, generator=random) ** 12 * 9).long().tolist()
        large = random_task(glyphs, "letters-of-many-alphabets", classes=labels, parents=(parent,), seed=3)
        register(registry, glyphs, large, metrics=TRAINED | {"validation": scores(*counts)})
        registry.set_alias("strokes", "production", 1)
        registry.register(random_task(glyphs, "broken", seed=5), golden(glyphs, random_task(glyphs, "broken", seed=6)))
        yield registry


def register_newcomer(location: str) -> None:
    backbone = load_backbone("glyphs", device="cpu")
    with Registry.open(location) as registry:
        register(registry, backbone, random_task(backbone, "newcomer", seed=9))


def redness(canvas: Any) -> float:
    """The mean of a canvas's red minus its blue, which a heat map increases."""
    return canvas.evaluate(
        """canvas => {
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
            copy.drawImage(canvas, 0, 0);
            const data = copy.getImageData(0, 0, canvas.width, canvas.height).data;
            let sum = 0;
            for (let i = 0; i < data.length; i += 4) sum += data[i] - data[i + 2];
            return 4 * sum / data.length;
        }"""
    )


@pytest.mark.usefixtures("another_interpreter")
def test_an_image_is_dropped_and_a_new_task_appears_while_the_page_is_open(
    browser: Any, glyphs: FrozenBackbone, registry_of_two: Registry, picture: Path, tmp_path: Path
) -> None:
    with serving(glyphs, registry_of_two) as url:
        visit = Visit(browser, url, tmp_path)
        page = visit.page
        page.goto("/")
        visit.shoot("home")
        assert page.locator("#tasks tr[data-ref]").count() == 2
        assert "broken:1" in page.locator(".warning").inner_text()
        drop = page.evaluate_handle(
            """bytes => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], "picture.png", {type: "image/png"}));
                return data;
            }""",
            list(picture.read_bytes()),
        )
        page.dispatch_event("[data-drop]", "drop", {"dataTransfer": drop})
        page.wait_for_selector(".prediction")
        predictions = page.locator(".prediction").all_inner_texts()
        assert ["strokes" in text for text in predictions] == [True, False]
        assert all("%" in text for text in predictions)

        canvas = page.locator("[data-canvas]")
        page.click("[data-attention=strokes]")
        page.wait_for_selector("[data-canvas][data-shows=strokes]")
        assert page.get_attribute("[data-attention=strokes]", "aria-pressed") == "true"
        assert "of its attention" in page.locator("[data-caption]").inner_text()
        first_map = canvas.screenshot()
        assert redness(canvas) > 0  # grey with a blue tint except for the heat map
        page.click("[data-attention=letters-of-many-alphabets]")
        page.wait_for_selector("[data-canvas][data-shows=letters-of-many-alphabets]")
        assert canvas.screenshot() != first_map
        visit.shoot("predictions")

        generation = int(page.inner_text("[data-generation]"))
        assert exit_code(register_newcomer, registry_of_two.location) == 0
        page.wait_for_selector("#tasks tr[data-ref='newcomer:1']")
        assert "Now served: newcomer:1. Generation" in page.locator("[data-news]").inner_text()
        assert int(page.inner_text("header [data-generation]")) > generation
        page.wait_for_selector(".prediction [data-attention=newcomer]")
        visit.shoot("newcomer")
        page.click("[data-attention=letters-of-many-alphabets]")
        assert page.get_attribute("[data-canvas]", "data-shows") == ""
        visit.end()


def test_an_undecodable_image_shows_the_error(
    browser: Any, glyphs: FrozenBackbone, registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no image")
    with serving(glyphs, registry) as url:
        visit = Visit(browser, url, tmp_path)
        visit.page.goto("/")
        visit.page.set_input_files("[data-file]", tmp_path / "text.png")
        visit.page.wait_for_selector("[data-caption]:has-text('cannot be read')")
        assert [complaint for complaint in visit.complaints if "400" not in complaint] == []
        visit.context.close()


def test_golden_probes_are_verified_on_the_page(
    browser: Any, glyphs: FrozenBackbone, registry_of_two: Registry, tmp_path: Path
) -> None:
    with serving(glyphs, registry_of_two) as url:
        visit = Visit(browser, url, tmp_path)
        visit.page.goto("/exactness")
        assert "No verification yet" in visit.page.inner_text("[data-verifications]")
        visit.page.click("[data-verify]")
        visit.page.wait_for_selector("[data-verdicts] .verdict")
        assert "Verification failed" in visit.page.inner_text("[data-verdicts]")  # because of the quarantined task
        registry_of_two.retire("broken")
        served = "fetch('/api/v1/status').then((response) => response.json()).then((status) => status.generation)"
        while visit.page.evaluate(served) != registry_of_two.generation:
            visit.page.wait_for_timeout(50)
        visit.page.click("[data-verify]")
        visit.page.wait_for_selector("[data-verifications] tbody tr:nth-child(2)")
        assert "The golden probes of all 2 tasks match" in visit.page.inner_text("[data-verdicts]")
        visit.shoot("exactness")
        visit.end()


def test_all_functions_work_with_the_keyboard(
    browser: Any, glyphs: FrozenBackbone, registry_of_two: Registry, picture: Path, tmp_path: Path
) -> None:
    def focused() -> str:
        return page.evaluate("document.activeElement.dataset.attention || document.activeElement.outerHTML")

    def tab_to(target: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if target in focused():
                return
        raise AssertionError(f"{target} cannot be reached with the keyboard")

    with serving(glyphs, registry_of_two) as url:
        visit = Visit(browser, url, tmp_path)
        page = visit.page
        choosers: list[Any] = []
        # Registered before the click, since interception is enabled asynchronously.
        page.on("filechooser", lambda chooser: choosers.append(chooser))
        page.goto("/")
        page.keyboard.press("Tab")
        assert "Skip to content" in focused()
        tab_to("data-file")
        visit.shoot("keyboard")
        page.keyboard.press("Enter")
        while not choosers:
            page.wait_for_timeout(50)
        choosers[0].set_files(picture)
        page.wait_for_selector(".prediction")
        tab_to("strokes")
        tab_to("strokes")
        page.keyboard.press("Space")
        page.wait_for_selector("[data-canvas][data-shows=strokes]")
        tab_to("/tasks/strokes")
        page.keyboard.press("Enter")
        page.wait_for_url("**/tasks/strokes")
        tab_to("/exactness")
        page.keyboard.press("Enter")
        page.wait_for_url("**/exactness")
        tab_to("data-verify")
        page.keyboard.press("Enter")
        page.wait_for_selector("[data-verdicts] .verdict")
        assert "data-verify" in focused()
        visit.end()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_the_screen_and_are_readable(
    browser: Any, glyphs: FrozenBackbone, registry_of_two: Registry, picture: Path, width: int, scheme: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    with serving(glyphs, registry_of_two) as url:
        visit = Visit(browser, url, tmp_path, viewport={"width": width, "height": 844}, color_scheme=scheme)
        page = visit.page
        for path in ("/", "/tasks/strokes", "/tasks/letters-of-many-alphabets", "/exactness"):
            page.goto(path)
            if path == "/":
                page.set_input_files("[data-file]", picture)
                page.click("[data-attention=strokes]")
                page.wait_for_selector("[data-canvas][data-shows=strokes]")
            root = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert root[0] <= root[1], path
            assert contrast(page) >= 4.5, path
            visit.shoot(f"{path.strip('/').replace('/', '-') or 'home'}-{scheme}-{width}")
        visit.end()


def contrast(page: Any) -> float:
    """The WCAG contrast ratio of the faintest text to the background."""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in color[4:-1].split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = page.evaluate("getComputedStyle(document.querySelector('.soft')).color")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    faint, bright = sorted((luminance(ink), luminance(paper)))
    return (bright + 0.05) / (faint + 0.05)


def test_a_user_logs_in_and_out(browser: Any, glyphs: FrozenBackbone, registry: Registry, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    key = keys.create("reader", "predict")
    with serving(glyphs, registry, keys) as url:
        visit = Visit(browser, url, tmp_path)
        page = visit.page
        page.goto("/exactness")
        page.wait_for_url("**/login")
        visit.shoot("login")
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        page.wait_for_url(f"{url}/")
        (cookie,) = visit.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert page.evaluate("document.cookie") == ""
        page.click("text=Log out")
        page.wait_for_url("**/login")
        assert visit.context.cookies() == []
        visit.end()


def test_an_image_is_pasted(
    browser: Any, glyphs: FrozenBackbone, registry_of_two: Registry, picture: Path, tmp_path: Path
) -> None:
    with serving(glyphs, registry_of_two) as url:
        visit = Visit(browser, url, tmp_path)
        visit.page.goto("/")
        visit.page.evaluate(
            """bytes => {
                const clipboardData = new DataTransfer();
                clipboardData.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
                dispatchEvent(new ClipboardEvent("paste", {clipboardData}));
            }""",
            list(picture.read_bytes()),
        )
        visit.page.wait_for_selector(".prediction")
        visit.end()
