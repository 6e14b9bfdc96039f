"""The pages in a real browser: an image is asked about, tasks come and go, the promise is verified."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from addenda import FrozenBackbone, Registry
from addenda.combined import golden
from addenda.serving.app import make_app
from addenda.serving.keys import KeyFile
from addenda.serving.server import Server, bind
from addenda.serving.service import Service
from tests.serving.test_page import LEARNED, keep, scores
from tests.support.places import ROOT
from tests.support.tasks import random_task

pytestmark = pytest.mark.slow


@contextmanager
def serving(backbone: FrozenBackbone, registry: Registry, keys: KeyFile | None = None) -> Iterator[str]:
    """A server in a thread of this process; gives its URL."""
    app = make_app(lambda metrics: Service(backbone, registry, None, None, metrics.report), keys)
    listening: socket.socket = bind("127.0.0.1", 0)
    server = Server(app, listening, drain_s=0, stop_s=1)
    server.capture_signals = contextmanager(lambda: iter([None]))  # type: ignore[method-assign]  # the thread gets none
    thread = threading.Thread(target=server.run_until_stopped)
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
    """A page that is looked at; `complaints` are what the console said and what was asked of others than the server."""

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

    def _check(self, url: str, asked: str) -> None:
        if not asked.startswith((url, "blob:", "data:")):
            self.complaints.append(asked)

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
    """With a long name, many classes, curves, an extension, an alias and a quarantined task."""
    with Registry.open(tmp_path / "tasks.db") as registry:
        parent = keep(registry, glyphs, random_task(glyphs, "strokes"), metrics=LEARNED)
        labels = 60
        random = torch.Generator().manual_seed(0)
        counts = (torch.eye(labels) * 12 + torch.rand(labels, labels, generator=random) ** 12 * 9).long().tolist()
        large = random_task(glyphs, "letters-of-many-alphabets", classes=labels, parents=(parent,), seed=3)
        keep(registry, glyphs, large, metrics=LEARNED | {"validation": scores(*counts)})
        registry.set_alias("strokes", "production", 1)
        registry.register(random_task(glyphs, "broken", seed=5), golden(glyphs, random_task(glyphs, "broken", seed=6)))
        yield registry


ANOTHER = """
import sys
from addenda import Registry, load_backbone
from addenda.combined import golden, predictions
from tests.support.tasks import random_task
from tests.support.places import ROOT
backbone = load_backbone("glyphs", device="cpu")
with Registry.open(sys.argv[1]) as registry:
    task = random_task(backbone, "newcomer", seed=9)
    registry.register(task, golden(backbone, task))
"""


def light(canvas: Any) -> float:
    """The mean of a canvas's red, minus its blue: what a heat map raises."""
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


def test_an_image_is_dropped_and_a_task_comes_while_the_page_is_open(
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
        page.wait_for_selector(".answer")
        answers = page.locator(".answer").all_inner_texts()
        assert ["strokes" in text for text in answers] == [True, False]
        assert all("%" in text for text in answers)

        canvas = page.locator("[data-canvas]")
        page.click("[data-look=strokes]")
        page.wait_for_selector("[data-canvas][data-shows=strokes]")
        assert page.get_attribute("[data-look=strokes]", "aria-pressed") == "true"
        assert "of its attention" in page.locator("[data-caption]").inner_text()
        looked = canvas.screenshot()
        assert light(canvas) > 0  # grey, tinted with blue, but for the heat
        page.click("[data-look=letters-of-many-alphabets]")
        page.wait_for_selector("[data-canvas][data-shows=letters-of-many-alphabets]")
        assert canvas.screenshot() != looked
        visit.shoot("answers")

        generation = int(page.inner_text("[data-generation]"))
        location = registry_of_two.location.removeprefix("sqlite:///")
        subprocess.run([sys.executable, "-c", ANOTHER, location], check=True, cwd=ROOT)
        page.wait_for_selector("#tasks tr[data-ref='newcomer:1']")
        assert "Now served: newcomer:1. Generation" in page.locator("[data-news]").inner_text()
        assert int(page.inner_text("header [data-generation]")) > generation
        page.wait_for_selector(".answer [data-look=newcomer]")
        visit.shoot("newcomer")
        page.click("[data-look=letters-of-many-alphabets]")
        assert page.get_attribute("[data-canvas]", "data-shows") == ""
        visit.end()


def test_what_is_no_image_is_said(browser: Any, glyphs: FrozenBackbone, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with serving(glyphs, registry) as url:
        visit = Visit(browser, url, tmp_path)
        visit.page.goto("/")
        visit.page.set_input_files("[data-file]", tmp_path / "text.png")
        visit.page.wait_for_selector("[data-caption]:has-text('cannot be read')")
        assert [said for said in visit.complaints if "400" not in said] == []
        visit.context.close()


def test_the_promise_is_verified_on_the_page(
    browser: Any, glyphs: FrozenBackbone, registry_of_two: Registry, tmp_path: Path
) -> None:
    with serving(glyphs, registry_of_two) as url:
        visit = Visit(browser, url, tmp_path)
        visit.page.goto("/exactness")
        assert "Nothing was verified yet" in visit.page.inner_text("[data-verifications]")
        visit.page.click("[data-verify]")
        visit.page.wait_for_selector("[data-verdicts] .verdict")
        assert "The promise is broken" in visit.page.inner_text("[data-verdicts]")  # by the one in quarantine
        registry_of_two.retire("broken")
        served = "fetch('/api/v1/status').then((answer) => answer.json()).then((status) => status.generation)"
        while visit.page.evaluate(served) != registry_of_two.generation:
            visit.page.wait_for_timeout(50)
        visit.page.click("[data-verify]")
        visit.page.wait_for_selector("[data-verifications] tbody tr:nth-child(2)")
        assert "All 2 tasks kept the promise" in visit.page.inner_text("[data-verdicts]")
        visit.shoot("exactness")
        visit.end()


def test_everything_is_done_by_keyboard(
    browser: Any, glyphs: FrozenBackbone, registry_of_two: Registry, picture: Path, tmp_path: Path
) -> None:
    def focused() -> str:
        return page.evaluate("document.activeElement.dataset.look || document.activeElement.outerHTML")

    def tab_to(wanted: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if wanted in focused():
                return
        raise AssertionError(f"{wanted} is not reached by the keyboard")

    with serving(glyphs, registry_of_two) as url:
        visit = Visit(browser, url, tmp_path)
        page = visit.page
        choosers: list[Any] = []
        # From the start: a browser is told to hand them over, and not waited for.
        page.on("filechooser", lambda chooser: choosers.append(chooser))
        page.goto("/")
        page.keyboard.press("Tab")
        assert "To the content" in focused()
        tab_to("data-file")
        visit.shoot("keyboard")
        page.keyboard.press("Enter")
        while not choosers:
            page.wait_for_timeout(50)
        choosers[0].set_files(picture)
        page.wait_for_selector(".answer")
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
                page.click("[data-look=strokes]")
                page.wait_for_selector("[data-canvas][data-shows=strokes]")
            root = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert root[0] <= root[1], path
            assert contrast(page) >= 4.5, path
            visit.shoot(f"{path.strip('/').replace('/', '-') or 'home'}-{scheme}-{width}")
        visit.end()


def contrast(page: Any) -> float:
    """WCAG's ratio of the soft text, the faintest there is, to the paper."""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in color[4:-1].split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = page.evaluate("getComputedStyle(document.querySelector('.soft')).color")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    faint, bright = sorted((luminance(ink), luminance(paper)))
    return (bright + 0.05) / (faint + 0.05)


def test_a_key_lets_a_person_in_and_out(
    browser: Any, glyphs: FrozenBackbone, registry: Registry, tmp_path: Path
) -> None:
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
        visit.page.wait_for_selector(".answer")
        visit.end()
