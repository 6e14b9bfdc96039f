"""The site that `make docs` builds: no link is broken, and no page loads anything from another host."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests.support.places import ROOT


class References(HTMLParser):
    """The resources that a page loads and the links that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "a":
            self.linked.append(given.get("href") or "")
        elif tag == "link":
            if given.get("rel") != "canonical":
                self.loaded.append(given.get("href") or "")
        elif given.get("src"):
            self.loaded.append(given["src"] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'addenda[docs]'")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_read_without_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for loaded in References(page).loaded:
            assert not re.match(r"(https?:)?//", loaded), f"{page.name} loads {loaded}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


@pytest.mark.slow
def test_every_link_of_the_site_leads_to_a_file_in_it(site: Path) -> None:
    found = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # only for servers: its links are relative to their root
            continue
        references = References(page)
        for link in (*references.linked, *references.loaded):
            path = unquote(urldefrag(link).url)
            if path and not re.match(r"(https?|mailto|data):", path):
                assert (page.parent / path).exists(), f"{page.relative_to(site)}: {link}"
                found += 1
    assert found > 500


@pytest.mark.slow
def test_the_reference_shows_what_the_docstrings_say(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for said in (
        "Learns tasks on one backbone and registers them",
        "number of memory tokens per layer",
        "UnknownTaskError",
    ):
        assert said in text, said
